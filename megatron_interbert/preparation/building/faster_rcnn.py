"""Run the Faster R-CNNs of torchvision as detectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.preparation.building.detectors import (
    BACKGROUND,
    TORCHVISION,
    Detections,
    Detector,
    DetectorChoice,
    state_sha256,
)

if TYPE_CHECKING:
    from PIL.Image import Image


class TorchvisionDetector(Detector):
    """Run a Faster R-CNN of torchvision; a region's feature is the box head's output for the
    proposal that became its box.
    """

    def __init__(self, choice: DetectorChoice) -> None:
        try:
            import torchvision
            from torchvision.models import get_model, get_model_weights
        # RuntimeError: it is installed, but built for another torch
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                f"--detector {choice.name}: torchvision cannot be imported beside torch"
                f" {torch.__version__} ({str(error).splitlines()[0]}); install the torchvision"
                " release made for this torch"
            ) from error

        self.version = torchvision.__version__
        name = choice.name.removeprefix(TORCHVISION)

        try:
            published = get_model_weights(name).DEFAULT
        except ValueError as error:
            raise UsageError(
                f"--detector {choice.name}: torchvision has no such model, try"
                " fasterrcnn_resnet50_fpn"
            ) from error

        if choice.weights:
            model = _with_weights(get_model, name, choice)
            self.revision = Path(choice.weights).name
        else:
            model = _published(get_model, name, published)
            self.revision = published.name
            self.class_names = (BACKGROUND, *published.meta["categories"][1:])

        predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
        if predictor is None:
            raise UsageError(
                f"--detector {choice.name}: {type(model).__name__} has no box head, expected a"
                " Faster R-CNN"
            )

        self.hash = (
            file_sha256(choice.weights) if choice.weights else state_sha256(model.state_dict())
        )
        self.feature_dim = predictor.cls_score.in_features
        self.num_classes = predictor.cls_score.out_features
        super().__init__(model, choice)

    def prepare(self, image: "Image") -> dict[str, torch.Tensor]:
        """Return pixels [3, H, W] from 0 to 1; the model itself resizes and normalises."""
        return {"pixels": torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255}

    def run(
        self, inputs: dict[str, torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the proposals that remain after non-maximum suppression within each class; every
        proposal has one box, that of its best class.
        """
        heads = self.model.roi_heads
        images, _ = self.model.transform(list(inputs["pixels"]))
        maps = self.model.backbone(images.tensors)
        maps = {"0": maps} if isinstance(maps, torch.Tensor) else maps
        proposals, _ = self.model.rpn(images, maps)
        states = heads.box_head(heads.box_roi_pool(maps, proposals, images.image_sizes))
        logits, deltas = heads.box_predictor(states)
        counts = [len(found) for found in proposals]
        parts = (
            logits.softmax(-1).split(counts),
            states.split(counts),
            heads.box_coder.decode(deltas, proposals).split(counts),
        )

        return [self._keep(*row) for row in zip(*parts, images.image_sizes, sizes, strict=True)]

    def _keep(
        self,
        dist: torch.Tensor,
        states: torch.Tensor,
        boxes: torch.Tensor,
        inner: tuple[int, int],
        size: tuple[int, int],
    ) -> Detections:
        """Build one picture's detections from dist [Q, C], states [Q, F] and boxes [Q, C, 4] in the
        resized picture of `inner` (height, width); `size` (width, height) is the original's.
        """
        from torchvision.ops import batched_nms, clip_boxes_to_image

        scores, labels = dist[:, 1:].max(dim=1)
        best = clip_boxes_to_image(boxes[torch.arange(len(boxes)), labels + 1], inner)
        keep = batched_nms(best, scores, labels, self.model.roi_heads.nms_thresh)
        scale = best.new_tensor([size[0] / inner[1], size[1] / inner[0]] * 2)

        return self._collect(scores[keep], dist[keep], states[keep], best[keep] * scale)

    def describe(self) -> dict[str, Any]:
        """Return the name, the name of the published weights or of the file, the size of prepared
        pictures and the hash of the weights.
        """
        return {
            "name": self.choice.name,
            "revision": self.revision,
            "model": type(self.model).__name__,
            "size": {
                "shortest_edge": self.model.transform.min_size[0],
                "longest_edge": self.model.transform.max_size,
            },
            "weights_sha256": self.hash,
            "weights_hashed": self.revision if self.choice.weights else "state dict",
            "torchvision": self.version,
        }


def _published(get_model: Any, name: str, weights: Any) -> torch.nn.Module:
    """Load a torchvision model with its published weights, which are downloaded once."""
    try:
        return get_model(name, weights=weights)
    except OSError as error:
        raise UsageError(
            f"--detector {TORCHVISION}{name}: {weights.url} cannot be downloaded ({error}); give"
            " the file with --weights"
        ) from error


def _with_weights(get_model: Any, name: str, choice: DetectorChoice) -> torch.nn.Module:
    """Load a torchvision model with the state dict of --weights, which also gives the number of
    classes.
    """
    try:
        if choice.weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(choice.weights)
        else:
            state = torch.load(choice.weights, map_location="cpu", weights_only=True)

        classes = len(state["roi_heads.box_predictor.cls_score.weight"])
        model = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
        # Only newer state dicts have batch counters, which do not affect what a detector computes.
        missing, unknown = model.load_state_dict(state, strict=False)
        wrong = [key for key in (*missing, *unknown) if not key.endswith("num_batches_tracked")]
    # a foreign file: whatever is wrong with it ends in the same message
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--weights {choice.weights}: not a state dict of torchvision's {name} ({reason})"
        ) from error

    if wrong:
        raise UsageError(
            f"--weights {choice.weights}: {len(wrong)} names are missing from or unknown to {name},"
            f" first {wrong[0]}"
        )

    return model
