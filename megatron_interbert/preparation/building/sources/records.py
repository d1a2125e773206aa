"""Make regions of published records, whatever the file; subclasses say where records are.

Whether boxes are in pixels or shares of the image, and of which type are features in base64, is
decided once for a source, from its first records.
"""

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.captions.languages import guess_language
from megatron_interbert.preparation.building.sources import boxes as box_kinds
from megatron_interbert.preparation.building.sources.base import Dropped, Record, SourceFacts
from megatron_interbert.preparation.building.sources.encoded import (
    FLOAT32,
    float_type,
    start_of,
)
from megatron_interbert.preparation.building.sources.fields import (
    BadRecord,
    ReadOptions,
    make_regions,
)
from megatron_interbert.preparation.building.sources.looking import Look
from megatron_interbert.preparation.building.sources.names import renamed
from megatron_interbert.preparation.building.sources.sizes import read_sizes
from megatron_interbert.preparation.building.sources.values import (
    Fields,
    fields_of,
    image_name,
    spread,
)

LOOKED_AT = 20  # records that decide how a source is read
KDD = {"product_id", "class_labels"}  # fields that no other data set has
TRIED = 100  # first records, one of which must be good


@dataclass
class Raw:
    """Hold one record as a file has it, the name of its image by its place (a key, the name of a
    file) and where it is, for reports.
    """

    values: Mapping[Any, Any]
    image_id: str
    where: str


class RecordSource(ABC):
    """Read records of one file or folder; subclasses say where they are."""

    kind = ""

    def __init__(self, path: str, options: ReadOptions) -> None:
        self.path = path
        self.options = options

    @abstractmethod
    def raw(self, unit: Any) -> Iterator[Raw | Dropped]:
        """Yield the records of one unit as the file has them."""

    @abstractmethod
    def units(self, images_per_unit: int) -> list[Any]:
        """List units of work of about `images_per_unit` images each."""

    def first_unit(self) -> Any:
        """Return a unit that begins with the first record."""
        return next(iter(self.units(TRIED)), None)

    @cached_property
    def sizes(self) -> Mapping[str, tuple[float, float]]:
        """Return (width, height) by image id, from a file that the user named."""
        return read_sizes(self.options.image_sizes) if self.options.image_sizes else {}

    @cached_property
    def classes(self) -> Mapping[str, int]:
        """Return the class of each name, of which a class may have several (sofa,couch)."""
        return {
            name.strip().lower(): number
            for number, names in enumerate(self.options.class_names)
            for name in names.split(",")
        }

    def remarks(self) -> list[str]:
        """Return lines for the user about what is left out."""
        return []

    @cached_property
    def floats(self) -> np.dtype:
        """Return the type of features in base64, which the first records tell."""
        starts = []
        for raw in itertools.islice(self.raw(self.first_unit()), LOOKED_AT):
            if isinstance(raw, Dropped):
                continue
            with contextlib.suppress(Exception):  # a damaged record is reported where it is read
                fields, _ = renamed(spread(raw.values))
                starts.append(start_of(fields.get("features"), "features"))

        return float_type(starts)

    @cached_property
    def look(self) -> Look:
        """Read the first records and decide how all are read; raise UsageError if none is good."""
        unit = self.first_unit()
        if unit is None:
            raise UsageError(f"{self.path}: holds no images")

        problems: list[str] = []
        found: list[tuple[str, Fields]] = []
        for raw in itertools.islice(self.raw(unit), TRIED):
            fields = raw if isinstance(raw, Dropped) else self._fields(raw)
            if isinstance(fields, Dropped):
                problems.append(told(fields))
            else:
                found.append((raw.where, fields))
            if len(found) == LOOKED_AT:
                break

        votes = Counter(fields.boxes for _, fields in found)
        shares = votes[box_kinds.SHARES] > votes[box_kinds.PIXELS]
        for where, fields in found:
            try:
                regions, labels = self._regions_or_without_attributes(fields, shares)
            except BadRecord as error:
                problems.append(told(Dropped(where, "", error.reason, error.details)))
            else:
                dense = np.shape(fields.values.get("class_probs", ()))[-1:]
                width = regions.features.shape[1]
                spellings = {name.lower() for name in fields.spelled.values()}
                if spellings >= KDD and self.options.box_format == "xyxy":
                    fields.notes.append("KDD Cup 2020 has other boxes: give --box-format yxyx")
                if self.floats != FLOAT32:
                    fields.notes.append(f"features written as {self.floats}")
                attributes = regions.attribute_ids is not None
                return Look(shares, width, labels, fields, dense, regions.size, attributes)

        raise UsageError(
            f"{self.path}: no good record among the first {len(problems)}"
            f" ({problems[0] if problems else 'the file is empty'})"
        )

    def facts(self) -> SourceFacts:
        """Return the facts, with the feature size of the first good record."""
        return SourceFacts(
            self.look.feature_dim,
            self.options.num_classes,
            self.look.labels,
            num_attributes=self.options.num_attributes if self.look.attributes else 0,
        )

    def how(self) -> str:
        """Describe in one line how the source is read."""
        return f"{self.path}: {self.kind}; {self.look.described(self.options)}"

    def read(self, unit: Any) -> Iterator[Record | Dropped]:
        """Yield the images of a unit, in order."""
        shares = self.look.shares
        for raw in self.raw(unit):
            yield raw if isinstance(raw, Dropped) else self._record(raw, shares)

    def _record(self, raw: Raw, shares: bool) -> Record | Dropped:
        fields = self._fields(raw)
        if isinstance(fields, Dropped):
            return fields

        name = str(fields.values["image_id"])
        try:
            regions, kind = self._regions(fields, shares, self.look.attributes)
        except BadRecord as error:
            return Dropped(raw.where, name, error.reason, error.details)

        captions = [(caption, guess_language(caption)) for caption in fields.captions]

        return Record(regions, raw.where, captions, labels=kind)

    def _fields(self, raw: Raw) -> Fields | Dropped:
        name = image_name(raw.image_id)
        try:
            return fields_of(raw.values, name, self.sizes, self.classes, self.floats)
        except BadRecord as error:
            return Dropped(raw.where, name, error.reason, error.details)
        except UsageError:  # nothing can be read at all: not this record's fault
            raise
        except Exception as error:  # a damaged record can hold anything
            details = f"{type(error).__name__}: {error}"
            return Dropped(raw.where, name, "record that cannot be used", details)

    def _regions_or_without_attributes(self, fields: Fields, shares: bool) -> tuple[Regions, str]:
        """Return regions and the kind of their labels; without attributes, and with a note, if
        those cannot be used.
        """
        try:
            return self._regions(fields, shares, attributes=True)
        except BadRecord as error:
            found = self._regions(fields, shares, attributes=False)
            fields.notes.append(f"attributes are left out ({error.reason}: {error.details})")
            return found

    def _regions(self, fields: Fields, shares: bool, attributes: bool) -> tuple[Regions, str]:
        """Return regions, perhaps with their attributes, and the kind of their labels; raise
        BadRecord for boxes of another kind than those of the source.
        """
        if fields.boxes and not fields.named:
            other = box_kinds.SHARES if shares else box_kinds.PIXELS
            if fields.boxes != other:
                raise BadRecord(
                    f"boxes {fields.boxes}, those of the first images {other}",
                    f"corners {fields.values['boxes'].min():g} to {fields.values['boxes'].max():g}",
                )

        values = dict(fields.values)
        if not attributes:
            values.pop("attribute_ids", None)
        if "width" not in values and (shares or fields.named):
            values = {**values, "width": 1, "height": 1}

        for name in ("width", "height"):
            if name not in values:
                raise BadRecord(
                    f"'{name}' of the image is missing",
                    f"found {', '.join(map(str, fields.spelled.values()))}; give the sizes of the"
                    " images with --image-sizes",
                )

        options = self.options
        if fields.named:
            options = replace(options, box_format="xyxy")
        if fields.by_name:
            options = replace(options, class_ids="")

        try:
            return make_regions(values, options, fields.scheme, shares or fields.named)
        except BadRecord:
            raise
        except Exception as error:
            details = f"{type(error).__name__}: {error}"
            raise BadRecord("record that cannot be used", details) from error


def told(dropped: Dropped) -> str:
    """Return where, why and details of a dropped record as one text."""
    return f"{dropped.where}: {dropped.reason}: {dropped.details}".removesuffix(": ")
