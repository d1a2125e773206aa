"""Open what the flags of the service name (models, stores, indexes, topics), build indexes, and
switch to new versions while serving.
"""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from megatron_interbert.config.stores import paths_of_stores, split_paths
from megatron_interbert.data.integrity import Integrity
from megatron_interbert.errors import Unreadable, UsageError
from megatron_interbert.files import check_writable, json_sha256, only_one, sibling
from megatron_interbert.progress import progress
from megatron_interbert.reading import is_there
from megatron_interbert.serving.batching import ModelThread
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.index import (
    CURRENT,
    Version,
    check_finite,
    prune,
    serve_from_now_on,
    served_version,
    version_to_replay,
    write_version,
)
from megatron_interbert.serving.items import Item, LiveItems
from megatron_interbert.serving.journal import (
    END,
    JOURNAL,
    WRITING,
    Journal,
    begin,
    end_is_known,
    read_journal,
)
from megatron_interbert.serving.journal_format import Mark
from megatron_interbert.serving.messages import ItemFile
from megatron_interbert.serving.service import Service, Topic
from megatron_interbert.serving.shop import Shop
from megatron_interbert.tasks.loading import as_trained, load_model, open_for
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.records import read_records
from megatron_interbert.tasks.shop.scorer import ItemScorer
from megatron_interbert.tasks.shop.topic_samples import read_topics

log = logging.getLogger("megatron_interbert.serving")
LOOK_EVERY = 1.0  # seconds between checks for a new version


class Opened:
    """Hold an opened model, its stores and index folder, and make a shop for each version of the
    index.
    """

    def __init__(self, config: ServeConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model, self.source = load_model(
            config.load,
            ("itm",),
            config.kernels,
            device,
            averaged=config.averaged,
            precision=config.precision,
        )
        as_trained(config, self.source)
        fit_length(config, self.source.config)
        self.corpus, self.tokenizer = open_for(config, self.source, split_paths(config.data_path))
        run = (
            self.source.path.parent
            if self.source.kind == "checkpoint" or self.source.path.is_file()
            else self.source.path
        )
        self.folder = Path(config.index) if config.index else run / "index"
        self.writes: Journal | None = None  # only in the process that changes items
        check_writable(self.folder, "--index")
        self._warn_of_lost_end()
        if config.image_folder and not Path(config.image_folder).is_dir():
            raise UsageError(f"--image-folder {config.image_folder}: no such folder")

    def _warn_of_lost_end(self) -> None:
        """Warn if it is unknown whether the journal of the index holds all confirmed changes."""
        with contextlib.suppress(UsageError):  # reported when the journal is read for its changes
            if not end_is_known(self.folder):
                log.warning(
                    "%s: missing or cut; cannot check whether the last confirmed changes are in %s",
                    self.folder / END,
                    JOURNAL,
                )

    @property
    def facts(self) -> dict[str, Any]:
        """Return everything that the vectors depend on."""
        sizes = {
            name: getattr(self.config, name) for name in ("titles", "max_regions", "max_tokens")
        }
        # fp32 and TF32 share an index
        rounded = {"precision": "bf16"} if self.config.precision == "bf16" else {}

        return {
            "weights": self.source.facts["files"],
            "vocabulary": self.tokenizer.sha256,
            **sizes,
            **rounded,
        }

    @property
    def weights_sha256(self) -> str:
        """Return one digest of all weight files."""
        return json_sha256(self.source.facts["files"])

    def scorer(self) -> ItemScorer:
        """Return a scorer over a catalogue without items."""
        config = self.config
        items = LiveItems(
            self.corpus, self.tokenizer, config.max_tokens, config.max_regions, config.titles
        )

        return ItemScorer(self.model, items, self.device)

    def build(self) -> str:
        """Build a new version and return its name.

        Its items are those of --items if that is given and there is no index yet or --rebuild; else
        those of the version that is served, with all changes; else all images of the stores. Raises
        UsageError if another process is building, or no version can be built.
        """
        self.folder.mkdir(parents=True, exist_ok=True)

        with only_one(self.folder / "building", "another process builds this index; wait for it"):
            scorer = self.scorer()
            served, items, mark = self._items(scorer.catalogue)
            vectors = self._vectors(scorer, items)
            # last, because it may replace a journal that cannot be used
            if mark is None or not mark.journal:
                mark = self._new_journal()

            version = write_version(
                self.folder, items, vectors, self.config.index_kind, self.facts, mark
            )
            # keeps `served`: a service may be answering from it, and may return to it
            prune(self.folder, [served] if served else [])

            return version

    def _items(self, stored: LiveItems) -> tuple[str, list[Item], Mark | None]:
        """Return (name of the version that a new one is built from, the new one's items, the place
        in the journal after them; None: a new journal is needed).
        """
        begins_anew = bool(self.config.rebuild and self.config.items)

        try:
            found = version_to_replay(self.folder)
        except Unreadable:
            raise
        except UsageError as error:
            if not begins_anew:
                raise
            log.warning("dropping the changes of items and beginning the index anew: %s", error)
            found = None

        served, items, mark = found or (None, list(stored.stored()), None)
        if served and served.facts["model"] != self.facts and not self.config.rebuild:
            raise UsageError(
                f"{served.path}: made with other weights or settings; give --rebuild to build the"
                " index for these"
            )

        if begins_anew or (self.config.items and not served):
            items = read_items(self.config.items, stored)
            if served and mark != served.mark:
                log.warning(
                    "dropping changes of items since %s was built: the items are those of %s now",
                    served.path,
                    self.config.items,
                )

        self._check(items, stored)

        return served.name if served else "", items, mark

    def _check(self, items: list[Item], stored: LiveItems) -> None:
        """Raise UsageError if there are no items, or one has an image that no store holds."""
        if not items:
            raise UsageError("no items to build an index of; give some with --items")
        for item in items:
            if item.image_id not in stored.image_numbers:
                raise UsageError(
                    f"item {item.item_id} has the image {item.image_id}, which is not in"
                    f" {self.corpus.path}; give the store that holds it"
                )

    def _new_journal(self) -> Mark:
        """Create a journal, and return its place; one that cannot be used is set aside.

        Raises UsageError if a service is writing to it.
        """
        if self.writes is not None:
            return begin(self.folder)
        with only_one(
            self.folder / WRITING, "a service with a key writes to this index; end it first"
        ):
            return begin(self.folder)

    def _vectors(self, scorer: ItemScorer, items: list[Item]) -> np.ndarray:
        """Compute the vectors of items, float32 [items, P], with a progress bar.

        Raises UsageError if one is not finite.
        """
        places = np.array(scorer.catalogue.stage(items))
        with progress(total=len(items), unit="item", desc="vectors") as bar:
            vectors = scorer.item_vectors(places, bar.update)
        check_finite(items, vectors)

        return vectors

    def keep_writers_out(self) -> None:
        """Take the journal's lock for this process; raises UsageError if another one has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writes = Journal(self.folder)

    def shop(self, version: Version) -> Shop:
        """Return a shop that answers from a version.

        Raises UsageError if the version was made with other weights or settings.
        """
        if version.facts["model"] != self.facts:
            raise UsageError(
                f"{version.path}: made with other weights or settings than these; build it again"
                " (--rebuild)"
            )

        return Shop(self.scorer(), version, self.weights_sha256)


def read_items(path: str, items: LiveItems) -> list[Item]:
    """Read a JSON Lines file of item_id, image_id, title and attributes; other keys with texts or
    numbers are attributes too.

    Raises UsageError that names the line if an item is malformed, occurs twice or has an image that
    no store holds.
    """
    found: dict[str, Item] = {}

    for where, record in read_records(path, "--items", {"item_id": (str, int), "title": str}):
        item_id = str(record.pop("item_id"))
        image_id = record.pop("image_id", item_id)
        title = record.pop("title")
        attributes = record.pop("attributes", {})
        if not isinstance(attributes, dict):
            raise UsageError(f"{where}: 'attributes' is not a JSON object")

        attributes |= record
        for name, value in {"image_id": image_id, **attributes}.items():
            if not isinstance(value, str | int | float):
                raise UsageError(
                    f"{where}: '{name}' is {json.dumps(value, ensure_ascii=False)[:60]}, expected a"
                    " text or a number"
                )

        image_id = str(image_id)
        attributes = {str(key): str(value) for key, value in attributes.items()}
        if item_id in found:
            raise UsageError(f"{where}: item {item_id} occurs twice; each item needs its own id")
        try:
            ItemFile(item_id=item_id, image_id=image_id, title=title, attributes=attributes)
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(
                f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None

        if image_id not in items.image_numbers:
            raise UsageError(
                f"{where}: image {image_id} is not in {items.corpus.path}; give the store that"
                " holds it"
            )

        found[item_id] = Item(item_id, image_id, title, attributes)

    return list(found.values())


def open_models(config: ServeConfig, device: torch.device) -> list[Opened]:
    """Open the model that answers searches and, with --load-recommendation, the one that answers
    topics.
    """
    integrity = Integrity(paths_of_stores(config))
    integrity.check_at_once()
    integrity.start(lambda problem: log.error("%s", problem))

    found = [Opened(config, device)]
    if config.load_recommendation:
        own = dataclasses.replace(
            config, load=config.load_recommendation, index=config.recommendation_index
        )
        own.given = config.given
        found.append(Opened(own, device))

        if found[0].folder.resolve() == found[1].folder.resolve():
            raise UsageError(
                f"{found[0].folder}: two models need an index each; give --recommendation-index"
                " another folder"
            )

    return found


def open_service(config: ServeConfig, models: list[Opened]) -> Service:
    """Open the service with the current version of each index, building one if there is none."""
    threads = [start_answering(opened) for opened in models]
    generated = any(store.manifest.get("generated") for store in models[0].corpus.stores)
    service = Service(threads[0], threads[-1], config, generated)

    if config.topics:
        topics = read_topics(config.topics, "--topics")
        service.topics = {
            key: Topic(key, *rest)
            for key, *rest in zip(topics.ids, topics.names, topics.texts, strict=True)
        }

    for opened, thread in zip(models, threads, strict=True):
        threading.Thread(target=watch, args=(opened, thread), name="index", daemon=True).start()

    return service


def start_answering(opened: Opened) -> ModelThread:
    """Return the thread of a model, answering from the current version of its index.

    A version is built with --rebuild, or if there is no trace of an index.
    """
    config = opened.config
    if config.api_key:
        opened.keep_writers_out()  # before building, because another process may be writing

    version = None if config.rebuild else served_version(opened.folder)
    if version is None:
        opened.build()
        version = served_version(opened.folder)
    elif config.items:
        log.info("%s already exists: --items is read only with --rebuild", opened.folder)

    if opened.writes is not None:
        bring_up_to_date(opened, version)

    shop = opened.shop(version)
    if opened.writes is not None:
        shop.begin_to_write(opened.writes)

    return ModelThread(shop, config.queue_size, config.batch_pairs)


def bring_up_to_date(opened: Opened, version: Version) -> None:
    """Open the journal, after creating one that an earlier version of this package did not need,
    and restore the link to the version if a backup has lost it.
    """
    if isinstance(version.mark, int) and not is_there(opened.folder / JOURNAL):
        read_journal(opened.folder, version.mark)  # raises UsageError if there should be one
        begin(opened.folder)

    opened.writes.open()
    if not (opened.folder / CURRENT).is_symlink() or sibling(opened.folder / CURRENT) is None:
        serve_from_now_on(opened.folder, version.name)


def watch(opened: Opened, model: ModelThread) -> None:
    """Switch to new versions of the index as they appear, forever.

    A version that cannot be used is logged and, by the process that writes, the link to the served
    one is restored.
    """
    while True:
        time.sleep(LOOK_EVERY)
        served = model.shop.version.name
        version = ""

        try:
            current = sibling(opened.folder / CURRENT)
            version = current.name if current else served
            if version != served:
                newer = opened.shop(served_version(opened.folder))
                model.change(lambda shop, newer=newer: switch_model(model, shop, newer))
                log.info("index %s is served now", newer.version.name)
                model.change(Shop.trim)
        except (OSError, Unreadable) as error:  # it may be sound, so it is tried again
            log.error(
                "index %s cannot be read: %s; still serving %s",
                version,
                error,
                model.shop.version.name,
            )
            time.sleep(10 * LOOK_EVERY)
        except Exception as error:
            log.error("index %s: %s; still serving %s", version, error, model.shop.version.name)
            if not opened.config.api_key:
                time.sleep(60 * LOOK_EVERY)  # a replica's folder is not ours to change
            elif model.shop.version.name == served and is_there(opened.folder / served):
                with contextlib.suppress(OSError, UsageError):
                    serve_from_now_on(opened.folder, served)


def switch_model(model: ModelThread, older: Shop, newer: Shop) -> None:
    """Answer from the newer shop from now on; must be called in the model's thread.

    Changes that were made while the newer version was built are not lost.
    """
    if older.journal is not None:
        newer.begin_to_write(older.journal)
    model.swap(newer)
