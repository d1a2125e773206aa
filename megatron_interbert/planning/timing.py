"""Predict the time of a training step by arithmetic: products, communication, update.

Products run at a stated share of the device's peak, everything else at the bandwidth of its
memory; collectives are rings over the slowest link of their group; nothing of them is hidden unless
`overlap` says so. `tools/benchmark.py layouts` compares the prediction with steps of two or four
CPU processes. For GPUs it rests on the figures of `MACHINES`, which are datasheets' and other
people's measurements: a comparison of layouts, no promise.
"""

import math
from dataclasses import dataclass

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.flops import Tokens, forward_flops
from megatron_interbert.planning.layout import (
    ADAM,
    FP32,
    ON_DEVICE,
    ON_DISK,
    Layout,
    divisions_of,
    parameters_of,
    share_of_rank,
    update_groups,
)
from megatron_interbert.planning.traffic import data_traffic, expert_traffic, tensor_traffic

# bytes that an update moves per parameter of a rank's share: weight, moments and gradient are read
# and written, the weights of the passes written
UPDATE_BYTES = 30
# how often DeepSpeed reads or writes all gradients or weights of a rank beside that: into and out
# of buckets, division, norm, clipping, new weights
ENGINE_PASSES = 12
# elements per token and hidden unit that a layer reads or writes outside of its products, forward
# and backward: in norms, residuals and their dropout, which all tensor-parallel ranks compute,
# unless rows are split; in attention and the activation of the MLP, which they share
WHOLE_ROWS = 16
SHARED_ROWS = 32


@dataclass(frozen=True)
class Machine:
    """Describe a device and its links. Bandwidths are of one device, in one direction."""

    tflops: float  # dense peak in the dtype of the passes
    memory_gib: float
    memory_gb_s: float
    link_gb_s: float  # between devices of a node, as collectives reach it
    network_gb_s: float  # between nodes, a device's share
    per_node: int = 8
    efficiency: float = 0.45  # share of the peak that the passes reach alone
    latency: float = 10e-6  # seconds from one device to another
    overlap: float = 0.0  # share of ZeRO's communication that the backward pass hides
    host_link_gb_s: float = 25.0  # between a device and its host
    host_gb_s: float = 40.0  # a device's share of the host's memory, for an update there
    disk_gb_s: float = 3.0  # a device's share of the host's disks
    # how many times the seconds of a ring an operation takes: 1 with NCCL, more with gloo
    all_gather_slower: float = 1.0
    reduce_scatter_slower: float = 1.0

    def seconds(self, operation: str, given: float, ranks: int, gb_s: float) -> float:
        """Return the seconds of a collective of ranks that contribute `given` bytes each."""
        slower = {
            "all_gather": self.all_gather_slower,
            "reduce_scatter": self.reduce_scatter_slower,
        }

        return ring_seconds(operation, given, ranks, gb_s) * slower.get(operation, 1.0)


# Peaks and memory are from datasheets. Links: what large all-reduces reach by public measurements.
MACHINES = {
    "h100": Machine(989.0, 80.0, 3350.0, 360.0, 40.0, host_link_gb_s=50.0),
    "h200": Machine(989.0, 141.0, 4800.0, 360.0, 40.0, host_link_gb_s=50.0),
    "a100": Machine(312.0, 80.0, 2039.0, 230.0, 20.0),
    "a100-40": Machine(312.0, 40.0, 1555.0, 230.0, 20.0),
    # without NVLink: over PCIe 4
    "l40s": Machine(362.0, 48.0, 864.0, 12.0, 10.0),
    "rtx4090": Machine(165.0, 24.0, 1008.0, 10.0, 3.0),
}


@dataclass(frozen=True)
class StepTime:
    """Hold the seconds of a step: passes, communication of tensor-parallel, data-parallel and
    expert-parallel groups (what is not hidden), update, and what offload moves to and from host and
    disk.
    """

    compute: float
    tensor: float
    data: float
    update: float
    offload: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        passes = self.compute + self.tensor + self.expert
        return passes + self.data + self.update + self.offload


def step_time(
    sizes: ModelConfig, layout: Layout, micro_batches: list[Tokens], machine: Machine
) -> StepTime:
    """Predict the time of a step of these micro-batches on each data-parallel rank."""
    passes = 4 if layout.recompute else 3
    flops = passes * sum(forward_flops(sizes, tokens) for tokens in micro_batches)
    products = flops / layout.tensor / (machine.tflops * 1e12 * machine.efficiency)
    others = sum(other_bytes(sizes, layout, tokens) for tokens in micro_batches)
    compute = products + others / (machine.memory_gb_s * 1e9)
    parameters = parameters_of(sizes, layout)
    copied = 0 if layout.shares_nothing else ENGINE_PASSES * layout.element * parameters
    share = parameters if layout.zero_stage == 0 else share_of_rank(sizes, layout)
    updated_at = machine.memory_gb_s if layout.optimizer_on == ON_DEVICE else machine.host_gb_s

    return StepTime(
        compute,
        tensor_seconds(sizes, layout, micro_batches, machine),
        data_seconds(sizes, layout, len(micro_batches), machine) * (1 - machine.overlap),
        copied / (machine.memory_gb_s * 1e9) + UPDATE_BYTES * share / (updated_at * 1e9),
        offload_seconds(layout, share, len(micro_batches), machine),
        expert_seconds(sizes, layout, micro_batches, machine),
    )


def other_bytes(sizes: ModelConfig, layout: Layout, tokens: Tokens) -> float:
    """Return the bytes that a micro-batch's passes move outside of matrix products."""
    rows = sum(layers * count for layers, count, _, _ in tokens.stacks(sizes))
    each = WHOLE_ROWS / layout.sharing + SHARED_ROWS / layout.tensor
    again = 4 / 3 if layout.recompute else 1.0

    return again * rows * each * sizes.hidden_size * layout.element


def offload_seconds(layout: Layout, share: float, micro_batches: int, machine: Machine) -> float:
    """Return the seconds in which a rank's share of the state moves between device, host and disk;
    nothing of it is hidden.
    """
    passed = layout.element * share
    by_link = 0.0
    by_disk = 0.0

    if layout.optimizer_on != ON_DEVICE:
        by_link += 2 * passed  # gradients there, weights back
    if layout.optimizer_on == ON_DISK:
        by_disk += 2 * (2 * FP32 + ADAM) * share  # read and written
    if layout.parameters_on != ON_DEVICE:
        by_link += 2 * micro_batches * passed  # for the forward and the backward pass
    if layout.parameters_on == ON_DISK:
        by_disk += (2 * micro_batches + 1) * passed

    return by_link / (machine.host_link_gb_s * 1e9) + by_disk / (machine.disk_gb_s * 1e9)


def tensor_seconds(
    sizes: ModelConfig, layout: Layout, micro_batches: list[Tokens], machine: Machine
) -> float:
    """Return the seconds of a step's collectives among tensor-parallel ranks: neighbours."""
    ranks = layout.tensor
    if ranks == 1:
        return 0.0

    bandwidth = machine.link_gb_s if ranks <= machine.per_node else machine.network_gb_s
    layers = sizes.interaction_layers + sizes.text_layers + sizes.image_layers
    calls = layers * (6 if layout.recompute else 4) * (2 if layout.sequence_parallel else 1)
    total = 0.0

    for tokens in micro_batches:
        given = tensor_traffic(sizes, layout, tokens)
        total += sum(
            machine.seconds(operation, count, ranks, bandwidth)
            for (operation, _), count in given.items()
        )

    return total + len(micro_batches) * calls * hops(ranks) * machine.latency


def expert_seconds(
    sizes: ModelConfig, layout: Layout, micro_batches: list[Tokens], machine: Machine
) -> float:
    """Return the seconds of a step's exchanges among expert-parallel ranks: neighbours."""
    ranks = layout.expert
    if ranks == 1:
        return 0.0

    # of all rows, those for experts on other nodes pass the network
    away = max(0.0, 1 - machine.per_node / ranks)
    given = sum(sum(expert_traffic(sizes, layout, t).values()) for t in micro_batches)
    inside = given * (1 - 1 / ranks - away) / (machine.link_gb_s * 1e9)
    layers = sum(getattr(sizes, f"{s}_layers") for s in sizes.STACKS if sizes.has_experts(s))
    calls = len(micro_batches) * layers * (8 if layout.recompute else 5)

    return inside + given * away / (machine.network_gb_s * 1e9) + calls * ranks * machine.latency


def data_seconds(sizes: ModelConfig, layout: Layout, micro_batches: int, machine: Machine) -> float:
    """Return the seconds of a step's collectives among ranks that share the state of parameters."""
    ranks = max(part.ranks for part in divisions_of(sizes, layout))
    if ranks == 1:
        return 0.0

    inside = layout.tensor * layout.data <= machine.per_node
    bandwidth = machine.link_gb_s if inside else machine.network_gb_s
    members = {"data": layout.data, "expert_data": layout.expert_data}
    calls = math.ceil(parameters_of(sizes, layout) / layout.bucket) + updates(sizes, layout)
    moved = 0.0
    for (operation, group), count in data_traffic(sizes, layout, micro_batches).items():
        if group == "secondary":  # the ranks of a node
            moved += machine.seconds(operation, count, layout.secondary, machine.link_gb_s)
        else:
            moved += machine.seconds(operation, count, members[group], bandwidth)

    return moved + calls * hops(ranks) * machine.latency


def updates(sizes: ModelConfig, layout: Layout) -> int:
    """Count the groups of parameters that a step updates one after another."""
    if layout.zero_stage < 3:
        found = update_groups(sizes, layout.tensor, layout.data, layout.expert)
        return sum(len(groups) for _, groups in found)

    return math.ceil(parameters_of(sizes, layout) / layout.sub_group)


def hops(ranks: int) -> int:
    """Return the steps after which a collective has reached all ranks and come back, by a tree."""
    return 2 * math.ceil(math.log2(ranks))


def ring_seconds(operation: str, given: float, ranks: int, gb_s: float) -> float:
    """Return the seconds of a collective as a ring of ranks that contribute `given` bytes each."""
    steps = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "reduce_scatter": (ranks - 1) / ranks,
        "all_gather": ranks - 1,
    }

    return given * steps[operation] / (gb_s * 1e9)
