"""From flags to a service: model, stores, index, topics; and the thread that takes over new versions of the index."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from megatron_interbert.config import split_paths
from megatron_interbert.data.downstream.recommendation import read_topics
from megatron_interbert.data.downstream.records import read_records
from megatron_interbert.errors import UsageError
from megatron_interbert.progress import progress
from megatron_interbert.serving.app import Service, Topic
from megatron_interbert.serving.batching import ModelThread
from megatron_interbert.serving.index import CURRENT, Version, point_to, prune, write_version
from megatron_interbert.serving.items import Item, LiveItems
from megatron_interbert.serving.journal import Journal, alone, journal_end
from megatron_interbert.serving.messages import ItemFile
from megatron_interbert.serving.shop import Shop
from megatron_interbert.task_config import ServeConfig
from megatron_interbert.tasks.item_scorer import ItemScorer
from megatron_interbert.tasks.loading import as_trained, load_model, open_for
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.weights.files import check_writable

log = logging.getLogger("megatron_interbert.serving")
LOOK_EVERY = 1.0  # seconds between looks for a new version


class Opened:
    """Model, stores and index folder; makes shops, one for each version of the index."""

    def __init__(self, config: ServeConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model, self.source = load_model(
            config.load, ("itm",), config.kernels, device, averaged=config.averaged, precision=config.precision
        )
        as_trained(config, self.source, max_regions=36, max_tokens=64, titles=True)
        fit_length(config, self.source.config)
        self.corpus, self.tokenizer = open_for(config, self.source, split_paths(config.data_path))
        run = self.source.path.parent if self.source.kind == "checkpoint" or self.source.path.is_file() else self.source.path
        self.folder = Path(config.index) if config.index else run / "index"
        check_writable(self.folder, "--index")
        if config.image_folder and not Path(config.image_folder).is_dir():
            raise UsageError(f"--image-folder {config.image_folder}: no such folder")

    @property
    def facts(self) -> dict[str, Any]:
        """What vectors depend on."""
        sizes = {name: getattr(self.config, name) for name in ("titles", "max_regions", "max_tokens")}
        rounded = {"precision": "bf16"} if self.config.precision == "bf16" else {}  # fp32 and TF32 share an index
        return {"weights": self.source.facts["files"], "vocabulary": self.tokenizer.sha256, **sizes, **rounded}

    @property
    def weights_sha256(self) -> str:
        """One digest for all weight files."""
        return hashlib.sha256(json.dumps(self.source.facts["files"], sort_keys=True).encode()).hexdigest()

    def scorer(self) -> ItemScorer:
        """Of no items yet."""
        config = self.config
        items = LiveItems(self.corpus, self.tokenizer, config.max_tokens, config.max_regions, config.titles)
        return ItemScorer(self.model, items, self.device)

    def build(self) -> str:
        """A new version. Its items are those of --items, where that is given and there is no index yet or --rebuild; else those of the
        current version with all changes; else all images of the stores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder / "building", "another process builds this index; wait for it"):
            scorer, place = self.scorer(), journal_end(self.folder)
            current = Version.current(self.folder) if (self.folder / CURRENT).exists() else None
            if current and current.facts["model"] != self.facts and not self.config.rebuild:
                raise UsageError(f"{current.path}: made with other weights or settings; --rebuild makes the index anew for these")
            if self.config.items and (self.config.rebuild or not current):
                items = read_items(self.config.items, scorer.catalogue)
                if current and place > current.place:
                    log.warning(
                        "changes of items since %s was made are dropped: they are those of %s now", current.path, self.config.items
                    )
            elif current:
                items, place = current.items_now()
            else:
                items = list(scorer.catalogue.stored())
            if not items:
                raise UsageError("no items: an index of nothing would find nothing")
            for item in items:
                if item.image_id not in scorer.catalogue.image_numbers:
                    raise UsageError(f"item {item.item_id} has the image {item.image_id}, which is not in {self.corpus.path}")
            places = np.array(scorer.catalogue.stage(items))
            with progress(total=len(items), unit="item", desc="vectors") as bar:
                vectors = scorer.item_vectors(places, bar.update)
            version = write_version(self.folder, items, vectors, self.config.index_kind, self.facts, place)
            prune(self.folder, [current.name] if current else [])  # a service may answer by it, and go back to it
            return version

    def journal(self) -> Journal:
        """The journal, to write to. UsageError where another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return Journal(self.folder, Version.current(self.folder).place if (self.folder / CURRENT).exists() else 0)

    def shop(self) -> Shop:
        """The current version, ready to answer. UsageError where it was made with other weights or settings."""
        version = Version.current(self.folder)
        if version.facts["model"] != self.facts:
            raise UsageError(f"{version.path}: made with other weights or settings than these; build it again (--rebuild)")
        return Shop(self.scorer(), version, self.weights_sha256)


def read_items(path: str, items: LiveItems) -> list[Item]:
    """A jsonl of item_id, image_id, title and attributes; other keys with texts or numbers are attributes too. UsageError
    names the line with an image that no store holds."""
    found: dict[str, Item] = {}
    for where, record in read_records(path, "--items", {"item_id": (str, int), "title": str}):
        item_id = str(record.pop("item_id"))
        image_id, title, attributes = record.pop("image_id", item_id), record.pop("title"), record.pop("attributes", {})
        if not isinstance(attributes, dict):
            raise UsageError(f"{where}: 'attributes' is no JSON object")
        attributes |= record
        for name, value in {"image_id": image_id, **attributes}.items():
            if not isinstance(value, str | int | float):
                raise UsageError(f"{where}: '{name}' is {json.dumps(value, ensure_ascii=False)[:60]}, expected a text or a number")
        image_id, attributes = str(image_id), {str(key): str(value) for key, value in attributes.items()}
        if item_id in found:
            raise UsageError(f"{where}: item {item_id} stands there twice")
        try:
            ItemFile(item_id=item_id, image_id=image_id, title=title, attributes=attributes)
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if image_id not in items.image_numbers:
            raise UsageError(f"{where}: image {image_id} is not in {items.corpus.path}; give the store that holds it")
        found[item_id] = Item(item_id, image_id, title, attributes)
    return list(found.values())


def open_models(config: ServeConfig, device: torch.device) -> list[Opened]:
    """What answers searches, and, where it is another one, what answers topics."""
    found = [Opened(config, device)]
    if config.load_recommendation:
        own = dataclasses.replace(config, load=config.load_recommendation, index=config.recommendation_index)
        own.given = config.given
        found.append(Opened(own, device))
        if found[0].folder.resolve() == found[1].folder.resolve():
            raise UsageError(f"{found[0].folder}: two models need an index each; give --recommendation-index another folder")
    return found


def open_service(config: ServeConfig, models: list[Opened]) -> Service:
    """The service with the current version of each index; one is made where there is none."""
    threads = [start_answering(opened) for opened in models]
    generated = any(store.manifest.get("generated") for store in models[0].corpus.stores)
    service = Service(threads[0], threads[-1], config, generated)
    if config.topics:
        topics = read_topics(config.topics, "--topics")
        service.topics = {key: Topic(key, *rest) for key, *rest in zip(topics.ids, topics.names, topics.texts, strict=True)}
    for opened, thread in zip(models, threads, strict=True):
        threading.Thread(target=watch, args=(opened, thread), name="index", daemon=True).start()
    return service


def start_answering(opened: Opened) -> ModelThread:
    """The thread of a model with the current version of its index."""
    config = opened.config
    journal = opened.journal() if config.api_key else None  # before anything is built: another one may write
    if config.rebuild or not (opened.folder / CURRENT).exists():
        opened.build()
    elif config.items:
        log.info("%s is there: --items is read again only with --rebuild", opened.folder)
    shop = opened.shop()
    if journal is not None:
        shop.begin_to_write(journal)
    return ModelThread(shop, config.queue_size, config.pairs_at_once)


def watch(opened: Opened, model: ModelThread) -> None:
    """Take over new versions of the index as they come. One that does not fit is named, and the link is put back."""
    while True:
        time.sleep(LOOK_EVERY)
        served, version = model.shop.version.name, ""
        try:
            version = (opened.folder / CURRENT).resolve().name
            if version != served:
                newer = opened.shop()
                model.change(lambda shop, newer=newer: take_over(model, shop, newer))
                log.info("index %s is served now", newer.version.name)
                model.change(Shop.trim)
        except Exception as error:
            log.error("index %s: %s; %s is served", version, error, model.shop.version.name)
            if not opened.config.api_key:
                time.sleep(60 * LOOK_EVERY)  # a replica's folder is not ours to change
            elif model.shop.version.name == served:
                with contextlib.suppress(OSError):
                    point_to(opened.folder, served)


def take_over(model: ModelThread, older: Shop, newer: Shop) -> None:
    """In the model's thread: nothing that was changed while the newer version was made is lost."""
    if older.journal is not None:
        newer.begin_to_write(older.journal)
    model.swap(newer)
