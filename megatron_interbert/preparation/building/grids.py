"""Extract patch and grid features: the cells of a vision backbone are regions; or its features are
averaged over a detector's boxes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.preparation.building.backbones import Backbone
from megatron_interbert.preparation.building.detectors import Detections, Detector, DetectorChoice
from megatron_interbert.preparation.building.extents import Extent, visible_cells

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = 7  # points a side at which a box's features are read
AT_ONCE = 64  # boxes whose points are read at a time


class GridDetector(Detector):
    """Give the cells of a backbone as regions, row by row, without labels."""

    num_classes = 1

    def __init__(self, choice: DetectorChoice) -> None:
        self.backbone = Backbone(choice)
        super().__init__(self.backbone.model, choice)
        self.feature_dim = self.backbone.feature_dim

    def prepare(self, image: "Image") -> dict[str, torch.Tensor]:
        """Return the pixels of a picture, and the corners of what they show."""
        pixels, extent = self.backbone.prepare(image)
        corners = [extent.left, extent.top, extent.right, extent.bottom]
        return {"pixels": pixels, "extent": torch.tensor(corners, dtype=torch.float64)}

    def run(
        self, inputs: dict[str, torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the visible cells of each picture."""
        maps = self.backbone.maps(inputs["pixels"])
        rows, columns = maps.shape[2:]
        found = []

        for features, corners, size in zip(maps, inputs["extent"].tolist(), sizes, strict=True):
            shown, boxes = visible_cells(Extent(*corners), rows, columns)
            flat = features.flatten(1).T.cpu().numpy()[shown]
            found.append(unlabelled(flat, boxes * np.tile(size, 2)))

        return found

    def describe(self) -> dict[str, Any]:
        """Describe the backbone."""
        return self.backbone.describe()


def unlabelled(features: np.ndarray, boxes: np.ndarray) -> Detections:
    """Return regions without labels, all with the best score."""
    count = len(features)
    return Detections(
        features,
        boxes.astype(np.float32),
        np.zeros((count, 1), np.int32),
        np.zeros((count, 1), np.float32),
        np.ones(count, np.float32),
    )


class PooledDetector(Detector):
    """Give the boxes and labels of a detector with the features of a backbone, averaged over each
    box.
    """

    def __init__(self, choice: DetectorChoice, detector: Detector) -> None:
        self.backbone = Backbone(choice)
        self.detector = detector
        super().__init__(self.backbone.model, choice)
        self.feature_dim = self.backbone.feature_dim
        self.num_classes = detector.num_classes
        self.class_names = detector.class_names

    def detect(self, images: Sequence["Image"]) -> list[Detections]:
        """Return the detections for RGB pictures of any sizes, in order."""
        found = self.detector.detect(images)
        maps, extents = self._maps(images)

        for image, detections, features, extent in zip(images, found, maps, extents, strict=True):
            shares = extent.inputs(detections.boxes / np.tile(image.size, 2))
            detections.features = pooled_boxes(features, shares).cpu().numpy()

        return found

    @torch.inference_mode()
    def _maps(self, images: Sequence["Image"]) -> tuple[torch.Tensor, list[Extent]]:
        """Return the maps of pictures [B, D, h, w], and what their inputs show."""
        self.model.to(self.device)
        prepared = [self.backbone.prepare(image) for image in images]
        pixels = torch.stack([pixels for pixels, _ in prepared]).to(self.device)

        return self.backbone.maps(pixels), [extent for _, extent in prepared]

    def prepare(self, image: "Image") -> dict[str, torch.Tensor]:
        """Return the detector's inputs."""
        return self.detector.prepare(image)

    def run(
        self, inputs: dict[str, torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the detector's detections."""
        return self.detector.run(inputs, sizes)

    def describe(self) -> dict[str, Any]:
        """Describe both models."""
        return {**self.backbone.describe(), "boxes": self.detector.describe()}


def pooled_boxes(features: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
    """Return the mean features [n, D] of a map [D, h, w] within boxes [n, 4], which are shares of
    it, read at SAMPLES x SAMPLES points between which the map is linear.
    """
    parts = [features.new_zeros(0, len(features), dtype=torch.float32)]
    for start in range(0, len(boxes), AT_ONCE):
        parts.append(pooled_part(features, boxes[start : start + AT_ONCE]))

    return torch.cat(parts)


def pooled_part(features: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
    """Return the mean features of some boxes; see `pooled_boxes`."""
    places = (torch.arange(SAMPLES) + 0.5) / SAMPLES
    corners = torch.from_numpy(boxes).float()
    x = corners[:, :1] + (corners[:, 2:3] - corners[:, :1]) * places
    y = corners[:, 1:2] + (corners[:, 3:] - corners[:, 1:2]) * places
    points = torch.stack(
        [
            x[:, None, :].expand(-1, SAMPLES, -1),
            y[:, :, None].expand(-1, -1, SAMPLES),
        ],
        dim=3,
    )
    shown = F.grid_sample(
        features[None].float(),
        (2 * points - 1).reshape(1, -1, SAMPLES, 2).to(features.device),
        padding_mode="border",
        align_corners=False,
    )[0]

    return shown.reshape(len(features), len(boxes), -1).mean(dim=2).T
