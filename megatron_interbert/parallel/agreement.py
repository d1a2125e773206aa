"""What all ranks must agree on before they work together: an error on one is an error on all, and
who is odd is named.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState

T = TypeVar("T")


def together(state: ParallelState, action: Callable[[], T]) -> T:
    """`action()` on every rank; when it fails on some, all fail with the same UsageError, which
    names them. No collectives inside.
    """
    result = None
    problem = None

    try:
        result = action()
    except UsageError as error:
        problem = str(error)

    problems = state.gather((problem, state.node))
    failed = [rank for rank, (text, _) in enumerate(problems) if text]
    if not failed:
        return result

    text, where = problems[failed[0]]
    if len(failed) == state.world_size:
        raise UsageError(text)

    raise UsageError(f"on {where} (ranks {some(failed)} of {state.world_size}): {text}")


def check_alike(state: ParallelState, facts: dict[str, Any]) -> None:
    """UsageError, on all ranks, when they are not about to do the same work: other code, versions,
    data, settings, steps.
    """
    found = state.gather((facts, state.node))

    for name in facts:
        values = [theirs[name] for theirs, _ in found]
        odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise UsageError(
                f"the ranks differ in {name}: {values[0]} on {found[0][1]} (rank 0), {values[odd]}"
                f" on {found[odd][1]} (rank {odd}); all nodes need the same code, versions, data"
                " and flags"
            )


def some(things: Sequence[Any]) -> str:
    """Name the first of some things, `1, 2, 3, ..`, for people."""
    return ", ".join(map(str, things[:8])) + (", .." if len(things) > 8 else "")
