"""Read and name experts in files that hold one tensor for each, as Hugging Face's models do; ours
holds all experts of a layer in one parameter.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import joined
from megatron_interbert.weights.tensor_files import TensorLayout

ONE_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")
# elements [start, start + length) of a flattened tensor of a name
Read = Callable[[str, int, int], torch.Tensor]


def name_of_expert(name: str, number: int) -> str:
    """Return the name of one expert's tensor: `mlp.experts.up.bias` -> `mlp.experts.7.up.bias`."""
    before, after = name.split(".mlp.experts.")
    return f"{before}.mlp.experts.{number}.{after}"


def whole_names(names: Iterable[str], where: str) -> dict[str, list[str]]:
    """Map the names of parameters to those of their tensors in a file that has one an expert, in
    order of the experts. Raises UsageError if one between them is missing.
    """
    found: dict[str, dict[int, str]] = {}

    for name in names:
        one = ONE_EXPERT.fullmatch(name)
        whole = f"{one[1]}.{one[3]}" if one else name
        found.setdefault(whole, {})[int(one[2]) if one else 0] = name

    for whole, parts in found.items():
        missing = set(range(len(parts))) - set(parts)
        if missing:
            raise UsageError(
                f"{where}: {name_of_expert(whole, min(missing))} is missing; the file is"
                " incomplete, use another copy"
            )

    return {
        whole: [parts[number] for number in range(len(parts))] for whole, parts in found.items()
    }


def stacked(
    names: Mapping[str, list[str]],
    layout: Callable[[str], TensorLayout],
    read: Read,
    where: str,
) -> tuple[dict[str, TensorLayout], Read]:
    """Return layouts and `read` of parameters of which a file has a tensor for each expert, given
    by `whole_names`. Raises UsageError if the tensors of a parameter differ in shape or dtype.
    """
    layouts = {}
    for whole, parts in names.items():
        entry = layout(parts[0])
        for part in parts:
            if layout(part) != entry:
                raise UsageError(
                    f"{where}: {part} is of shape {[*layout(part).shape]} in {layout(part).dtype},"
                    f" {parts[0]} of {[*entry.shape]} in {entry.dtype}; export the model again"
                )

        by_expert = parts != [whole]
        shape = (len(parts), *entry.shape) if by_expert else entry.shape
        layouts[whole] = TensorLayout(entry.dtype, shape)

    def read_stacked(name: str, start: int, length: int) -> torch.Tensor:
        parts = names[name]
        size = math.prod(layouts[name].shape) // len(parts)
        return joined([read(parts[n], first, many) for n, first, many in cut(start, length, size)])

    return layouts, read_stacked


def cut(start: int, length: int, size: int) -> list[tuple[int, int, int]]:
    """Cut elements [start, start + length) of parts of `size` elements that follow one another:
    (part, first element in it, elements) of each.
    """
    found = []
    while length > 0:
        number, first = divmod(start, size)
        many = min(size - first, length)
        found.append((number, first, many))
        start += many
        length -= many

    return found
