"""Detect the regions of photos in one call, for programs that score images themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import DetectorChoice
from megatron_interbert.preparation.building.sources.photos import open_photo


def detect_regions(
    photos: str | Path | Sequence[str | Path],
    detector: str | Path,
    max_regions: int = 36,
    min_regions: int = 10,
    min_score: float = 0.2,
    device: str = "auto",
) -> list[Regions]:
    """Detect the regions of photos, as `interbert extract-features` does with the same detector.

    `detector` is a folder or hub name of a DETR-like model of transformers, or torchvision:NAME; it
    must be the detector whose features the model was trained on. Raises UsageError for a photo that
    cannot be read.
    """
    paths = [photos] if isinstance(photos, (str, Path)) else list(photos)
    loaded = load_detector(DetectorChoice(str(detector), device=device))
    found = []
    for path in paths:
        try:
            picture = open_photo(Path(path))
        except Exception as error:  # decoders raise whatever a broken file makes them raise
            raise UsageError(f"{path}: cannot be read as a photo ({error})") from error

        (seen,) = loaded.detect([picture])
        best = seen.best(max_regions, min_regions, min_score)
        width, height = picture.size
        found.append(
            Regions(
                Path(path).stem,
                (float(width), float(height)),
                best.features.astype(np.float16),  # as a store holds them
                best.boxes,
                best.class_ids,
                best.class_probs,
            )
        )
    return found
