"""Compute both passes of cross entropy over a chunk of logits in Triton, each with one read of the
logits in their own type.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["labels_ptr"])
def _row_statistics(
    logits_ptr,
    labels_ptr,
    largest_ptr,
    total_ptr,
    own_ptr,
    best_ptr,
    columns,
    words,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = -3.4028234663852886e38
    total = 0.0
    best = 0

    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logits = tl.load(
            logits_ptr + row * columns + column, mask=column < words, other=float("-inf")
        ).to(tl.float32)
        here, place = tl.max(
            logits, axis=0, return_indices=True, return_indices_tie_break_left=True
        )
        new = tl.maximum(largest, here)
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(logits - new), axis=0)
        best = tl.where(here > largest, start + place, best)
        largest = new

    label = tl.load(labels_ptr + row)
    there = (label >= 0) & (label < words)
    own = tl.load(logits_ptr + row * columns + label, mask=there, other=0.0).to(tl.float32)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    tl.store(own_ptr + row, own)
    tl.store(best_ptr + row, best)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "normaliser_ptr", "grad_ptr"])
def _row_gradient(
    logits_ptr, labels_ptr, normaliser_ptr, grad_ptr, columns, words, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * columns + column
    logits = tl.load(at, mask=column < words, other=float("-inf")).to(tl.float32)
    likely = tl.exp(logits - tl.load(normaliser_ptr + row))
    gradient = (likely - tl.where(column == tl.load(labels_ptr + row), 1.0, 0.0)) * tl.load(
        grad_ptr + row
    )
    gradient = tl.where(column < words, gradient, 0.0)
    tl.store(at, gradient.to(logits_ptr.dtype.element_ty), mask=column < columns)


def vocab_statistics(
    logits: torch.Tensor, labels: torch.Tensor, words: int
) -> tuple[torch.Tensor, ...]:
    """See plain.vocab_statistics; computed in float32."""
    rows, columns = logits.shape
    largest, total, own = (
        torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)
    )
    best = torch.empty_like(labels)
    _row_statistics[(rows,)](logits, labels, largest, total, own, best, columns, words, BLOCK=BLOCK)

    return largest, total, own, best


def vocab_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    normaliser: torch.Tensor,
    grad: torch.Tensor,
    words: int,
) -> torch.Tensor:
    """See plain.vocab_gradient; overwrites `logits` with the result."""
    rows, columns = logits.shape
    _row_gradient[(rows, triton.cdiv(columns, BLOCK))](
        logits, labels, normaliser, grad.contiguous(), columns, words, BLOCK=BLOCK
    )

    return logits
