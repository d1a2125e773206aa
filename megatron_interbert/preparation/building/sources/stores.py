"""Read region stores as a source, to reshard them, to take part of one or to join several."""

from collections.abc import Iterator

from megatron_interbert.data.manifest import sha256_of
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.fields import ReadOptions


class StoreSource:
    """Read the images of a store with their captions, in their order."""

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.path = path
        self.store = RegionStore(path)
        if options.class_ids or options.box_format != "xyxy":
            raise UsageError(
                f"{path}: --class-ids and --box-format are for published features; a region store"
                " has its own"
            )

    def facts(self) -> SourceFacts:
        """Return the facts from the manifest."""
        manifest = self.store.manifest
        names = manifest.get("class_names") or ()
        labels = manifest.get("soft_labels", "")
        background = manifest.get("background_class", 0)

        return SourceFacts(
            self.store.feature_dim,
            self.store.num_classes,
            labels,
            names,
            manifest["detector"],
            background,
            self.store.num_attributes,
        )

    def units(self, images_per_unit: int) -> list[list[int]]:
        """List ranges of images: [first, last + 1]."""
        count = self.store.num_images
        return [
            [start, min(start + images_per_unit, count)]
            for start in range(0, count, images_per_unit)
        ]

    def read(self, unit: list[int]) -> Iterator[Record | Dropped]:
        """Yield the images of a range; those of a damaged shard are dropped."""
        sound: dict[int, bool] = {}
        kind = str(self.store.manifest.get("soft_labels", ""))
        captions: dict[int, list[tuple[str, str]]] = {}
        opened = -1

        for index in range(*unit):
            number, row = self.store.locate(index)
            where = f"{self.path}: image {index}"
            # HDF5 may hang on a damaged file, so it is not opened
            if number not in sound:
                entry = self.store.shards[number]
                sound[number] = sha256_of(self.store.path, entry) == entry["sha256"]

            if not sound[number]:
                yield Dropped(
                    where,
                    "",
                    "shard is damaged (sha256 differs)",
                    self.store.shards[number]["file"],
                )
                continue

            if number != opened:
                opened = number
                captions = {}
                for text, language, image in self.store.open_shard(number).captions():
                    captions.setdefault(image, []).append((text, language))

            try:
                yield Record(self.store.read(index), where, captions.get(row, []), labels=kind)
            except UsageError as error:
                yield Dropped(
                    where,
                    self.store.image_id(index),
                    "record of the store cannot be used",
                    str(error),
                )
