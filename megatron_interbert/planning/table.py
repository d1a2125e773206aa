"""Show layouts as tables: what fits, with its memory and time, and what does not fit and why."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_interbert.machines.processes import aligned
from megatron_interbert.planning.layout import ON_DEVICE, ON_HOST, Layout
from megatron_interbert.planning.search import GIB, MOST, Fit
from megatron_interbert.planning.timing import StepTime

WIDTH = 100  # characters of a line, except in the tables


@dataclass(frozen=True)
class Row:
    """Hold a layout that fits and, if the device is known, the time of a step and the samples/s of
    all devices.
    """

    fit: Fit
    time: StepTime | None = None
    rate: float = 0.0


@dataclass(frozen=True)
class Column:
    """Describe a column: its heading, what it means, and how a cell is made of a row (or a layout).

    A column whose cells are all `usual` says nothing, and is left out; "": it is always shown.
    """

    heading: str
    meaning: str
    cell: Callable[[Any], Any]
    usual: str = ""


def yes(answer: bool) -> str:
    """Return an answer as a word."""
    return "yes" if answer else "no"


def offloaded(layout: Layout) -> str:
    """Return what a layout offloads, and to where."""
    if not layout.offloads:
        return "no"

    what = "optimizer" if layout.parameters_on == ON_DEVICE else "all"
    return f"{what} to {'host' if layout.optimizer_on == ON_HOST else 'disk'}"


LAYOUT = (
    Column("DP", "data-parallel ranks", lambda layout: layout.data),
    Column("TP", "tensor-parallel ranks, which split each layer", lambda layout: layout.tensor),
    Column(
        "SP",
        "these also split the tokens between layers (--sequence-parallel)",
        lambda layout: yes(layout.sequence_parallel),
        "no",
    ),
    Column(
        "EP",
        "expert-parallel ranks, neighbours that divide the experts",
        lambda layout: layout.expert,
        "1",
    ),
    Column(
        "ZeRO",
        "its stage: 1 shares the optimizer, 2 gradients too, 3 weights too",
        lambda layout: layout.zero_stage,
    ),
    Column(
        "recompute",
        "the backward pass recomputes activations (--recompute-activations)",
        lambda layout: yes(layout.recompute),
        "no",
    ),
    Column("offload", "what is kept on the host, or on its disk", offloaded, "no"),
)


def gib(name: str, meaning: str, usual: str = "") -> Column:
    """Return a column of bytes of `Memory`, in GiB."""
    return Column(name, meaning, lambda row: f"{getattr(row.fit.memory, name) / GIB:.2f}", usual)


def seconds(name: str, heading: str, meaning: str, usual: str = "") -> Column:
    """Return a column of seconds of `StepTime`."""
    return Column(heading, meaning, lambda row: f"{getattr(row.time, name):.3f}", usual)


MEMORY = (
    gib("weights", "GiB of a device, in the type of the forward pass"),
    gib("optimizer", "GiB of fp32 weights and Adam's moments"),
    gib("gradients", "GiB of those that the optimizer takes, in the type of the forward pass"),
    gib("buffers", "GiB for communication"),
    gib("activations", "GiB of a micro-batch"),
    gib("peak", "GiB at most: not all parts at once, but with what ZeRO-3 gathers and updates add"),
    gib("host", "GiB of host memory for each of its devices", "0.00"),
    Column(
        "disk",
        "GB of disk for each of its devices",
        lambda row: f"{row.fit.memory.disk / 1e9:.1f}",
        "0.0",
    ),
)
TIME = (
    Column("samples/s", "of all devices together", lambda row: f"{row.rate:.1f}"),
    seconds("compute", "compute s", "seconds of a step in forward and backward passes"),
    seconds("tensor", "TP s", "in communication between tensor-parallel ranks", "0.000"),
    seconds("expert", "EP s", "in the exchange of rows with the ranks of their experts", "0.000"),
    seconds("data", "ZeRO s", "in communication between data-parallel ranks", "0.000"),
    seconds("update", "update s", "in the optimizer"),
    seconds("offload", "offload s", "in transfers to and from host and disk", "0.000"),
)


def fitting(rows: Sequence[Row], limited: bool) -> list[str]:
    """Return the lines of the table of what fits, after a legend of its columns; `limited`: by a
    batch size, so that no micro-batch is cut off at the largest that is tried.
    """

    def samples(row: Row) -> str:
        return f"{row.fit.samples}{'+' * (row.fit.samples == MOST and not limited)}"

    micro_batch = Column(
        "micro-batch", "samples of a forward pass of a data-parallel rank", samples
    )
    layout = seen_by(lambda row: row.fit.layout)
    columns = [*layout, micro_batch, *MEMORY, *(TIME if rows[0].time else ())]
    shown = [column for column in columns if says_something(column, rows)]
    legend = [("  " + column.heading, column.meaning) for column in shown]

    return ["columns:", *aligned(legend), *in_columns(shown, rows)]


def leaving_out(left_out: Sequence[tuple[Layout, str]]) -> list[str]:
    """Return the lines of the table of what does not fit, and why."""
    because = Column("because", "", lambda pair: pair[1])
    layout = seen_by(lambda pair: pair[0])
    shown = [column for column in layout if says_something(column, left_out)]

    return ["left out:", *in_columns([*shown, because], left_out)]


def seen_by(layout_of: Callable[[Any], Layout]) -> list[Column]:
    """Return the columns of a layout for rows of which `layout_of` returns the layout."""

    def of_row(column: Column) -> Column:
        return replace(column, cell=lambda row: column.cell(layout_of(row)))

    return [of_row(column) for column in LAYOUT]


def says_something(column: Column, rows: Iterable[Any]) -> bool:
    """Check whether any cell of a column is not the usual one."""
    return any(column.cell(row) != column.usual for row in rows)


def in_columns(columns: Sequence[Column], rows: Iterable[Any]) -> list[str]:
    """Return the lines of a table."""
    head = [column.heading for column in columns]
    return aligned([head, *([column.cell(row) for column in columns] for row in rows)])


def layout_name(layout: Layout) -> str:
    """Return a layout in words, such as `DP8 x TP1, ZeRO-2, activations recomputed`."""
    words = [f"DP{layout.data} x TP{layout.tensor}", f"ZeRO-{layout.zero_stage}"]
    if layout.expert > 1:
        words.insert(1, f"EP{layout.expert}")
    if layout.sequence_parallel:
        words.append("sequence parallelism")
    if layout.recompute:
        words.append("activations recomputed")
    if layout.offloads:
        words.append(offloaded(layout))

    return ", ".join(words)


def wrapped(text: str) -> list[str]:
    """Return a text in lines; those after the first are indented."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
