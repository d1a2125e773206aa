"""Multiply rows by the matrices of their experts: one product for each run of rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.products import PlainProducts


def one_by_one(
    x: torch.Tensor,
    weight: torch.Tensor,
    counts: Sequence[int],
    products: type = PlainProducts,
) -> torch.Tensor:
    """Return x_e W_e^T for each expert e, end to end [N, out].

    The rows of x [N, in] are sorted by expert, `counts[e]` for each; weight is [experts, out, in].
    """
    runs = zip(x.split(list(counts)), weight.unbind(0), strict=True)
    return torch.cat([products.linear(rows, matrix) for rows, matrix in runs])


def together(
    x: torch.Tensor,
    weight: torch.Tensor,
    counts: Sequence[int],
    products: type = PlainProducts,
) -> torch.Tensor:
    """Return the same by torch's grouped product, in one launch, in the operands' type."""
    ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
