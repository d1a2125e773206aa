"""Adapt NVIDIA apex to our signatures.

The package called apex on PyPI is something else, so the function is imported, not just the name.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_interbert.errors import UsageError


def load_dropout_add_norm() -> Callable[..., torch.Tensor]:
    """Return a `plain.dropout_add_norm` with apex's fused LayerNorm.

    Raises UsageError if NVIDIA's apex is not installed.
    """
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError as error:
        raise UsageError(
            f"--kernels apex: NVIDIA apex is not installed ({error}); use --kernels auto"
        ) from error

    def dropout_add_norm(
        x: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        norm_bias: torch.Tensor,
        dropout_p: float,
        eps: float,
    ) -> torch.Tensor:
        return fused_layer_norm_affine(
            residual + F.dropout(x + bias, dropout_p), weight, norm_bias, weight.shape, eps
        )

    return dropout_add_norm
