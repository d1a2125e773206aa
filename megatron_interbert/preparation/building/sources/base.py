"""What every source of region features gives: units of work, each of which becomes one shard, and
the records inside.

A unit is small and plain (file names, byte ranges, keys), so it can be planned without reading the
data, sent to any process and repeated after a kill. `read` gives a record or says why there is
none; it never stops at a bad record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_interbert.data.regions import Regions


@dataclass
class Record:
    """One image as the source has it.

    Boxes are corners in pixels and may still reach outside the image.
    """

    regions: Regions
    where: str  # file and place in it, for reports
    # (text, language) that come with the features
    captions: list[tuple[str, str]] = field(default_factory=list)
    labels: str = ""  # kind of the soft labels (SourceFacts.soft_labels) where records differ


@dataclass
class Dropped:
    """A place of the source that gave no usable image, and why (one short phrase without numbers,
    then details).
    """

    where: str
    image_id: str
    reason: str
    details: str = ""


@dataclass
class SourceFacts:
    """What is the same for all records of a source and goes into the manifest of the store."""

    feature_dim: int
    num_classes: int  # with background
    soft_labels: str  # dense, top_1_confidence, top_1_without_confidence, none
    class_names: Sequence[str] = ()  # background first; empty: not known
    # name, revision, and what else is known; None: the caller says it
    detector: dict[str, Any] | None = None
    background_class: int | None = 0


class FeatureSource(Protocol):
    """A set of images with features.

    Must be cheap to pickle: files are opened by the process that reads.
    """

    def facts(self) -> SourceFacts:
        """Give sizes and origin; UsageError when the source cannot be read at all."""

    def units(self, images_per_unit: int) -> list[Any]:
        """JSON-able pieces of work of about so many images, in a fixed order."""

    def read(self, unit: Any) -> Iterator[Record | Dropped]:
        """Read the images of one unit, in a fixed order."""
