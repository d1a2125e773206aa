"""In which precision evaluations and the service compute: one rule for all of them, from what is
asked for and the device.

`auto` is TF32 on NVIDIA's GPUs that have it, plain fp32 elsewhere. What a device lacks becomes
fp32, and that is said.
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


@dataclass(frozen=True)
class Precision:
    """fp32, tf32 or bf16, and why it is not what was asked for."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        because = f"; {self.reason}" if self.reason else ""
        return f"{self.name} ({MEANING[self.name]}{because})"

    def convert(self, model: nn.Module) -> nn.Module:
        """Turn the weights of a model into this precision; gives the same model.

        Heads stay in fp32 and take fp32: of two scores rounded to 16 bits many would tie.
        """
        if self.name != "bf16":
            return model

        model.bfloat16()
        for name in HEADS:
            if hasattr(model, name):
                head = getattr(model, name).float()
                head.register_forward_pre_hook(
                    lambda head, inputs: tuple(value.float() for value in inputs)
                )

        return model

    @contextmanager
    def products(self) -> Iterator[None]:
        """Have products of fp32 matrices on a GPU computed so in between, whatever torch was told
        before; then as before.

        Some containers switch TF32 on by the environment, so fp32 has to be asked for as well.
        `allow_tf32` moves both of torch's switches; with `fp32_precision` alone torch 2.13 finds
        them at odds, and raises where it looks at the other.
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
    """Choose for `--precision auto|fp32|tf32|bf16` on a device."""
    if device.type != "cuda":
        if asked == "tf32":
            return Precision("fp32", "a CPU has no TF32")
        return Precision("bf16" if asked == "bf16" else "fp32")

    gpu = gpu_of(device)
    if asked == "fp32":
        return Precision("fp32")
    if gpu.is_too_old:
        return Precision(
            "fp32", f"{gpu} has neither TF32 nor products in bfloat16, which 8.0 brought"
        )

    if asked == "bf16":
        return Precision("bf16")
    if torch.version.hip:
        return Precision("fp32", f"TF32 is NVIDIA's, {gpu.name} has bf16")

    return Precision("tf32")


def settle_precision(config: LoadConfig, device: torch.device) -> Precision:
    """Choose, put what was chosen in place of `config.precision`, and note it for the user."""
    precision = choose_precision(config.precision, device)
    config.precision = precision.name
    config.notes.append(f"precision: {precision}")
    return precision
