"""Extract patch and grid features: any vision backbone of transformers, whose cells are regions; or
whose features are pooled over a detector's boxes.

Legend: D feature size, h, w cells of the whole input, p the side of a cell in input pixels.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.preparation.building.detectors import (
    PROBE_SIZE,
    WEIGHTS_FILE,
    Detections,
    Detector,
    DetectorChoice,
    state_sha256,
)

if TYPE_CHECKING:
    from PIL.Image import Image

RESIZES = ("whole", "pad", "crop")
SAMPLES = 7  # points a side at which a box's features are read
NOTHING = 1e-6


@dataclass(frozen=True)
class Extent:
    """Hold which part of a picture an input shows: the corners x1 y1 x2 y2 of the whole input as
    shares of the picture; beyond 0 to 1 there is padding.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    def cells(self, rows: int, columns: int) -> np.ndarray:
        """Return the boxes of the input's cells, row by row, as shares of the picture: float64
        [rows * columns, 4].
        """
        x = np.linspace(self.left, self.right, columns + 1)
        y = np.linspace(self.top, self.bottom, rows + 1)
        low = np.stack(np.meshgrid(x[:-1], y[:-1]), axis=2).reshape(-1, 2)
        high = np.stack(np.meshgrid(x[1:], y[1:]), axis=2).reshape(-1, 2)

        return np.concatenate([low, high], axis=1)

    def inputs(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes [n, 4] in shares of the picture as shares of the input."""
        start = np.array([self.left, self.top, self.left, self.top])
        size = np.array([self.right - self.left, self.bottom - self.top] * 2)
        return (boxes - start) / size


class Backbone:
    """Run a vision model of transformers on whole pictures, and return its cells as a map.

    `grid` (rows, columns) sets the size of the input; `pool` is how many cells a side are averaged
    into one.
    """

    def __init__(self, choice: DetectorChoice) -> None:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.choice = choice
        where = {"revision": choice.revision} if choice.revision else {}

        try:
            self.processor = AutoImageProcessor.from_pretrained(
                choice.backbone, backend="pil", **where
            )
            model, info = AutoModel.from_pretrained(
                choice.backbone, dtype=torch.float32, output_loading_info=True, **where
            )
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"--backbone {choice.backbone}: not a vision model that transformers can load"
                f" ({reason}); give a folder of save_pretrained with its image processor, or a name"
                " on the hub"
            ) from error

        # of models of images and texts, the half that sees
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        absent = [key for key in info["missing_keys"] if "pool" not in key]
        if absent:
            raise UsageError(
                f"--backbone {choice.backbone}: {len(absent)} parameters are missing, first"
                f" {sorted(absent)[0]}"
            )

        takes = set(inspect.signature(self.model.forward).parameters)
        self.options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        )
        self._probe()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Learn the input's size, the cells and the feature size from a blank picture."""
        from PIL.Image import new

        height, width = self._usual_size()
        cell = getattr(self.model.config, "patch_size", None)
        self.cell = int(cell) if isinstance(cell, int) else self._stride(height, width)
        rows, columns = self.choice.grid or (0, 0)
        pooled = self.cell * self.choice.pool
        self.size = (rows * pooled, columns * pooled) if rows else (height, width)
        where = f"--backbone {self.choice.backbone}"

        if any(side % pooled for side in self.size):
            raise UsageError(
                f"{where}: an input of {self.size[0]} x {self.size[1]} pixels does not divide into"
                f" cells of {self.cell} pixels, {self.choice.pool} a side; give --grid HxW"
            )

        inputs, _ = self.prepare(new("RGB", PROBE_SIZE))
        try:
            found = self.maps(inputs[None])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{where} fails on a blank picture ({error})") from error

        self.feature_dim = found.shape[1]
        self.grid = (found.shape[2], found.shape[3])

    def _usual_size(self) -> tuple[int, int]:
        """Return the height and width of the inputs that the model was trained on."""
        for entry in (getattr(self.processor, "crop_size", None), self.processor.size):
            size = dict(entry or {})
            if size.get("height") and size.get("width"):
                return int(size["height"]), int(size["width"])
            if size.get("shortest_edge"):
                return int(size["shortest_edge"]), int(size["shortest_edge"])

        side = int(getattr(self.model.config, "image_size", 224))
        return side, side

    def _stride(self, height: int, width: int) -> int:
        """Return the pixels of a cell's side of a model that gives a map."""
        states = self.model(pixel_values=torch.zeros(1, 3, height, width)).last_hidden_state
        if states.dim() != 4:
            raise UsageError(
                f"--backbone {self.choice.backbone}: neither has patches nor gives a map of"
                " features; choose another model"
            )

        return -(-height // states.shape[2])

    def prepare(self, image: "Image") -> tuple[torch.Tensor, Extent]:
        """Return the pixels [3, H, W] of a picture as the model takes them, and what they show.

        "whole" stretches the picture to the input; "pad" keeps its shape and fills the right or the
        lower border; "crop" cuts the middle out, as most models are trained.
        """
        height, width = self.size
        extent = Extent()
        if self.choice.resize == "whole":
            image = image.resize((width, height), self._filter())
        elif self.choice.resize == "pad":
            image, extent = padded(image, (width, height), self._filter())
        else:
            image, extent = cropped(image, (width, height), self._filter())

        pixels = self.processor(
            images=[image],
            return_tensors="pt",
            do_resize=False,
            do_center_crop=False,
            do_pad=False,
        )["pixel_values"][0]

        return pixels, extent

    def _filter(self) -> int:
        """Return how the model's processor interpolates pixels."""
        return int(getattr(self.processor, "resample", None) or 2)

    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of the cells of inputs [B, 3, H, W]: [B, D, h, w].

        Tokens that are no patches ([CLS], registers) come first and are left out.
        """
        states = self.model(pixel_values=pixels, **self.options).last_hidden_state
        if states.dim() == 3:
            rows, columns = pixels.shape[2] // self.cell, pixels.shape[3] // self.cell
            patches = states[:, states.shape[1] - rows * columns :]
            states = patches.transpose(1, 2).unflatten(2, (rows, columns))

        return F.avg_pool2d(states, self.choice.pool) if self.choice.pool > 1 else states

    def describe(self) -> dict[str, Any]:
        """Describe the backbone for a store's manifest."""
        from transformers import __version__
        from transformers.utils import cached_file

        folder = Path(self.choice.backbone)
        commit = getattr(self.model.config, "_commit_hash", None) or self.choice.revision
        file = cached_file(
            self.choice.backbone,
            WEIGHTS_FILE,
            revision=commit or None,
            _raise_exceptions_for_missing_entries=False,
        )

        return {
            "name": folder.resolve().name if folder.is_dir() else self.choice.backbone,
            "revision": commit,
            "model": type(self.model).__name__,
            "input": list(self.size),
            "grid": list(self.grid),
            "pool": self.choice.pool,
            "resize": self.choice.resize,
            "weights_sha256": file_sha256(file) if file else state_sha256(self.model.state_dict()),
            "weights_hashed": WEIGHTS_FILE if file else "state dict",
            "preparation": type(self.processor).__name__,
            "transformers": __version__,
        }


def padded(image: "Image", size: tuple[int, int], how: int) -> tuple["Image", Extent]:
    """Return a picture scaled to fit into `size` (width, height) with its shape kept, in the upper
    left corner of a black one, and what that shows.
    """
    from PIL.Image import new

    scale = min(size[0] / image.width, size[1] / image.height)
    inner = tuple(
        min(max(round(side * scale), 1), most) for side, most in zip(image.size, size, strict=True)
    )
    whole = new("RGB", size)
    whole.paste(image.resize(inner, how))

    return whole, Extent(right=size[0] / inner[0], bottom=size[1] / inner[1])


def cropped(image: "Image", size: tuple[int, int], how: int) -> tuple["Image", Extent]:
    """Return the middle of a picture, scaled so that it just covers `size` (width, height), and
    what that shows.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    outer = [max(round(side * scale), least) for side, least in zip(image.size, size, strict=True)]
    left, top = ((whole - part) // 2 for whole, part in zip(outer, size, strict=True))
    part = image.resize(tuple(outer), how).crop((left, top, left + size[0], top + size[1]))

    return part, Extent(
        left / outer[0], top / outer[1], (left + size[0]) / outer[0], (top + size[1]) / outer[1]
    )


def visible_cells(extent: Extent, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which cells of an input show a part of the picture, by number [n], and their boxes as
    shares of it, clipped to it: float64 [n, 4].
    """
    boxes = np.clip(extent.cells(rows, columns), 0.0, 1.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    shown = np.flatnonzero((sides > NOTHING).all(axis=1))

    return shown, boxes[shown]


def pooled_boxes(features: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
    """Return the mean features [n, D] of a map [D, h, w] within boxes [n, 4], which are shares of
    it, read at SAMPLES x SAMPLES points between which the map is linear.
    """
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
        for image, detections in zip(images, found, strict=True):
            detections.features = self._features(image, detections.boxes)

        return found

    @torch.inference_mode()
    def _features(self, image: "Image", boxes: np.ndarray) -> np.ndarray:
        self.model.to(self.device)
        pixels, extent = self.backbone.prepare(image)
        features = self.backbone.maps(pixels[None].to(self.device))[0]
        shares = extent.inputs(boxes / np.tile(image.size, 2))

        return pooled_boxes(features, shares).cpu().numpy()

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
