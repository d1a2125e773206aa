"""View weights as those of another model: dense layers as experts, or shared layers as layers of
their own.

Nothing is read or computed until a tensor is asked for.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import draw_normal
from megatron_interbert.model.partition import joined
from megatron_interbert.weights.expert_tensors import Read, cut
from megatron_interbert.weights.sources import WeightSource
from megatron_interbert.weights.tensor_files import TensorLayout

LAYER = re.compile(r"(interaction|text|image)(?:_stream)?\.layers\.(\d+)\.(.*)")
MLP = re.compile(r"mlp\.(up|down)\.(weight|bias)")
OWN_HEADS = ("task_heads.", "mrfr_head.", "attribute_head.")
# of the logits of new routers, for inputs of a LayerNorm with gain 1: almost uniform choices
SPREAD = 1e-3


def without_own_heads(source: WeightSource) -> WeightSource:
    """View weights without the heads that only our checkpoints have, those of downstream tasks and
    further objectives; a note says which are left out.
    """
    own = [name for name in source.layouts if name.startswith(OWN_HEADS)]
    if not own:
        return source

    heads = dict.fromkeys(".".join(name.split(".")[: 1 + name.startswith("task")]) for name in own)
    layouts = {name: entry for name, entry in source.layouts.items() if name not in own}
    note = f"note: left out: {', '.join(heads)}, for which only --to sharded has a place"

    return dataclasses.replace(source, layouts=layouts, notes=[*source.notes, note])


def divided_into_experts(
    source: WeightSource, experts: int, prototypes: int, stacks: str, seed: int = 0
) -> WeightSource:
    """View a dense model as one with experts, which begins with the same outputs ("upcycling").

    Every expert is a copy of its layer's MLP. A token gets k of them, each with the weight k / E,
    so the second matrix is multiplied by E / k^2. Routers start with gates near 0, whose logits
    spread by about SPREAD; the loss of the first step differs by less than that. Raises UsageError
    if the model has experts already.
    """
    if source.config.experts:
        raise UsageError(
            f"{source.path}: its model has {source.config.experts} experts already; only dense"
            " models can be divided into experts"
        )

    config = dataclasses.replace(
        source.config, experts=experts, prototypes=prototypes, expert_stacks=stacks
    )
    dense: dict[str, str] = {}  # name of an expert parameter -> of the dense one
    layouts: dict[str, TensorLayout] = {}

    for name, entry in source.layouts.items():
        layer = LAYER.fullmatch(name)
        if not layer or not MLP.fullmatch(layer[3]) or not config.has_experts(layer[1]):
            layouts[name] = entry
            continue

        if layer[3] == "mlp.up.weight":
            router = name.replace(".up.", ".router.")
            layouts[router] = TensorLayout(entry.dtype, (experts, config.hidden_size))
        whole = name.replace(".mlp.", ".mlp.experts.")
        dense[whole] = name
        layouts[whole] = TensorLayout(entry.dtype, (experts, *entry.shape))

    scale = experts / prototypes**2

    def read(name: str, start: int, length: int) -> torch.Tensor:
        if name in source.layouts:
            return source.read(name, start, length)
        if name not in dense:
            drawn = torch.from_numpy(draw_normal(seed, name, start, length))
            return (drawn * SPREAD / config.hidden_size**0.5).to(layouts[name].dtype)

        size = math.prod(source.layouts[dense[name]].shape)
        copies = [source.read(dense[name], *run) for _, *run in cut(start, length, size)]

        return joined(copies) * (scale if ".down." in name else 1.0)

    return viewed(source, config, layouts, read)


def untied(source: WeightSource) -> WeightSource:
    """View a model that shares one layer in each stack as one with layers of their own, all equal:
    its outputs are the same to the bit. Raises UsageError if it shares none.
    """
    if not source.config.share_layers:
        raise UsageError(
            f"{source.path}: its layers are not shared; only a model trained with --share-layers"
            " can be untied"
        )

    config = dataclasses.replace(source.config, share_layers=False)
    first: dict[str, str] = {}  # name of a parameter -> of the shared one

    for name in source.layouts:
        layer = LAYER.fullmatch(name)
        depth = getattr(config, f"{layer[1]}_layers") if layer else 1
        for number in range(depth):
            own = name.replace(".layers.0.", f".layers.{number}.")
            first[own] = name

    layouts = {own: source.layouts[name] for own, name in first.items()}

    return viewed(source, config, layouts, lambda name, *run: source.read(first[name], *run))


def with_answers(source: WeightSource, head: str, answers: Sequence[str]) -> WeightSource:
    """View the head of a task as one for other answers: those that both have keep their outputs,
    and the outputs of others are 0 (LXMERT).
    """
    theirs = {a: row for row, a in enumerate(source.facts["task_heads"][head]["answers"])}
    rows = torch.tensor([theirs.get(answer, -1) for answer in answers])
    names = [f"task_heads.{head}.output.{kind}" for kind in ("weight", "bias")]
    layouts = dict(source.layouts)
    for name in names:
        entry = layouts[name]
        layouts[name] = TensorLayout(entry.dtype, (len(answers), *entry.shape[1:]))

    def read(name: str, start: int, length: int) -> torch.Tensor:
        if name not in names:
            return source.read(name, start, length)
        whole = source.get(name)
        moved = whole[rows.clamp(min=0)] * (rows >= 0).view(-1, *[1] * (whole.dim() - 1))
        return moved.flatten()[start : start + length]

    known = int((rows >= 0).sum())
    note = (
        f"note: the {head} head of {source.path} knows {known} of the {len(answers)} answers; the"
        " others begin at 0"
    )

    return viewed(
        dataclasses.replace(source, notes=[*source.notes, note]), source.config, layouts, read
    )


def viewed(
    source: WeightSource, config: ModelConfig, layouts: dict[str, TensorLayout], read: Read
) -> WeightSource:
    """Return a source of another model, whose tensors `read` returns."""

    def get(name: str) -> torch.Tensor:
        shape = layouts[name].shape
        return read(name, 0, math.prod(shape)).view(shape)

    return dataclasses.replace(source, config=config, layouts=layouts, get=get, read=read)
