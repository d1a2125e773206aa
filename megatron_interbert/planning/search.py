"""Find the layouts of a model that fit given devices, and say why the others do not."""

import itertools
import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.planning.layout import ON_DEVICE, ON_DISK, ON_HOST, Layout, Load
from megatron_interbert.planning.memory import Memory, largest_micro_batch, predict

GIB = 2**30
MOST = 1 << 16  # largest micro-batch that is tried
PARTS = {  # of a rank's memory, as messages call them
    "weights": "weights",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "copy": "copy of the weights for --eval-precision",
}
# (optimizer, parameters): what of the state is where, the fastest first
PLACES = (
    (ON_DEVICE, ON_DEVICE),
    (ON_HOST, ON_DEVICE),
    (ON_HOST, ON_HOST),
    (ON_DISK, ON_DEVICE),
    (ON_DISK, ON_DISK),
)
DISTANCES = {ON_DEVICE: 0, ON_HOST: 1, ON_DISK: 2}
# what of a layout a JSON may set beside stage and places
OF_JSON = (
    *("bucket", "sub_group", "live", "prefetch"),
    *("swap_buffers", "parameter_buffers", "parameter_buffer", "in_memory", "secondary"),
)
# the JSON in ds_configs/ by (optimizer, parameters, ZeRO stage)
SHIPPED = {
    (ON_HOST, ON_DEVICE, 2): "zero2_offload_optimizer",
    (ON_HOST, ON_DEVICE, 3): "zero3_offload_optimizer",
    (ON_HOST, ON_HOST, 3): "zero3_offload",
    (ON_DISK, ON_DEVICE, 3): "zero3_nvme_optimizer",
    (ON_DISK, ON_DISK, 3): "zero3_nvme",
}


@dataclass(frozen=True)
class Room:
    """Hold the bytes that a rank may take; `one_memory`: device and host are the same (a CPU)."""

    device: float
    host: float = 0.0
    disk: float = 0.0
    one_memory: bool = False

    def needed(self, memory: Memory) -> float:
        """Return the bytes that a rank needs of its device."""
        return memory.together if self.one_memory else memory.peak

    def filled(self, memory: Memory) -> float:
        """Return the largest share of what there is that a rank needs."""
        shares = [self.needed(memory) / self.device, memory.disk / max(self.disk, 1.0)]
        if not self.one_memory:
            shares.append(memory.host / max(self.host, 1.0))

        return max(shares)

    def shortage(self, memory: Memory) -> str:
        """Return what does not fit, and its largest part; nothing if all does."""
        needed = self.needed(memory)
        if needed > self.device:
            part = max(PARTS, key=lambda name: getattr(memory, name))
            largest = f"{PARTS[part]} {getattr(memory, part) / GIB:.1f}"
            if self.one_memory and memory.host > getattr(memory, part):
                largest = f"offloaded state {memory.host / GIB:.1f}"
            return f"{needed / GIB:.1f} GiB ({largest}) of {self.device / GIB:.1f} GiB"

        if memory.host > self.host and not self.one_memory:
            return f"{memory.host / GIB:.1f} GiB of host memory of {self.host / GIB:.1f} GiB"
        if memory.disk > self.disk:
            return f"{memory.disk / 1e9:.1f} GB of disk of {self.disk / 1e9:.1f} GB"

        return ""


@dataclass(frozen=True)
class Batches:
    """Describe one sample, and batch sizes: 0 for a micro-batch of as many samples as fit, and for
    no limit of the global batch.
    """

    sample: Load
    micro_batch: int = 0
    global_batch: int = 0

    def undivided(self, layout: Layout) -> str:
        """Return why the ranks of a layout cannot share the global batch; "" if they can."""
        share, rest = divmod(self.global_batch, layout.data)
        if rest:
            return (
                f"a global batch of {self.global_batch} is not a multiple of {layout.data}"
                " data-parallel ranks"
            )

        if self.micro_batch and share % self.micro_batch:
            return f"{self.micro_batch} samples do not divide a rank's share of {share}"

        return ""


@dataclass(frozen=True)
class Fit:
    """Hold a layout with its micro-batch, the micro-batches of a step, and what a rank takes."""

    layout: Layout
    samples: int
    steps: int
    memory: Memory


def layouts(sizes: ModelConfig, like: Layout, ranks: int) -> Iterator[Layout]:
    """Yield all layouts of `ranks` in the precision and with the kernels of `like`, the simplest
    first; those with offload come last.
    """
    most = min(ranks, sizes.num_attention_heads)  # each rank needs a head
    refused = dict(refused_tensors(sizes, ranks))
    tensors = [n for n in range(1, most + 1) if ranks % n == 0 and n not in refused]
    stages = (0, 1, 2, 3)

    for (optimizer, parameters), recompute, tensor, expert, stage, split in itertools.product(
        PLACES, (False, True), tensors, expert_sizes(sizes, ranks), stages, (False, True)
    ):
        data = ranks // tensor
        found = replace(
            like,
            data=data,
            tensor=tensor,
            expert=expert,
            zero_stage=stage,
            recompute=recompute,
            sequence_parallel=split,
            optimizer_on=optimizer,
            parameters_on=parameters,
        )
        if is_sensible(found) and (expert == 1 or not found.secondary):
            yield found


def expert_sizes(sizes: ModelConfig, ranks: int) -> list[int]:
    """Return the expert-parallel sizes that `ranks` can have: 1 for a dense model."""
    most = min(ranks, sizes.experts) if sizes.experts else 1
    return [n for n in range(1, most + 1) if ranks % n == 0 and sizes.experts % n == 0]


def refused_tensors(sizes: ModelConfig, ranks: int) -> Iterator[tuple[int, str]]:
    """Yield the tensor-parallel sizes that divide the ranks and not the model, and why."""
    for tensor in range(1, min(ranks, sizes.num_attention_heads) + 1):
        if ranks % tensor == 0:
            try:
                sizes.check_tensor_parallel(tensor)
            except UsageError as error:
                yield tensor, str(error)


def is_sensible(layout: Layout) -> bool:
    """Check whether a layout can be run, and saves something that a simpler one does not."""
    if layout.sequence_parallel and layout.tensor == 1:
        return False
    if layout.zero_stage == 0 and layout.half:
        return False
    if layout.secondary and layout.tensor > 1:
        return False

    shared = layout.data > 1 or layout.parameters_on != ON_DEVICE or ON_DISK in places(layout)
    if layout.offloads:
        return json_key(layout) in SHIPPED and (shared or layout.zero_stage == 2)

    return layout.data > 1 or layout.zero_stage < 2


def fit(sizes: ModelConfig, layout: Layout, wanted: Batches, room: Room) -> Fit | str:
    """Return a layout with its micro-batch and memory; or in words why it is left out."""
    if undivided := wanted.undivided(layout):
        return undivided

    share = wanted.global_batch // layout.data
    samples = micro_batch_of(sizes, layout, wanted, room, share)
    if samples < share:  # gradients of several micro-batches are held: fewer samples may fit
        layout = replace(layout, accumulates=True)
        samples = micro_batch_of(sizes, layout, wanted, room, share)

    load = replace(wanted.sample, samples=max(samples, 1))
    memory = predict(sizes, layout, load)
    if lacking := room.shortage(memory):
        if room.needed(memory) <= room.device:  # of host and disk, which samples do not fill
            return f"a rank needs {lacking}"
        plural = "s take" if load.samples > 1 else " takes"
        return f"{load.samples} sample{plural} {lacking}"

    return Fit(layout, samples, max(1, share // samples), memory)


def micro_batch_of(
    sizes: ModelConfig, layout: Layout, wanted: Batches, room: Room, share: int
) -> int:
    """Return the micro-batch that is wanted, or the largest that fits and divides a rank's `share`
    of the global batch (0: there is none); 0 if not one sample fits.
    """
    if wanted.micro_batch:
        return wanted.micro_batch

    most = largest_micro_batch(sizes, layout, wanted.sample, room.device, share or MOST)

    return next((n for n in range(most, 0, -1) if share % n == 0), 0)


def nearest_fit(
    sizes: ModelConfig,
    layout: Layout,
    load: Load,
    room: Room,
    micro_batch: int,
    has_bf16: bool = False,
) -> Fit | None:
    """Return the layout with the same ranks that fits and differs least from `layout`, with its
    micro-batch (no larger than before; gradients of several add up to the same step); or None.

    `load` is that of a whole micro-batch, which may have more rows than samples. With `has_bf16`
    the device can compute in it.
    """
    found = nearby_fits(sizes, layout, load, micro_batch, has_bf16)
    return next((one for one in found if not room.shortage(one.memory)), None)


def nearby_fits(
    sizes: ModelConfig, layout: Layout, load: Load, micro_batch: int, has_bf16: bool = False
) -> Iterator[Fit]:
    """Yield the layouts near to `layout`, and micro-batches, with their memory; the nearest first,
    whether they fit or not.
    """
    micro_batches = [n for n in range(micro_batch, 0, -1) if micro_batch % n == 0]
    candidates = [
        (distance(layout, other) + 2 * math.log2(micro_batch / samples), other, samples)
        for other in nearby_layouts(sizes, layout, has_bf16)
        if is_nearby(layout, other)
        for samples in micro_batches
    ]

    for _, other, samples in sorted(candidates, key=lambda one: one[0]):
        rows = max(1, load.samples * samples // micro_batch)
        more = layout.data * micro_batch > other.data * samples
        other = replace(other, accumulates=layout.accumulates or more)
        memory = predict(sizes, other, replace(load, samples=rows))
        steps = layout.data * micro_batch // (other.data * samples) or 1
        yield Fit(other, samples, steps, memory)


def nearby_layouts(sizes: ModelConfig, layout: Layout, has_bf16: bool) -> Iterator[Layout]:
    """Yield a layout itself, also where `layouts` would not list it, and all others of its ranks,
    in its precision and, with `has_bf16`, in 16 bits; those that want another JSON take the numbers
    of the shipped ones.
    """
    yield layout
    if layout.secondary:
        yield replace(layout, secondary=0)
    yield replace(layout, recompute=True)
    usual = Layout()
    shipped = {name: getattr(usual, name) for name in OF_JSON}
    precisions = {layout.half, layout.half or has_bf16}

    for half in sorted(precisions):
        for other in layouts(sizes, replace(layout, half=half), layout.data * layout.tensor):
            own_json = json_key(other) == json_key(layout) or not other.offloads
            yield other if own_json else replace(other, **shipped)


def is_nearby(layout: Layout, other: Layout) -> bool:
    """Check whether a layout takes nothing back that another saves memory with."""
    return (
        other.zero_stage >= layout.zero_stage
        and other.tensor >= layout.tensor
        and other.expert >= layout.expert
        and other.recompute >= layout.recompute
        and other.half >= layout.half
        and other.sequence_parallel >= layout.sequence_parallel
        and DISTANCES[other.optimizer_on] >= DISTANCES[layout.optimizer_on]
        and DISTANCES[other.parameters_on] >= DISTANCES[layout.parameters_on]
    )


def places(layout: Layout) -> tuple[str, str]:
    """Return where a layout has its optimizer's state and its parameters."""
    return layout.optimizer_on, layout.parameters_on


def json_key(layout: Layout) -> tuple[str, str, int]:
    """Return the key of a layout's JSON in SHIPPED."""
    return *places(layout), layout.zero_stage


def away(layout: Layout) -> int:
    """Return how far from the device a layout keeps its state."""
    return sum(DISTANCES[place] for place in places(layout))


def distance(layout: Layout, other: Layout) -> float:
    """Return how much more another layout costs a user, in steps of one ZeRO stage."""
    return (
        (other.zero_stage - layout.zero_stage)
        + 3 * (other.recompute - layout.recompute)
        + 4 * (other.half - layout.half)
        + 5 * math.log2(other.tensor / layout.tensor)
        + 2 * math.log2(other.expert / layout.expert)
        + (other.sequence_parallel - layout.sequence_parallel)
        + 8 * (away(other) - away(layout))
    )


def flags_of(found: Fit, before: Layout, samples: int, given: Container[str] = ()) -> list[str]:
    """Return the flags by which a training run changes from a layout and its micro-batch; `given`:
    the names of those that the run was started with.
    """
    layout = found.layout
    flags = []

    if layout.tensor != before.tensor:
        flags += ["--tensor-model-parallel-size", str(layout.tensor)]
    if layout.expert != before.expert:
        flags += ["--expert-parallel-size", str(layout.expert)]
    if layout.sequence_parallel != before.sequence_parallel:
        flags.append("--sequence-parallel")
    if layout.half and not before.half:
        flags.append("--bf16")
    other_json = layout.offloads and json_key(layout) != json_key(before)
    by_json = other_json and "zero_stage" not in given
    if layout.zero_stage != before.zero_stage and not by_json:
        flags += ["--zero-stage", str(layout.zero_stage)]
    if layout.recompute != before.recompute:
        flags.append("--recompute-activations")
    if found.samples != samples:
        flags += ["--micro-batch-size", str(found.samples)]
    if other_json:
        flags += ["--deepspeed-config", SHIPPED[json_key(layout)]]
        if ON_DISK in places(layout):
            flags += ["--nvme-path", "FOLDER"]

    return flags
