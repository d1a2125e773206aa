"""Say in one line how a source is read, so that a wrong choice is seen."""

from dataclasses import dataclass

from megatron_interbert.data.regions import UNKNOWN_SIZE
from megatron_interbert.preparation.building.sources.fields import (
    BACKGROUND_FIRST,
    CLASS_ONLY,
    DENSE,
    NONE,
    TOP_1,
    ReadOptions,
)
from megatron_interbert.preparation.building.sources.values import Fields


@dataclass
class Look:
    """Hold what the first records of a source have decided for all of them.

    shares: whether boxes are shares of the image. dense: number of columns of a class
    distribution, in a tuple, empty if there is none. size: (w, h) of the first good image.
    attributes: whether regions have some that can be used.
    """

    shares: bool
    feature_dim: int
    labels: str
    first: Fields
    dense: tuple[int, ...]
    size: tuple[float, float]
    attributes: bool

    def described(self, options: ReadOptions) -> str:
        """Return the fields, and how boxes and classes are read."""
        parts = [
            "fields " + ", ".join(self.first.spelled.values()),
            f"{self.feature_dim} features a region",
            self._boxes(options),
            self._classes(options),
            *([f"one of {options.num_attributes} attributes each"] if self.attributes else []),
            *self.first.notes,
        ]
        return "; ".join(parts)

    def _boxes(self, options: ReadOptions) -> str:
        if self.size == UNKNOWN_SIZE:
            return "boxes are shares of images of unknown size, which are kept (size 1 x 1)"
        if not (self.shares or self.first.named):
            return f"boxes in pixels ({options.box_format})"

        return "boxes are shares of the image, multiplied by its size"

    def _classes(self, options: ReadOptions) -> str:
        if self.labels == NONE:
            names = "class_names" in self.first.spelled
            return "no classes" + (" but their names: give --class-names" if names else "")
        if self.labels == DENSE:
            columns = self.dense[0]
            shift = "" if columns == options.num_classes else " without background, moved by one"
            return f"class distributions of {columns} columns{shift}"

        if self.first.by_name:
            return "classes by their names"

        first = (options.class_ids or self.first.scheme) == BACKGROUND_FIRST
        counted = "0 is background" if first else "0 is the first object, moved by one"
        confidence = {TOP_1: "with confidence", CLASS_ONLY: "without confidence"}[self.labels]
        return f"class ids {confidence} ({counted})"
