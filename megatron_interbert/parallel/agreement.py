"""Make ranks agree before they work together: an error on one is raised on all, and ranks that
differ are named.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.state import ParallelState

T = TypeVar("T")


def together(state: ParallelState, action: Callable[[], T]) -> T:
    """Run `action()` on every rank and return its result; if it raises UsageError on some ranks,
    raise one on all that names them. `action` must not use collectives.
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
    """Raise UsageError on all ranks if they are about to do different work: if any of `facts`
    (code, versions, data, settings, steps) differs from rank 0's.
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
    """Join the first eight of some things for people: `1, 2, 3, ..`."""
    return ", ".join(map(str, things[:8])) + (", .." if len(things) > 8 else "")
