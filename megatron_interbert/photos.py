"""Detect the regions of photos in one call, for programs that score images themselves."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import DetectorChoice
from megatron_interbert.preparation.building.sources.decoding import open_photo
from megatron_interbert.preparation.building.sources.photos import regions_of

if TYPE_CHECKING:
    from PIL.Image import Image


def detect_regions(
    photos: str | Path | Sequence[str | Path],
    detector: str | Path = "",
    max_regions: int = 36,
    min_regions: int = 10,
    min_score: float = 0.2,
    device: str = "auto",
    backbone: str | Path = "",
    grid: tuple[int, int] | None = None,
    pool: int = 1,
    resize: str = "whole",
) -> list[Regions]:
    """Detect the regions of photos, as `interbert extract-features` does with the same models.

    `detector` is a folder or hub name of a DETR-like model of transformers, or torchvision:NAME;
    `backbone` is a vision model of transformers, whose cells are the regions or, with a detector,
    whose features are averaged over its boxes. They must be those whose features the model was
    trained on. Raises UsageError for a photo that cannot be read or that a model fails on.
    """
    if max_regions < 1:
        raise UsageError(f"max_regions is {max_regions}, expected 1 or more")

    paths = [photos] if isinstance(photos, (str, Path)) else list(photos)
    if not detector and not backbone:
        raise UsageError("detector and backbone are both missing; give one, or both")

    choice = DetectorChoice(
        str(detector),
        device=device,
        backbone=str(backbone),
        grid=tuple(grid or ()),
        pool=pool,
        resize=resize,
    )
    loaded = load_detector(choice)
    found = []

    for path in map(Path, paths):
        picture = read_photo(path)
        try:
            (seen,) = loaded.detect([picture])
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path}: the detector failed ({error})") from error

        kept = seen.best(max_regions, min_regions, min_score) if detector else seen
        regions = regions_of(path.stem, picture.size, kept)
        if not np.isfinite(regions.features).all():
            raise UsageError(f"{path}: the detector's features do not fit in float16")
        found.append(regions)

    return found


def read_photo(path: Path) -> "Image":
    """Read a photo as RGB; raises UsageError if it cannot be read or has too many pixels."""
    from PIL.Image import DecompressionBombWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DecompressionBombWarning)
            return open_photo(path)
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise UsageError(f"{path}: cannot be read as a photo ({error})") from error
