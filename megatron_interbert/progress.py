"""Progress of long work: a bar on a terminal; in a log, a line with the remaining time every half
minute.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log; work that takes less writes none
LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %) | {rate_fmt}{postfix} | eta {remaining}"


def progress(iterable: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any) -> tqdm:
    """Give a tqdm over `iterable`, or over `total` that is updated by hand.

    `shown` is false on all ranks but one.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, disable=not shown, mininterval=1.0, dynamic_ncols=True, **settings)

    return log_lines(iterable, shown=shown, **settings)


def log_lines(
    iterable: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any
) -> tqdm:
    """As in a log, also on a terminal: for work beside other work that has the bar."""
    pace = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return LogLines(iterable, disable=not shown, bar_format=LINE, **pace, **settings)


class LogLines(tqdm):
    """tqdm that ends its lines instead of writing over them."""

    shown_at: float | None = None  # how much was done when the last line was written

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Give one line to stderr."""
        self.shown_at = self._cap()
        print(msg or str(self), file=sys.stderr, flush=True)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Write a line of its own; there is no bar to move out of its way."""
        print(s, file=file or sys.stdout, end=end, flush=True)

    def close(self) -> None:
        """Give the last figures, where earlier ones were shown."""
        if not self.disable and self.shown_at not in (None, self._cap()):
            self.display()
        self.delay = float("inf")  # keeps tqdm from cleaning a line up that it did not write
        super().close()

    def _cap(self) -> float:
        """Say how much is done.

        Counts of ranks' shares, or of seconds, can come out a little high.
        """
        self.n = min(self.n, self.total) if self.total else self.n
        return self.n
