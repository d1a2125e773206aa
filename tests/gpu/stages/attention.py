"""Check attention kernels against float64: values, gradients, dropout, and their cost."""

import os
import statistics
import time
from collections.abc import Callable

import torch

from megatron_interbert.kernels import plain
from megatron_interbert.kernels.attention import padded_sdpa
from megatron_interbert.kernels.sequences import Sequences
from tests.gpu.stages.place import Place, Record
from tests.kernels import comparisons
from tests.kernels.sequences import packed

LENGTHS = {"one tile": [1, 37, 64, 23], "longer": [93, 128, 5], "beyond 128": [161, 37, 200]}
HEADS = [(12, 64), (8, 96)]  # (number of heads, their size) in the base model
DROPOUT = 0.1


def check_attention(place: Place, record: Record) -> None:
    """Record the worst errors by dtype, microseconds of a call, compilation and spills."""
    if place.pretended:
        os.environ["TRITON_INTERPRET"] = "1"

    from megatron_interbert.kernels import triton_attention

    attend = triton_attention.packed_attention
    heads = place.choose(HEADS, [(1, 8), (1, 24)])
    lengths = place.choose(LENGTHS, {"one tile": [1, 17, 9], "longer": [37, 5]})
    # The interpreter treats bfloat16 as integers.
    types = [place.choose(torch.bfloat16, torch.float16), torch.float32]
    torch.manual_seed(0)
    worst: dict[torch.dtype, float] = {}
    slowest = 0.0  # seconds of the slowest first call, which compiles

    for dtype in types:
        for count, size in heads:
            for name, some in lengths.items():
                where = f"{dtype}, heads of {size}, {name}".removeprefix("torch.")
                error, first = check_one(place, record, attend, some, count, size, dtype, where)
                slowest = max(slowest, first)
                worst[dtype] = max(worst.get(dtype, 0.0), error)

    told = ", ".join(f"{e:.1e} in {str(d).removeprefix('torch.')}" for d, e in worst.items())
    record.note(worst_error={str(dtype): error for dtype, error in worst.items()})
    record.say(f"worst error {told}; the slowest first call took {slowest:.1f} s")
    note_programs(record, triton_attention)
    for count, size in heads:
        time_attention(place, record, attend, count, size, types[0])


def check_one(
    place: Place,
    record: Record,
    attend: comparisons.Attention,
    lengths: list[int],
    heads: int,
    size: int,
    dtype: torch.dtype,
    where: str,
) -> tuple[float, float]:
    """Return (largest |ours - exact| / |exact| of values and gradients, seconds of the first call).

    With dropout, exact is float64 with the mask that v = identity reveals.
    """
    began = time.monotonic()
    qkv, sequences = packed(lengths, heads, size, dtype, place.device.type)
    errors = errors_of(attend, plain.attention, qkv, sequences, 0.0)
    first = time.monotonic() - began

    p = 0.3
    masks = comparisons.attention_masks(attend, qkv, sequences, p, comparisons.SEED)

    def masked(qkv: torch.Tensor, sequences: Sequences, p: float) -> torch.Tensor:
        return comparisons.masked_attention(qkv, sequences, masks, p)

    def seeded(*inputs: object) -> torch.Tensor:
        torch.manual_seed(comparisons.SEED)
        return attend(*inputs)

    dropped = errors_of(seeded, masked, qkv, sequences, p)
    kept = torch.cat([mask.flatten() for mask in masks])
    rate = 1 - float(kept.double().mean())
    spread = (p * (1 - p) / kept.numel()) ** 0.5
    limit = comparisons.tolerance(dtype)
    record.note(
        **{where: {"errors": errors, "with_dropout": dropped, "rate": rate, "first_call_s": first}}
    )
    record.expect(max(errors) <= limit, f"{where}: off by {max(errors):.1e}, more than {limit:.1e}")
    record.expect(
        max(dropped) <= limit,
        f"{where}, dropout: values off by {dropped[0]:.1e}, gradient by {dropped[1]:.1e}",
    )
    record.expect(abs(rate - p) < 5 * spread + 1e-3, f"{where}: dropout of {p} drops {rate:.4f}")

    return max(*errors, *dropped), first


def errors_of(
    ours: Callable,
    exact: Callable,
    qkv: torch.Tensor,
    sequences: Sequences,
    p: float,
) -> tuple[float, float]:
    """Return the relative errors of the values and of the gradient."""
    wide = qkv.detach().double().requires_grad_()
    theirs = exact(wide, sequences, p)
    found = ours(qkv, sequences, p)
    weight = torch.randn_like(found)
    gradient = torch.autograd.grad(found, qkv, weight)[0]
    expected = torch.autograd.grad(theirs, wide, weight.double())[0]

    return relative(found, theirs), relative(gradient, expected)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |found - exact| / |exact|; infinite if that is NaN."""
    error = float((found.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def note_programs(record: Record, kernels: object) -> None:
    """Record shared memory, registers and spills of the programs compiled for this GPU."""
    programs = []

    for name in ("_row_forward", "_row_backward", "_tiled_forward", "_tiled_backward"):
        caches = getattr(getattr(kernels, name), "device_caches", {})  # the interpreter has none
        for cache, *_ in caches.values():
            for program in cache.values():
                facts = {"kernel": name, "shared": program.metadata.shared}
                facts |= {n: getattr(program, n, None) for n in ("n_regs", "n_spills")}
                programs.append(facts)

    if programs:
        spilled = max(facts["n_spills"] or 0 for facts in programs)
        record.say(f"{len(programs)} programs compiled, at most {spilled} registers spilled in one")

    record.note(programs=programs)


def time_attention(
    place: Place,
    record: Record,
    attend: comparisons.Attention,
    heads: int,
    size: int,
    dtype: torch.dtype,
) -> None:
    """Time forward and backward passes on ragged joint tokens, compared with padded SDPA."""
    samples, joint = place.choose((256, (45, 58)), (2, (5, 9)))
    lengths = torch.randint(*joint, (samples,)).tolist()
    took = {}

    for name, one in (("triton", attend), ("padded", padded_sdpa)):
        qkv, sequences = packed(lengths, heads, size, dtype, place.device.type)
        weight = torch.ones(len(qkv), heads, size, device=qkv.device, dtype=dtype)

        def both(one=one, qkv=qkv, sequences=sequences, weight=weight) -> None:
            torch.autograd.grad(one(qkv, sequences, DROPOUT), qkv, weight)

        calls = [place.seconds(both) for _ in range(place.choose(23, 2))]
        took[name] = 1e6 * statistics.median(calls[-20:])
        record.note(**{f"{name}_{size}_us": took[name], f"{name}_{size}_first_s": calls[0]})

    record.say(
        f"{samples} samples, {heads} heads of {size}, both passes: {took['triton']:.0f} us,"
        f" padded SDPA {took['padded']:.0f} us"
    )
