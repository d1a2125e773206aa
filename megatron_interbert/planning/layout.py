"""Describe how a model is trained and on what, as input to all predictions."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.construction import on_meta
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import is_expert, is_matrix, partition_dimension
from megatron_interbert.parallel.shared_weights import unit_of
from megatron_interbert.parallel.state import ParallelState

BUCKET = 50_000_000  # most gradients that are reduced at once
SUB_GROUP = 100_000_000  # about as many parameters are updated at once, or more: see update_size
LIVE = 1_000_000_000  # most parameters that stage 3 keeps gathered
SWAP_BUFFERS = 4  # pinned, each of a group of the update, to read and write a disk
PARAMETER_BUFFERS = 5  # pinned, each of a parameter, to read and write a disk
IN_MEMORY = 1_000_000_000  # most parameters of a rank that have a place on its host beside the disk
PREFETCH = 50_000_000  # most parameters that stage 3 gathers at once, unless one is larger
# bytes per parameter: of an fp32 value, and of its two Adam moments
FP32 = 4
ADAM = 8
# where parts of the state are, in the words of DeepSpeed's JSON
ON_DEVICE = "none"
ON_HOST = "cpu"
ON_DISK = "nvme"


@dataclass(frozen=True)
class Layout:
    """Describe how a model is trained. `fused`: by Triton's kernels, else by those for CPUs."""

    data: int = 1
    tensor: int = 1
    expert: int = 1  # ranks that divide the experts
    zero_stage: int = 1
    half: bool = False  # 16-bit forward and backward passes
    fused: bool = False
    recompute: bool = False
    sequence_parallel: bool = False
    loss_scale: bool = False  # fp16
    accumulates: bool = False  # a step has several micro-batches
    averaged: bool = False  # an exponential moving average of the weights is kept
    copied: int = 0  # bytes of a parameter in the copy that evaluations need; 0: there is none
    optimizer_on: str = ON_DEVICE  # where ZeRO keeps fp32 weights and moments
    parameters_on: str = ON_DEVICE
    # parameters that DeepSpeed takes at once; its JSON may change them
    bucket: int = BUCKET
    sub_group: int = SUB_GROUP
    live: int = LIVE
    prefetch: int = PREFETCH
    swap_buffers: int = SWAP_BUFFERS
    parameter_buffers: int = PARAMETER_BUFFERS
    in_memory: int = IN_MEMORY
    parameter_buffer: int = 0  # elements of each; 0: a rank's share of the largest parameter
    secondary: int = 0  # ranks of a group that holds all weights once more (hpZ); 0: no group does

    @property
    def expert_data(self) -> int:
        """Return how many ranks hold the same experts, and share their training state."""
        return self.data * self.tensor // self.expert

    @property
    def shares_nothing(self) -> bool:
        """Check whether ranks share no training state; see training/update.py."""
        alone = self.data == 1 and not (self.loss_scale or self.offloads)
        return self.zero_stage == 0 or alone

    @property
    def offloads(self) -> bool:
        """Check whether a part of the state is not on the device."""
        return (self.optimizer_on, self.parameters_on) != (ON_DEVICE, ON_DEVICE)

    @property
    def shares_copy(self) -> bool:
        """Check whether ranks share the copy of the weights that evaluations need; see
        training/evaluation_copy.py.
        """
        return keeps_parts(self.zero_stage, self.data, self.parameters_on)

    @property
    def sharing(self) -> int:
        """Return how many ranks share the activations between a layer's tensor-parallel parts."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def element(self) -> int:
        """Return the bytes of a value in the forward and backward passes."""
        return 2 if self.half else FP32


def keeps_parts(zero_stage: int, data: int, parameters_on: str) -> bool:
    """Check whether a rank keeps the weights in parts, or away from the device, between uses."""
    return zero_stage == 3 and (data > 1 or parameters_on != ON_DEVICE)


@dataclass(frozen=True)
class Load:
    """Describe a micro-batch: samples, mean words and regions per sample, and the longest."""

    samples: int
    words: float = 14.0  # with [CLS] and [SEP]
    regions: float = 36.0
    longest_words: int = 0  # 0: as the mean
    longest_regions: int = 0
    masked: float = 0.15
    # predicted words and regions per sample, where they are known
    word_targets: float | None = None
    region_targets: float | None = None


def targets_of(load: Load) -> tuple[float, float]:
    """Return how many words and regions of a sample are predicted, on average."""
    words = max(1.0, load.masked * load.words)
    regions = max(1.0, load.masked * load.regions) / 2

    return (
        words if load.word_targets is None else load.word_targets,
        regions if load.region_targets is None else load.region_targets,
    )


@functools.cache
def rank_shapes(sizes: ModelConfig, tensor: int, expert: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the trained parameters, by name, on one of `tensor` tensor-parallel and
    `expert` expert-parallel ranks.
    """
    sizes.check_tensor_parallel(tensor)
    sizes.check_expert_parallel(expert)
    model = on_meta(lambda: InterBert(sizes, state=ParallelState(alone=True)))

    def here(name: str, shape: Sequence[int]) -> tuple[int, ...]:
        ranks = expert if is_expert(name) else tensor
        cut = partition_dimension(name)
        return tuple(size // ranks if axis == cut else size for axis, size in enumerate(shape))

    return {name: here(name, parameter.shape) for name, parameter in model.named_parameters()}


@functools.cache
def rank_parameters(sizes: ModelConfig, tensor: int, expert: int = 1) -> int:
    """Count the trained parameters on one of `tensor` tensor-parallel and `expert` expert-parallel
    ranks.
    """
    return sum(map(math.prod, rank_shapes(sizes, tensor, expert).values()))


@dataclass(frozen=True)
class Division:
    """Hold parameters of a rank whose gradients are summed over the same ranks, which share their
    state: of each its elements, and whether its weights decay. `group`: "data" or "expert_data".
    """

    parameters: tuple[tuple[int, bool], ...]
    ranks: int
    group: str = "data"

    @property
    def elements(self) -> int:
        """Return the elements of all parameters."""
        return sum(count for count, _ in self.parameters)


@functools.cache
def divisions(sizes: ModelConfig, tensor: int, data: int, expert: int = 1) -> list[Division]:
    """Return the divisions of a rank's parameters: experts are apart where several ranks of a
    tensor-parallel or expert-parallel group hold different rows or experts.
    """
    apart = tensor * expert > 1
    kinds: dict[bool, list[tuple[int, bool]]] = {}

    for name, shape in rank_shapes(sizes, tensor, expert).items():
        entry = (math.prod(shape), is_matrix(name, shape))
        kinds.setdefault(apart and is_expert(name), []).append(entry)

    found = [Division(tuple(kinds[False]), data)]
    if True in kinds:
        found.append(Division(tuple(kinds[True]), data * tensor // expert, "expert_data"))

    return found


def divisions_of(sizes: ModelConfig, layout: Layout) -> list[Division]:
    """Return the divisions of a rank's parameters in a layout."""
    return divisions(sizes, layout.tensor, layout.data, layout.expert)


def parameters_of(sizes: ModelConfig, layout: Layout) -> int:
    """Count the trained parameters on a rank of a layout."""
    return rank_parameters(sizes, layout.tensor, layout.expert)


def share_of_rank(sizes: ModelConfig, layout: Layout) -> float:
    """Return the elements whose training state a rank keeps with ZeRO."""
    return sum(division.elements / division.ranks for division in divisions_of(sizes, layout))


def grouped(parameters: Iterable[tuple[int, bool]], most: int) -> list[list[int]]:
    """Return the elements of parameters in groups that are full at `most`, as training/optimizer.py
    makes them; for each parameter its elements, and whether its weights decay.
    """
    groups: list[list[int]] = []
    filling: dict[bool, list[int]] = {}

    for count, decays in parameters:
        group = filling.get(decays)
        if group is None or sum(group) >= most:
            group = filling[decays] = []
            groups.append(group)

        group.append(count)

    return groups


def kept_with_parts(groups: list[list[int]], ranks: int) -> int:
    """Count the elements of the parameters of which a data-parallel rank updates at least a part,
    on the rank with the most: ZeRO cuts a group into `ranks` equal parts, across parameters.
    """
    changes: Counter[int] = Counter()  # from one rank to the next

    for group in groups:
        part = math.ceil(sum(group) / ranks)
        start = 0
        for count in group:
            changes[start // part] += count
            changes[(start + count - 1) // part + 1] -= count
            start += count

    return max(itertools.accumulate(changes[rank] for rank in sorted(changes)))


def update_size(parts: Sequence[Division]) -> int:
    """Return the elements at which a group of the optimizer is full, at ZeRO stages 1 and 2.

    A rank keeps the whole gradient of a parameter even if it updates only a part of it, so many
    small groups cost memory. So do large groups, whose gradients are joined and converted to fp32
    together. Of the sizes tried, the one returned needs the least for both.
    """
    if all(part.ranks == 1 for part in parts):
        return SUB_GROUP

    def cost(size: int) -> float:
        divided = [(grouped(part.parameters, size), part.ranks) for part in parts]
        kept = sum(kept_with_parts(groups, ranks) for groups, ranks in divided)
        updated = max(sum(group) / ranks for groups, ranks in divided for group in groups)
        return 2 * kept + (2 + FP32) * updated  # in 16-bit passes

    return min((round(SUB_GROUP * 1.25**step) for step in range(32)), key=cost)


@functools.cache
def update_groups(
    sizes: ModelConfig, tensor: int, data: int, expert: int = 1
) -> list[tuple[Division, list[list[int]]]]:
    """Return the elements of each parameter in the optimizer's groups, for each division, on one of
    `tensor` tensor-parallel and `expert` expert-parallel ranks, at ZeRO stages 1 and 2 with `data`
    data-parallel ranks.
    """
    parts = divisions(sizes, tensor, data, expert)
    most = update_size(parts)

    return [(part, grouped(part.parameters, most)) for part in parts]


@functools.cache
def partly_updated(sizes: ModelConfig, tensor: int, data: int, expert: int = 1) -> int:
    """Count the elements of the parameters of which a rank updates at least a part, on the rank
    with the most.
    """
    found = update_groups(sizes, tensor, data, expert)
    return sum(kept_with_parts(groups, part.ranks) for part, groups in found)


@functools.cache
def updated_at_once(sizes: ModelConfig, tensor: int, data: int, expert: int = 1) -> float:
    """Return the elements that a rank updates of the group of which it updates the most."""
    found = update_groups(sizes, tensor, data, expert)
    return max(sum(group) / part.ranks for part, groups in found for group in groups)


@functools.cache
def largest_parameter(sizes: ModelConfig, tensor: int, expert: int = 1) -> int:
    """Count the elements of the largest trained parameter on a rank."""
    return max(map(math.prod, rank_shapes(sizes, tensor, expert).values()))


@functools.cache
def largest_share(sizes: ModelConfig, tensor: int, data: int, expert: int = 1) -> int:
    """Count the elements that a rank keeps of a parameter at ZeRO stage 3, of that of which it
    keeps the most.
    """
    return max(
        math.ceil(count / part.ranks)
        for part in divisions(sizes, tensor, data, expert)
        for count, _ in part.parameters
    )


@functools.cache
def largest_unit(sizes: ModelConfig, tensor: int) -> int:
    """Count the parameters of the largest unit in which shared weights are gathered, with all
    experts.
    """
    units: dict[str, int] = {}
    for name, shape in rank_shapes(sizes, tensor).items():
        units[unit_of(name)] = units.get(unit_of(name), 0) + math.prod(shape)

    return max(units.values())
