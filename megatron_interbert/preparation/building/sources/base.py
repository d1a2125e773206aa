"""Define what every source of region features provides: units of work, each of which becomes one
shard, and the records in them.

A unit is small and plain (file names, byte ranges, keys), so it can be planned without reading the
data, sent to any process and repeated after a kill. `read` yields a record or the reason why there
is none; it does not stop at a bad record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_interbert.data.regions import Regions

NO_NAME = "row without a name"


@dataclass
class Record:
    """Hold one image as the source has it.

    Boxes are corners in pixels and may still reach outside the image.
    """

    regions: Regions
    where: str  # file and place in it, for reports
    # (text, language) that come with the features
    captions: list[tuple[str, str]] = field(default_factory=list)
    labels: str = ""  # kind of the soft labels, if records differ; see SourceFacts.soft_labels


@dataclass
class Dropped:
    """Hold a place in the source without a usable image, and why: a short phrase without numbers,
    then details.
    """

    where: str
    image_id: str
    reason: str
    details: str = ""


@dataclass
class SourceFacts:
    """Hold what all records of a source share, for the manifest of the store."""

    feature_dim: int
    num_classes: int  # with background
    soft_labels: str  # dense, top_1_confidence, top_1_without_confidence, none
    class_names: Sequence[str] = ()  # background first; empty if unknown
    # name, revision and whatever else is known; None: the caller knows
    detector: dict[str, Any] | None = None
    background_class: int | None = 0
    num_attributes: int = 0  # 0: regions have none


class FeatureSource(Protocol):
    """Provide a set of images with features.

    Must be cheap to pickle: files are opened by the process that reads.
    """

    def facts(self) -> SourceFacts:
        """Return sizes and origin; raise UsageError if the source cannot be read at all."""

    def units(self, images_per_unit: int) -> list[Any]:
        """List units of work of about `images_per_unit` images each, JSON-serialisable, in a fixed
        order.
        """

    def read(self, unit: Any) -> Iterator[Record | Dropped]:
        """Yield the images of one unit, in a fixed order."""
