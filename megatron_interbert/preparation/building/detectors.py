"""Run object detectors behind one interface: pictures in; boxes, region features and class
distributions out.

Supports any DETR-like model of transformers; the Faster R-CNNs of torchvision are in
faster_rcnn.py. Libraries are imported when a detector is loaded.

Legend: B pictures, Q queries or proposals of a picture, F feature size, C classes with background,
k labels kept.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256

if TYPE_CHECKING:
    from PIL.Image import Image

TORCHVISION = "torchvision:"
BACKGROUND = "background"
WEIGHTS_FILE = "model.safetensors"
PROBE_SIZE = (96, 64)  # of the blank picture that shows whether a model works, and its output sizes


@dataclass(frozen=True)
class DetectorChoice:
    """Hold the user's choice of a detector; small enough to send to any process."""

    name: str  # folder or hub name of a transformers model, or torchvision:NAME
    revision: str = ""  # of the detector
    # file with the state dict of a torchvision model; empty: the published weights
    weights: str = ""
    device: str = "auto"
    soft_labels: int = 10
    # a vision model of transformers whose cells are the regions, or, with a detector, whose
    # features are averaged over the detector's boxes
    backbone: str = ""
    backbone_revision: str = ""
    grid: tuple[int, int] = ()  # rows and columns of cells; empty: as the model was trained
    pool: int = 1  # cells a side that are averaged into one
    resize: str = "whole"  # how a picture becomes an input; see extents.py


@dataclass
class Detections:
    """Hold the detections in one picture, best score first: features [Q, F], boxes [Q, 4] x1 y1 x2
    y2 in pixels, labels [Q, k], scores [Q].
    """

    features: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    class_probs: np.ndarray
    scores: np.ndarray

    def best(self, most: int, least: int, min_score: float) -> "Detections":
        """Return the detections with a score of at least `min_score`, but at most `most` and, if
        there are enough, at least `least`.
        """
        count = min(max(int((self.scores >= min_score).sum()), least), most)
        return Detections(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))


def class_distribution(logits: torch.Tensor, softmax: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute distributions [.., C] with background at 0, and scores [..], from a model's logits.

    `softmax`: the last logit is "no object" (DETR). Otherwise each class has its own sigmoid; if
    these sum to more than 1 they are divided by their sum, and what is left of 1 is background. The
    score is the highest probability of a class that the model gives.
    """
    if softmax:
        probs = logits.softmax(-1)
        return torch.cat([probs[..., -1:], probs[..., :-1]], dim=-1), probs[..., :-1].amax(-1)

    probs = logits.sigmoid()
    total = probs.sum(-1, keepdim=True)

    return torch.cat([(1 - total).clamp(min=0), probs / total.clamp(min=1)], dim=-1), probs.amax(-1)


def pixel_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Convert boxes [Q, 4] from centre, width, height (0 to 1) to corners in pixels, clipped to a
    picture of `size` (width, height).
    """
    centre = boxes[:, :2]
    half = boxes[:, 2:] / 2
    limit = boxes.new_tensor([*size, *size])

    return torch.minimum(
        (torch.cat([centre - half, centre + half], dim=1) * limit).clamp(min=0), limit
    )


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Compute the hex sha256 over names, types, shapes and bytes of a state dict, sorted by
    name.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())

    return digest.hexdigest()


class Detector(ABC):
    """Represent a loaded detector.

    Subclasses define how a picture is prepared, and how the model runs on a batch of equal shapes.
    """

    feature_dim: int
    num_classes: int  # with background, which is class 0
    class_names: tuple[str, ...] = ()  # background first; empty if unknown

    def __init__(self, model: torch.nn.Module, choice: DetectorChoice) -> None:
        self.choice = choice
        self.model = model.eval().requires_grad_(False)
        # the model moves there with the first picture: asking only for sizes needs no GPU
        self.device = _device(choice.device)

    @abstractmethod
    def prepare(self, image: "Image") -> dict[str, torch.Tensor]:
        """Return the model's inputs for one RGB picture, without a batch dimension."""

    @abstractmethod
    def run(
        self, inputs: dict[str, torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the detections for a batch [B, ..] of pictures of these sizes (width, height)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Describe the detector for a store's manifest: enough to find it again, or to tell it from
        another.
        """

    @torch.inference_mode()
    def detect(self, images: Sequence["Image"]) -> list[Detections]:
        """Return the detections for RGB pictures of any sizes, in order.

        Only pictures that have the same shape after preparation run together. Padding to a common
        shape would be masked in attention, but not in the convolutions before it, so a picture's
        features would depend on the others in its batch.
        """
        self.model.to(self.device)
        prepared = [self.prepare(image) for image in images]
        groups: dict[Any, list[int]] = {}

        for number, inputs in enumerate(prepared):
            groups.setdefault(tuple(inputs[name].shape for name in sorted(inputs)), []).append(
                number
            )

        found: dict[int, Detections] = {}
        for numbers in groups.values():
            batch = {
                name: torch.stack([prepared[n][name] for n in numbers]).to(self.device)
                for name in prepared[numbers[0]]
            }
            found.update(
                zip(numbers, self.run(batch, [images[n].size for n in numbers]), strict=True)
            )

        return [found[number] for number in range(len(images))]

    def _collect(
        self, scores: torch.Tensor, dist: torch.Tensor, features: torch.Tensor, boxes: torch.Tensor
    ) -> Detections:
        """Sort one picture's tensors [Q, ..] by score, and keep the `soft_labels` most likely
        classes of each region.
        """
        order = scores.sort(descending=True, stable=True).indices
        probs, ids = dist[order].sort(dim=-1, descending=True, stable=True)
        keep = min(self.choice.soft_labels, dist.shape[-1])
        arrays = (
            features[order],
            boxes[order],
            ids[:, :keep].int(),
            probs[:, :keep],
            scores[order],
        )

        return Detections(*(array.cpu().numpy() for array in arrays))


class TransformersDetector(Detector):
    """Run a model of AutoModelForObjectDetection; a region's feature is the last decoder state of
    its query.

    Models with one more logit than labels, and those whose config has `use_focal_loss: false`, were
    trained with softmax and have "no object" last; all others with a sigmoid for each class.
    """

    def __init__(self, choice: DetectorChoice) -> None:
        from transformers import AutoModelForObjectDetection

        self.processor, model = load_pretrained(
            AutoModelForObjectDetection,
            "--detector",
            choice.name,
            choice.revision,
            "an object detection model",
            "a name on the hub, or torchvision:NAME",
        )
        super().__init__(model, choice)
        self.takes = set(inspect.signature(model.forward).parameters)
        self._probe()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Learn the output sizes from a blank picture.

        Raises UsageError unless the model returns logits, a box and a decoder state for each query.
        """
        from PIL.Image import new

        where = f"--detector {self.choice.name}: {type(self.model).__name__}"
        try:
            output = self.model(
                **{
                    name: value[None]
                    for name, value in self.prepare(new("RGB", PROBE_SIZE)).items()
                }
            )
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{where} fails on a blank picture as its image processor prepares it ({error})"
            ) from error

        logits, states, boxes = (
            getattr(output, key, None) for key in ("logits", "last_hidden_state", "pred_boxes")
        )
        if (
            logits is None
            or states is None
            or boxes is None
            or boxes.shape[-1] != 4
            or states.shape[1] < logits.shape[1]
        ):
            raise UsageError(
                f"{where} does not return logits, a box of four numbers and a decoder state for"
                " each query; choose a DETR-like model"
            )

        if getattr(output, "order_logits", None) is not None:
            raise UsageError(
                f"{where} sorts its boxes, but not the states of its queries, so boxes would get"
                " the features of other regions; choose another model"
            )

        labels = self.model.config.num_labels
        self.softmax = logits.shape[-1] == labels + 1 or not getattr(
            self.model.config, "use_focal_loss", True
        )
        self.num_classes = logits.shape[-1] + (0 if self.softmax else 1)
        self.feature_dim = states.shape[-1]
        names = self.model.config.id2label
        self.class_names = (
            BACKGROUND,
            *(str(names.get(number, number)) for number in range(self.num_classes - 1)),
        )

    def prepare(self, image: "Image") -> dict[str, torch.Tensor]:
        """Return pixel values [3, h, w] and, if the model takes it, the mask [h, w] of pixels that
        are not padding.
        """
        inputs = self.processor(images=[image], return_tensors="pt")
        return {
            name: value[0]
            for name, value in inputs.items()
            if name in self.takes and isinstance(value, torch.Tensor)
        }

    def run(
        self, inputs: dict[str, torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return the model's queries of each picture as detections.

        Models without a decoder (YOLOS) have their queries after the picture's patches.
        """
        output = self.model(**inputs)
        dist, scores = class_distribution(output.logits, self.softmax)
        states = output.last_hidden_state[:, -dist.shape[1] :]
        rows = zip(scores, dist, states, output.pred_boxes, sizes, strict=True)

        return [self._collect(s, d, f, pixel_boxes(boxes, size)) for s, d, f, boxes, size in rows]

    def describe(self) -> dict[str, Any]:
        """Return the name (of a folder: its last part), commit on the hub, class, size of prepared
        pictures and hash of the weights.
        """
        return {
            **describe_model(self.choice.name, self.choice.revision, self.model),
            "size": _plain(self.processor.size),
            "preparation": type(self.processor).__name__,
        }


def load_pretrained(
    kind: Any,
    flag: str,
    name: str,
    revision: str,
    expected: str,
    others: str,
    unused: str = "",
) -> tuple[Any, torch.nn.Module]:
    """Load the image processor and the model that a flag names, of a kind such as AutoModel.

    Parameters with `unused` in their names may be absent. Raises UsageError, saying what the flag
    expects and what `others` it takes, if transformers cannot load the model or not all of it.
    """
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"revision": revision} if revision else {}

    try:
        # Always Pillow: torchvision resizes differently, and features must not depend on what is
        # installed.
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **where)
        model, info = kind.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **where
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{flag} {name}: not {expected} that transformers can load ({reason}); give a folder of"
            f" save_pretrained with its image processor, {others}"
        ) from error

    missing = [key for key in info["missing_keys"] if not unused or unused not in key]
    absent = sorted(missing) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if absent:
        raise UsageError(
            f"{flag} {name}: {len(absent)} parameters are missing or of a wrong shape, first"
            f" {absent[0]}"
        )

    return processor, model


def describe_model(name: str, revision: str, model: torch.nn.Module) -> dict[str, Any]:
    """Return the name of a model of transformers (of a folder: its last part), its commit on the
    hub, class and the hash of its weights.
    """
    from transformers import __version__
    from transformers.utils import cached_file

    folder = Path(name)
    commit = getattr(model.config, "_commit_hash", None) or revision
    file = cached_file(
        name,
        WEIGHTS_FILE,
        revision=commit or None,
        _raise_exceptions_for_missing_entries=False,
    )

    return {
        "name": folder.resolve().name if folder.is_dir() else name,
        "revision": commit,
        "model": type(model).__name__,
        "weights_sha256": file_sha256(file) if file else state_sha256(model.state_dict()),
        "weights_hashed": WEIGHTS_FILE if file else "state dict",
        "transformers": __version__,
    }


def _plain(size: Any) -> dict[str, int]:
    """Return the entries of an image processor's size that are set."""
    return {key: value for key, value in dict(size).items() if value is not None}


def _device(name: str) -> torch.device:
    """Return the device that --device names; raise UsageError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu")
    return torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )
