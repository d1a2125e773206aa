"""Find on the CPU, where they cost nothing, the operations that would make the host wait for a
device.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that return a value to the host, or results whose size depends on values.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "aten.equal.")
INDEXING = ("aten.index.", "aten.index_put")

# numpy() and __array__ are not listed: for a tensor on a GPU they raise an error, so they cannot
# cause a wait that goes unnoticed.
FETCHES = ("cpu", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


class Readings(TorchDispatchMode):
    """Record the operations that return values, or sizes that depend on values, to the host, which
    would wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        keywords = keywords or {}
        if is_reading(str(operation), arguments, keywords):
            self.found.append(str(operation))
        return operation(*arguments, **keywords)


def is_reading(name: str, arguments: tuple, keywords: dict[str, Any]) -> bool:
    """Check whether a dispatched operation makes the host wait."""
    if name.startswith("aten.repeat_interleave.Tensor"):
        return keywords.get("output_size") is None
    if name.startswith("aten.segment_reduce."):
        return not keywords.get("unsafe")  # otherwise it checks the lengths
    if name.startswith(INDEXING):
        return any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )

    return any(part in name for part in READING)


class Waits(TorchFunctionMode):
    """Record what `Readings` finds in `found`, calls that fetch tensors to the host in `fetched`,
    and calls that send tensors to a device and wait in `sent`.

    The dispatcher does not see the latter two if the device is a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readings = Readings()
        self.fetched: list[str] = []
        self.sent: list[str] = []

    @property
    def found(self) -> list[str]:
        """Return the operations that `Readings` has found."""
        return self.readings.found

    def __enter__(self) -> "Waits":
        super().__enter__()
        self.readings.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.readings.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None
    ) -> Any:
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if name in FETCHES:
            self.fetched.append(name)
        if name == "to" and names_device(arguments, keywords) and not keywords.get("non_blocking"):
            self.sent.append(name)
        if name in ("tensor", "as_tensor") and keywords.get("device") is not None:
            self.sent.append(name)

        return function(*arguments, **keywords)


def names_device(arguments: tuple, keywords: dict[str, Any]) -> bool:
    """Check whether Tensor.to is given a device."""
    return "device" in keywords or any(isinstance(one, torch.device | str) for one in arguments)
