"""Which kernel serves each operation: decided once at start from the device and `--kernels`, and printed."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.kernels import attention, cpu_ops, plain
from megatron_interbert.kernels.products import Float8Products, PlainProducts


@dataclass(frozen=True)
class Kernels:
    """Operations with the signatures of `plain`, and the name of each for the log."""

    attention: Callable[..., torch.Tensor] = attention.padded_sdpa
    bias_gelu: Callable[..., torch.Tensor] = plain.bias_gelu
    dropout_add_norm: Callable[..., torch.Tensor] = plain.dropout_add_norm
    region_rows: Callable[..., torch.Tensor] = plain.region_rows
    embed_text: Callable[..., torch.Tensor] = plain.embed_text
    embed_image: Callable[..., torch.Tensor] = plain.embed_image
    vocab_statistics: Callable[..., tuple[torch.Tensor, ...]] = plain.vocab_statistics
    vocab_gradient: Callable[..., torch.Tensor] = plain.vocab_gradient
    products: type = PlainProducts

    def describe(self) -> str:
        """One line: operation=module.function of each."""
        return ", ".join(f"{name}={one.__module__.rsplit('.', 1)[-1]}.{one.__name__}" for name, one in vars(self).items())


def choose_kernels(
    name: str, device: torch.device, attention_dropout: bool = False, deterministic: bool = False, fp8: bool = False
) -> Kernels:
    """Kernels for `--kernels auto|torch|triton|apex` on a device, with `fp8` the layers' products in 8 bits (on a CPU too, slowly: for
    checks); UsageError when the choice cannot run there."""
    kernels = _kernels_by_name(name, device, attention_dropout, deterministic)
    if not fp8:
        return kernels
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UsageError(
            f"--fp8: {torch.cuda.get_device_name(device)} has no 8-bit products (Ada, Hopper and newer have); leave it out"
        )
    return replace(kernels, products=Float8Products)


def _kernels_by_name(name: str, device: torch.device, attention_dropout: bool, deterministic: bool) -> Kernels:
    """Of all operations but the products.

    Variable-length flash attention has no dropout: with `attention_dropout` (training) the kernel for short sequences takes its
    place, or padded SDPA where there is no Triton. So it does if its gradients must be `deterministic`.
    """
    on_gpu = device.type == "cuda"
    flash = on_gpu and not attention_dropout and not deterministic
    packed_attention = attention.varlen_flash if flash else attention.padded_sdpa
    if name == "torch":
        return Kernels()
    if name == "auto" and not on_gpu:
        return Kernels(attention=cpu_ops.attention, dropout_add_norm=cpu_ops.dropout_add_norm)
    if name == "apex":
        from megatron_interbert.kernels import apex_adapters

        return Kernels(attention=packed_attention, dropout_add_norm=apex_adapters.load_dropout_add_norm())
    from megatron_interbert.kernels import triton_attention, triton_embedding, triton_ops, triton_vocab

    if not (on_gpu or triton_ops.interpreted()):
        raise UsageError("--kernels triton needs a GPU (or TRITON_INTERPRET=1 to check the kernels on a CPU); use --kernels torch")
    if not flash:
        packed_attention = triton_attention.short_attention
    return Kernels(
        packed_attention,
        triton_ops.bias_gelu,
        triton_ops.dropout_add_norm,
        triton_embedding.region_rows,
        triton_embedding.embed_text,
        triton_embedding.embed_image,
        triton_vocab.vocab_statistics,
        triton_vocab.vocab_gradient,
    )
