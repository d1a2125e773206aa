"""From flags to a service: model, stores, index, topics; and the thread that takes over new versions of the index."""

import hashlib
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_interbert.config import split_paths
from megatron_interbert.data.downstream.recommendation import read_topics
from megatron_interbert.data.downstream.records import identifier, read_records
from megatron_interbert.errors import UsageError
from megatron_interbert.serving.app import Service, Topic
from megatron_interbert.serving.batching import ModelThread
from megatron_interbert.serving.index import CURRENT, Stored, write_version
from megatron_interbert.serving.items import Item, LiveItems
from megatron_interbert.serving.shop import Shop
from megatron_interbert.task_config import ServeConfig
from megatron_interbert.tasks.item_match import ItemScorer
from megatron_interbert.tasks.loading import as_trained, load_model, open_for
from megatron_interbert.tasks.parts import check_length
from megatron_interbert.weights.files import check_writable

log = logging.getLogger("megatron_interbert.serving")
LOOK_EVERY = 1.0  # seconds between looks for a new version
KEPT = 2  # versions


class Opened:
    """Model, stores and index folder; makes shops, one for each version of the index."""

    def __init__(self, config: ServeConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model, self.source = load_model(config.load, ("itm",), config.kernels, device, averaged=config.averaged)
        task = str(self.source.facts.get("task") or "")
        as_trained(config, self.source, task, max_regions=36, max_tokens=64)
        check_length(config.max_tokens, self.source.config)
        self.corpus, self.tokenizer = open_for(config, self.source, split_paths(config.data_path))
        run = self.source.path.parent if self.source.kind == "checkpoint" or self.source.path.is_file() else self.source.path
        self.folder = Path(config.index) if config.index else run / "index"
        check_writable(self.folder, "--index")

    @property
    def facts(self) -> dict[str, Any]:
        """What vectors depend on."""
        sizes = {name: getattr(self.config, name) for name in ("titles", "max_regions", "max_tokens")}
        return {"weights": self.source.facts["files"], "vocabulary": self.tokenizer.sha256, **sizes}

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
        """A new version: of the items of the current one with what was changed since, else of --items, else of all images."""
        scorer = self.scorer()
        if (self.folder / CURRENT).exists() and not self.config.items:
            try:
                items, parent = Stored(self.folder, None).items_now()
            except (OSError, ValueError, KeyError) as error:
                raise UsageError(
                    f"{self.folder}: its current version cannot be read ({error}); remove the folder, or give --items"
                ) from None
        else:
            items, parent = (
                list(read_items(self.config.items, scorer.catalogue) if self.config.items else scorer.catalogue.stored()),
                {},
            )
        if not items:
            raise UsageError("no items: an index of nothing would find nothing")
        places = np.array(scorer.catalogue.put(items))
        with tqdm(total=len(items), unit="item", desc="vectors", mininterval=1.0, disable=None) as bar:
            vectors = scorer.item_vectors(places, bar.update)
        return write_version(self.folder, items, vectors, self.config.index_kind, self.facts, parent)

    def shop(self) -> Shop:
        """The current version, ready to answer."""
        return Shop(self.scorer(), Stored(self.folder, self.facts))


def read_items(path: str, items: LiveItems) -> list[Item]:
    """A jsonl of item_id, image_id, title and attributes; other keys with texts or numbers are attributes too. UsageError
    names the line with an image that no store holds."""
    found: dict[str, Item] = {}
    for where, record in read_records(path, "--items", {"item_id": (str, int), "title": str}):
        item_id = identifier(record.pop("item_id"))
        image_id, title = identifier(record.pop("image_id", item_id)), record.pop("title")
        attributes = {**record.pop("attributes", {}), **record}
        if image_id not in items.image_numbers:
            raise UsageError(f"{where}: image {image_id} is not in {items.corpus.path}; give the store that holds it")
        found[item_id] = Item(item_id, image_id, title, {str(key): str(value) for key, value in attributes.items()})
    return list(found.values())


def open_service(config: ServeConfig, opened: Opened) -> Service:
    """The service with the current version of the index; one is made where there is none."""
    if config.rebuild or not (opened.folder / CURRENT).exists():
        opened.build()
    elif config.items:
        log.info("%s is there: --items is read again only with --rebuild", opened.folder)
    model = ModelThread(opened.shop(), config.queue_size, config.pairs_at_once)
    service = Service(model, config, opened.weights_sha256, any(s.manifest.get("generated") for s in opened.corpus.stores))
    if config.topics:
        topics = read_topics(config.topics, "--topics")
        service.topics = {key: Topic(key, *rest) for key, *rest in zip(topics.ids, topics.names, topics.texts, strict=True)}
    threading.Thread(target=watch, args=(opened, model), name="index", daemon=True).start()
    return service


def watch(opened: Opened, model: ModelThread) -> None:
    """Take over new versions of the index as they come; old ones but the last are removed. One that does not fit is named and left."""
    refused = ""
    while True:
        threading.Event().wait(LOOK_EVERY)
        version = (opened.folder / CURRENT).resolve().name
        if version in (model.shop.version, refused):
            continue
        try:
            newer = opened.shop()
            model.change(lambda shop, newer=newer: take_over(model, shop, newer))
            log.info("index %s is served now", newer.version)
            prune(opened.folder, {newer.version})
        except Exception as error:
            refused = version
            log.error("index %s is not taken over: %s", version, error)


def take_over(model: ModelThread, older: Shop, newer: Shop) -> None:
    """In the model's thread: nothing that was changed while the newer version was made is lost."""
    stored = Stored(newer.path.parent, None)
    if stored.parent.get("version") == older.version:
        newer.take_over(older, stored.parent["journal_bytes"])
    older.close()
    model.swap(newer)


def prune(folder: Path, kept: set[str]) -> None:
    """Remove old versions but the newest few."""
    versions = sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()), key=lambda p: p.stat().st_mtime
    )
    for path in versions[:-KEPT]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
