"""Count the operations of a step's matrix products, and time them alone."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_", "mm.out", "bmm.out")


def flops_of_ours() -> dict[Any, Callable[..., int]]:
    """Return FLOP counters for products that torch's FlopCounterMode does not know."""
    return {torch.ops.aten._scaled_mm_v2: product_flops}


def product_flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of torch.nn.functional.scaled_mm on shapes [M, K] and [K, N]."""
    return 2 * a[0] * a[1] * b[1]


class ProductTimer(TorchDispatchMode):
    """Add up the seconds of all matrix products that run in this context.

    Attention that is fused with its softmax (SDPA, Triton's) does not count. On a GPU it waits for
    the device before and after each product: it measures their share of a step, but slows it down.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds = 0.0

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Any,
        arguments: tuple = (),
        keywords: dict | None = None,
    ) -> Any:
        if not is_product(str(operation)):
            return operation(*arguments, **(keywords or {}))

        begin = self._now()
        result = operation(*arguments, **(keywords or {}))
        self.seconds += self._now() - begin

        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

        return time.perf_counter()


def is_product(operation: str) -> bool:
    """Check whether a dispatcher's operation, such as aten.mm.default, is a matrix product."""
    name = operation.split(".", 1)[1]
    return name.removesuffix(".default") in PRODUCTS or name.startswith("_scaled_mm")
