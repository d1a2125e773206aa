"""Define the plain twins of the fused kernels, in ordinary torch operations on any device."""

import itertools

import torch
import torch.nn.functional as F

from megatron_interbert.kernels.sequences import Sequences


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the erf GELU of x [.., F] + bias [F]."""
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
    """Return LayerNorm(residual + dropout(x + bias)) over the last axis of x [N, H]."""
    return F.layer_norm(
        residual + F.dropout(x + bias, dropout_p), weight.shape, weight, norm_bias, eps
    )


def region_rows(
    features: torch.Tensor,
    hidden: torch.Tensor,
    counts: torch.Tensor,
    region_rows: torch.Tensor,
    summary_rows: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the features of image tokens [Ni, F] in `dtype`, from those of regions [R, F]: each
    image's mean region at its summary row [images], its regions at their rows [R].

    The regions numbered in `hidden` are zeroed, and count as zeros in the mean; `counts` [images]
    holds the number of regions of each image.
    """
    regions = features.float().index_fill(0, hidden, 0.0)
    # No atomics: the same bits on every rank. `unsafe` skips a check of the counts, for which the
    # host would wait.
    means = torch.segment_reduce(regions, "mean", lengths=counts, unsafe=True)
    result = regions.new_empty(len(region_rows) + len(summary_rows), regions.shape[1])
    result.index_copy_(0, summary_rows, means)

    return result.index_copy_(0, region_rows, regions).to(dtype)


def embed_text(
    words: torch.Tensor,
    positions: torch.Tensor,
    types: torch.Tensor,
    position_table: torch.Tensor,
    type_table: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """Return dropout(LayerNorm(words + position + type)) of word embeddings [Nt, H], with the row
    numbers [Nt] of both tables.
    """
    embedded = words + F.embedding(positions, position_table) + F.embedding(types, type_table)
    return F.dropout(F.layer_norm(embedded, weight.shape, weight, bias, eps), dropout_p)


def embed_image(
    projected: torch.Tensor,
    locations: torch.Tensor,
    location_weight: torch.Tensor,
    location_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dropout_p: float,
    eps: float,
) -> torch.Tensor:
    """Return dropout(LayerNorm(projected + Linear(locations))) of projected features [Ni, H] and
    locations [Ni, 5].
    """
    embedded = projected + F.linear(locations, location_weight, location_bias)
    return F.dropout(F.layer_norm(embedded, weight.shape, weight, bias, eps), dropout_p)


def attention(qkv: torch.Tensor, sequences: Sequences, dropout_p: float) -> torch.Tensor:
    """Attend within each sequence of a packed batch, one sequence at a time.

    qkv [N, heads, 3, D] holds queries, keys and values, and gets one gradient of the same shape.
    Returns [N, heads, D].
    """
    parts = []
    offsets = sequences.offsets.tolist()
    for start, stop in itertools.pairwise(offsets):
        q, k, v = qkv[start:stop].unbind(2)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(
            q.dtype
        )
        parts.append(torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout_p), v))

    return torch.cat(parts)


def vocab_statistics(
    logits: torch.Tensor, labels: torch.Tensor, words: int
) -> tuple[torch.Tensor, ...]:
    """Return for each row of logits [m, C], over its first `words` columns: the largest, the sum of
    exp(logit - largest), the label's logit (0 for labels [m] outside), and the column of the
    largest (the first of equals). Computed in float32 at least.
    """
    real = logits[:, :words].to(torch.promote_types(logits.dtype, torch.float32))
    if words == 0:  # a rank that holds only padding
        lowest = real.new_full((len(logits),), torch.finfo(real.dtype).min)
        return lowest, torch.zeros_like(lowest), torch.zeros_like(lowest), torch.zeros_like(labels)

    largest, best = real.max(dim=1)
    total = (real - largest[:, None]).exp_().sum(dim=1)
    elsewhere = (labels < 0) | (labels >= words)
    own = (
        real.gather(1, labels.masked_fill(elsewhere, 0)[:, None])
        .squeeze(1)
        .masked_fill(elsewhere, 0.0)
    )

    return largest, total, own, best


def vocab_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    normaliser: torch.Tensor,
    grad: torch.Tensor,
    words: int,
) -> torch.Tensor:
    """Return the gradient [m, C] of the rows' cross entropies with respect to the logits:
    (exp(logit - normaliser) - [column is the label]) x grad [m], and 0 beyond `words`.

    `normaliser` [m] is the logarithm of the sum of all exponentials; the result may reuse the
    memory of `logits`.
    """
    result = (logits.to(normaliser.dtype) - normaliser[:, None]).exp_().mul_(grad[:, None])
    result[:, words:] = 0.0
    elsewhere = (labels < 0) | (labels >= words)
    place = labels.masked_fill(elsewhere, 0)[:, None]
    result.scatter_(1, place, result.gather(1, place) - grad.masked_fill(elsewhere, 0.0)[:, None])

    return result.to(logits.dtype)
