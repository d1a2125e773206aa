"""Show the progress of long work: a bar on a terminal, a line every half minute in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines of a log; shorter work writes none
LINE = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f} %) | {rate_fmt}{postfix} | eta {remaining}"


def progress(iterable: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any) -> tqdm:
    """Return a tqdm over `iterable`, or with a `total` that the caller updates.

    `shown` should be true on one rank only.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, disable=not shown, mininterval=1.0, dynamic_ncols=True, **settings)

    return log_lines(iterable, shown=shown, **settings)


def log_lines(
    iterable: Iterable[Any] | None = None, *, shown: bool = True, **settings: Any
) -> tqdm:
    """Return a tqdm that writes log lines on a terminal too, for work beside another bar."""
    pace = {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "miniters": 1}
    return LogLines(iterable, disable=not shown, bar_format=LINE, **pace, **settings)


class LogLines(tqdm):
    """Write tqdm's progress as lines of their own instead of overwriting one."""

    shown_at: float | None = None  # how much was done when the last line was written

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print one line to stderr."""
        self.shown_at = self._cap()
        print(msg or str(self), file=sys.stderr, flush=True)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print a line as it is: no bar has to make way."""
        print(s, file=file or sys.stdout, end=end, flush=True)

    def close(self) -> None:
        """Print the last figures if earlier ones were printed, and close."""
        if not self.disable and self.shown_at not in (None, self._cap()):
            self.display()
        self.delay = float("inf")  # keeps tqdm from clearing a line that it did not write
        super().close()

    def _cap(self) -> float:
        """Cap the count at the total and return it; sums over ranks or seconds may overshoot."""
        self.n = min(self.n, self.total) if self.total else self.n
        return self.n
