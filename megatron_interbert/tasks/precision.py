"""Choose the precision in which evaluations and the service compute, from the flag and the device.

`auto` means TF32 on NVIDIA GPUs that have it, and fp32 elsewhere. A precision that the device lacks
is replaced by fp32, and the user is told why.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from megatron_interbert.kernels.fit import gpu_of
from megatron_interbert.tasks.config import LoadConfig

HEADS = ("itm_head", "choice_head", "sentence_head")
MEANING = {
    "fp32": "weights and products in 32 bits",
    "tf32": "weights in 32 bits, the layers' products in NVIDIA's TF32",
    "bf16": "weights and products in bfloat16, the heads in fp32",
}


def heads_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the heads of a model that judge samples."""
    yield from (getattr(model, name) for name in HEADS if hasattr(model, name))
    if hasattr(model, "task_heads"):
        yield from model.task_heads.values()


@dataclass(frozen=True)
class Precision:
    """Hold a precision (fp32, tf32 or bf16), and the reason if it is not the one asked for."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        because = f"; {self.reason}" if self.reason else ""
        return f"{self.name} ({MEANING[self.name]}{because})"

    @property
    def bytes(self) -> int:
        """Return the bytes of a weight in this precision."""
        return 2 if self.name == "bf16" else 4

    def convert(self, model: nn.Module) -> nn.Module:
        """Convert the weights of a model to this precision, in place, and return the model.

        Heads, and their inputs, stay in fp32: rounded to 16 bits, many scores would tie.
        """
        if self.name != "bf16":
            return model

        model.bfloat16()
        for head in heads_of(model):
            head.float().register_forward_pre_hook(
                lambda head, inputs: tuple(value.float() for value in inputs)
            )

        return model

    @contextmanager
    def products(self) -> Iterator[None]:
        """Compute products of fp32 matrices on a GPU in this precision within the context, and
        restore torch's settings afterwards.

        Some containers enable TF32 through the environment, so fp32 has to be set as well.
        `allow_tf32` sets both of torch's switches; if only `fp32_precision` is set, torch 2.13
        finds that they disagree, and raises when it reads the other one.
        """
        switch = torch.backends.cuda.matmul
        allowed = switch.allow_tf32
        before = switch.fp32_precision
        switch.allow_tf32 = self.name == "tf32"

        try:
            yield
        finally:
            switch.allow_tf32 = allowed
            switch.fp32_precision = before


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Choose the precision for `--precision auto|fp32|tf32|bf16` on a device."""
    if device.type != "cuda":
        if asked == "tf32":
            return Precision("fp32", "a CPU has no TF32")
        return Precision("bf16" if asked == "bf16" else "fp32")

    gpu = gpu_of(device)
    if asked == "fp32":
        return Precision("fp32")
    if gpu.is_too_old:
        return Precision(
            "fp32", f"{gpu} has neither TF32 nor bfloat16 products, which need 8.0 or higher"
        )

    if asked == "bf16":
        return Precision("bf16")
    if torch.version.hip:
        return Precision("fp32", f"only NVIDIA GPUs have TF32; {gpu.name} has bf16")

    return Precision("tf32")


def settle_precision(config: LoadConfig, device: torch.device) -> Precision:
    """Choose the precision, replace `config.precision` by it, and note it for the user."""
    precision = choose_precision(config.precision, device)
    config.precision = precision.name
    config.notes.append(f"precision: {precision}")
    return precision
