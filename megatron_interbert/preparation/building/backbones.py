"""Run vision backbones of transformers on whole pictures.

Legend: D feature size, h, w cells of the whole input, p the side of a cell in input pixels.
"""

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.detectors import (
    PROBE_SIZE,
    DetectorChoice,
    describe_model,
    load_pretrained,
)
from megatron_interbert.preparation.building.extents import Extent, cropped, padded

if TYPE_CHECKING:
    from PIL.Image import Image

FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError)
STAGES = 6  # in which a model may join patches, two a side
MOST_OTHERS = 16  # tokens that are no patches: [CLS], registers
BILINEAR = 2  # of Pillow's filters


class Backbone:
    """Run a vision model of transformers on whole pictures, and return its cells as a map.

    `grid` (rows, columns) sets the size of the input; `pool` is how many cells a side are averaged
    into one.
    """

    def __init__(self, choice: DetectorChoice) -> None:
        from transformers import AutoModel

        self.choice = choice
        self.processor, model = load_pretrained(
            AutoModel,
            "--backbone",
            choice.backbone,
            choice.backbone_revision,
            "a vision model",
            "or a name on the hub",
            unused="pool",
        )
        # of models of images and texts, the half that sees
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)

        takes = set(inspect.signature(self.model.forward).parameters)
        self.options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        )
        self._probe()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Learn the input's size, the cells and the feature size from a small picture.

        Raises UsageError if the model cannot read one, or gives other cells than asked for.
        """
        where = f"--backbone {self.choice.backbone}: {type(self.model).__name__}"

        try:
            self.size = self._usual_size()
            self.cell = self._cell_side()
            self.size = self._chosen_size()
            inputs, _ = self.prepare(probe_picture())
            found, again = self.maps(inputs[None]), self.maps(inputs[None])
        except UsageError:
            raise
        except FAILURES as error:
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"{where} fails on a small picture ({reason})") from error

        self.feature_dim = found.shape[1]
        self.grid = (found.shape[2], found.shape[3])
        if self.choice.grid and self.grid != self.choice.grid:
            raise UsageError(
                f"{where} gives {self.grid[0]} x {self.grid[1]} cells instead of --grid"
                f" {self.choice.grid[0]}x{self.choice.grid[1]}; give another grid"
            )
        if not torch.equal(found, again):
            raise UsageError(
                f"{where} gives other features each time it sees the same picture; choose another"
                " model"
            )

    def _chosen_size(self) -> tuple[int, int]:
        """Return the height and width of inputs that give the wanted cells; raises UsageError if
        the usual input does not divide into whole ones.
        """
        pooled = self.cell * self.choice.pool
        rows, columns = self.choice.grid or (0, 0)
        size = (rows * pooled, columns * pooled) if rows else self.size

        if any(side % pooled for side in size):
            raise UsageError(
                f"--backbone {self.choice.backbone}: an input of {size[0]} x {size[1]} pixels does"
                f" not divide into cells of {self.cell} pixels, {self.choice.pool} a side; give"
                " --grid HxW"
            )

        return size

    def _cell_side(self) -> int:
        """Return the pixels of a cell's side, from what the model gives for its usual input.

        Of a row of tokens the side is the patches' own or, in models that join patches in stages,
        so many times larger that nearly all tokens are cells.
        """
        height, width = self.size
        inputs, _ = self.prepare(probe_picture())
        states = self.model(pixel_values=inputs[None], **self.options).last_hidden_state
        if states.dim() == 4:
            return -(-height // states.shape[2])

        patch = getattr(self.model.config, "patch_size", None)
        sides = [patch * 2**stage for stage in range(STAGES)] if isinstance(patch, int) else []
        tokens = states.shape[1]
        for side in sides:
            if 0 <= tokens - (height // side) * (width // side) <= MOST_OTHERS:
                return side

        raise ValueError(f"{tokens} tokens are no grid of patches")

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
        given = getattr(self.processor, "resample", None)
        return BILINEAR if given is None else int(given)

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
        return {
            **describe_model(self.choice.backbone, self.choice.backbone_revision, self.model),
            "input": list(self.size),
            "grid": list(self.grid),
            "pool": self.choice.pool,
            "resize": self.choice.resize,
            "preparation": type(self.processor).__name__,
        }


def probe_picture() -> "Image":
    """Return a picture of noise, in which no two places look the same."""
    from PIL.Image import fromarray

    width, height = PROBE_SIZE
    return fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
