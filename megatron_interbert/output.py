"""Standard output and error of work that must not end because nobody can read or store its
lines.
"""

import errno
import io
import os
import sys

STANDARD = (0, 1, 2)  # descriptors of standard input, output and error


class Lasting(io.FileIO):
    """A descriptor that takes everything: what a full disk or a closed pipe refuses is dropped."""

    lost = ""  # why something was dropped that somebody wanted to keep

    def write(self, data: bytes) -> int:
        try:
            done = super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:  # `| head` has read enough
                self.lost = error.strerror
            done = None

        return len(data) if done is None else done  # None: a pipe that does not wait is full


def open_standard_streams() -> None:
    """Lead closed standard streams to /dev/null: else the next file to be opened gets their number,
    and what is printed goes into it.
    """
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free

    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def speak_any_language() -> None:
    """Have messages in any language printed where the locale is POSIX's, and never fail for a
    character.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            ascii_only = stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
            encoding = "utf-8" if ascii_only else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def keep_speaking() -> None:
    """From now on a line that cannot be written is dropped.

    The work that wanted to say it continues.
    """
    sys.stdout = lasting(sys.stdout, sys.__stdout__)
    sys.stderr = lasting(sys.stderr, sys.__stderr__)


def lasting(stream: io.TextIOBase, ordinary: io.TextIOBase | None) -> io.TextIOBase:
    """Give a stream like the process's own that never fails; others, as tests have them, stay."""
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
    """Say on standard error that standard output could not be written, where it is so; gives
    whether.
    """
    sys.stdout.flush()
    reason = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", "")
    if reason:
        text = f"note: standard output could not be written ({reason}): lines are missing"
        print(text, file=sys.stderr, flush=True)

    return bool(reason)
