"""Hold the weights to be written in some format, and give them one tensor at a time."""

import dataclasses
from collections.abc import Callable, Iterable

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.weights.sources import WeightSource
from megatron_interbert.weights.tensor_files import TensorLayout, is_finite

Progress = Callable[[int], None]  # called with the bytes of each tensor written


@dataclasses.dataclass
class Output:
    """Hold what to write: the source, the dtype of all tensors (None: unchanged), the number of
    tensor-parallel ranks of `sharded`, a vocabulary to include, the model card of `huggingface`.
    """

    source: WeightSource
    dtype: torch.dtype | None = None
    tensor_parallel: int = 1
    vocabulary: bytes | None = None
    card: str = ""
    # names of tensors found to contain NaN or infinity
    not_finite: list[str] = dataclasses.field(default_factory=list)

    def layout(self, name: str, shape: Iterable[int] | None = None) -> TensorLayout:
        """Return the dtype and shape of a tensor as it will be written."""
        found = self.source.layouts[name]
        return TensorLayout(
            self.dtype or found.dtype, tuple(found.shape if shape is None else shape)
        )

    def get(self, name: str) -> torch.Tensor:
        """Return a full tensor in the dtype to be written; UsageError if converting to that dtype
        makes an element infinite.
        """
        return self._checked(name, self.source.get(name))

    def part(self, name: str, start: int, length: int) -> torch.Tensor:
        """Return elements [start, start + length) of a flattened tensor in the same way."""
        return self._checked(name, self.source.read(name, start, length))

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        written = tensor.to(self.dtype) if self.dtype else tensor
        if not is_finite(written):
            if is_finite(tensor):
                raise UsageError(
                    f"{self.source.path}: {name} holds {tensor.abs().max():.3g}, more than"
                    f" {self.dtype} can hold; give --dtype bfloat16 or float32"
                )

            if name not in self.not_finite:  # each rank's file asks for it
                self.not_finite.append(name)

        return written

    def bytes(self) -> int:
        """Return the bytes of all tensors as they will be written; every rank's file holds the
        replicated ones.
        """
        ranks = self.tensor_parallel
        copies = {
            name: ranks if partition_dimension(name) is None else 1 for name in self.source.layouts
        }

        return sum(self.layout(name).bytes * count for name, count in copies.items())
