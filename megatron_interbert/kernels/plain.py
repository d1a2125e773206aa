"""The plain twins: what the fused kernels must equal, in ordinary torch operations on any device."""

import torch
import torch.nn.functional as F


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """erf GELU of x [.., F] + bias [F]."""
    return F.gelu(x + bias)


def dropout_add_norm(
    x: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    norm_bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last axis of x [N, H]."""
    return F.layer_norm(residual + F.dropout(x + bias, dropout_p), weight.shape, weight, norm_bias, eps)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, max_length: int, dropout_p: float
) -> torch.Tensor:
    """Attention within each sequence of a packed batch, one sequence at a time.

    q, k, v [N, heads, D]; offsets [B+1] of the sequences; gives [N, heads, D].
    """
    parts = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * q.shape[-1] ** -0.5
        weights = F.dropout(scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype), dropout_p)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v[start:stop]))
    return torch.cat(parts)
