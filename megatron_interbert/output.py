"""Keep work going when its standard output or error cannot be written."""

import errno
import io
import os
import sys

STANDARD = (0, 1, 2)  # descriptors of standard input, output and error


class Lasting(io.FileIO):
    """Write to a descriptor without errors, dropping what a full disk or a closed pipe refuses."""

    lost = ""  # why output was dropped; empty for a closed pipe, which nobody reads

    def write(self, data: bytes) -> int:
        try:
            done = super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:  # `| head` has read enough
                self.lost = error.strerror
            done = None

        return len(data) if done is None else done  # None: a non-blocking pipe is full


def open_standard_streams() -> None:
    """Open closed standard streams on /dev/null; otherwise the next file to be opened would get
    their descriptor, and receive what is printed.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor

    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def speak_any_language() -> None:
    """Print UTF-8 in the POSIX locale, and escape characters that a stream cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
            encoding = "utf-8" if ascii_only else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def keep_speaking() -> None:
    """Drop lines that cannot be written from now on, instead of raising OSError."""
    sys.stdout = lasting(sys.stdout, sys.__stdout__)
    sys.stderr = lasting(sys.stderr, sys.__stderr__)


def lasting(stream: io.TextIOBase, ordinary: io.TextIOBase | None) -> io.TextIOBase:
    """Wrap one of the process's own streams so that it never fails; return others unchanged."""
    if stream is not ordinary or not isinstance(stream, io.TextIOWrapper):
        return stream

    raw = Lasting(stream.fileno(), "w", closefd=False)

    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def say_what_was_lost() -> bool:
    """Report on standard error whether lines of standard output were lost; return whether so."""
    sys.stdout.flush()
    reason = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", "")
    if reason:
        text = f"note: standard output could not be written ({reason}): lines are missing"
        print(text, file=sys.stderr, flush=True)

    return bool(reason)
