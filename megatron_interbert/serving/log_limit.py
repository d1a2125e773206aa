"""Keep the log from filling a disk: repeated records are counted, and summed up in one line."""

import logging
import threading
import time
from dataclasses import dataclass

LONGEST = 8192  # characters of a record, its traceback included
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Allowance:
    """Hold how many records of one place are written within how many seconds."""

    most: int
    seconds: float


USUAL = Allowance(20, 10.0)
TRACEBACKS = Allowance(3, 60.0)


@dataclass
class Window:
    """Count the records of one place since `began`, in seconds of time.monotonic()."""

    allowance: Allowance
    began: float
    records: int = 0
    latest: logging.LogRecord | None = None

    @property
    def ends(self) -> float:
        """Return when the window ends, in seconds of time.monotonic()."""
        return self.began + self.allowance.seconds

    @property
    def left_out(self) -> int:
        """Return the number of records that were not written."""
        return max(0, self.records - self.allowance.most)


class LimitedHandler(logging.StreamHandler):
    """Write records to stderr, only so many from each place in the code per window of time; the
    rest become one line at its end.

    `allowances` by logger name replace the usual ones. Errors with tracebacks are told apart by
    where they were raised, too. Safe to use from several threads.
    """

    def __init__(self, allowances: dict[str, Allowance]) -> None:
        super().__init__()
        self.allowances = allowances
        self.windows: dict[Place, Window] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or count it."""
        place = place_of(record)
        window = self.windows.get(place)
        if window is not None and time.monotonic() >= window.ends:
            self.tell(place, window)
        if place not in self.windows:
            usual = TRACEBACKS if record.exc_info else USUAL
            self.windows[place] = Window(self.allowances.get(record.name, usual), time.monotonic())

        window = self.windows[place]
        window.records += 1
        window.latest = record

        if window.left_out == 0:
            super().emit(record)
        elif window.left_out == 1:
            self._tell_when_it_ends(place, window)

    def tell(self, place: Place, window: Window) -> None:
        """End a window, unless it has ended, and write a line for the records it left out."""
        with self.lock:
            if self.windows.get(place) is not window:
                return

            del self.windows[place]
            if window.left_out:
                super().emit(summary(window))

    def format(self, record: logging.LogRecord) -> str:
        """Format as usual, but cut the middle of a text longer than LONGEST."""
        text = super().format(record)
        if len(text) <= LONGEST:
            return text
        half = LONGEST // 2

        return f"{text[:half]}\n.. {len(text) - 2 * half} characters left out ..\n{text[-half:]}"

    def close(self) -> None:
        """End all windows, with lines for what they left out, and close."""
        for place, window in list(self.windows.items()):
            self.tell(place, window)
        super().close()

    def _tell_when_it_ends(self, place: Place, window: Window) -> None:
        """Start a timer that writes the line even if no further record comes."""
        timer = threading.Timer(
            max(0.0, window.ends - time.monotonic()), self.tell, (place, window)
        )
        timer.daemon = True
        timer.start()


def place_of(record: logging.LogRecord) -> Place:
    """Return where a record comes from, regardless of its text."""
    place = (record.name, record.levelno, record.pathname, record.lineno)
    if not record.exc_info or record.exc_info[0] is None:
        return place

    kind, _, trace = record.exc_info
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next

    where = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ()

    return (*place, kind.__name__, *where)


def summary(window: Window) -> logging.LogRecord:
    """Build the record that sums up what a window left out."""
    latest = window.latest
    text = latest.getMessage().strip().split("\n")[0][:200]
    message = f"... {window.left_out} more like this in {window.allowance.seconds:g} s: {text}"

    return logging.LogRecord(
        latest.name, latest.levelno, latest.pathname, latest.lineno, message, None, None
    )
