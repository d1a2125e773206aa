"""Talk to the decoding process: start it when it is first needed, and again if it has died."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.pickles.nodes import READY, REPLY, REQUEST

SECONDS = 60  # limit for one pickle; a row takes milliseconds
MEMORY = 2 << 30
MAX_REPLY = 1 << 30
ROOT = Path(__file__).resolve().parents[4]  # the folder of the package
START = (
    "import sys; sys.path.append(sys.argv.pop(1));"
    " from megatron_interbert.preparation.building.pickles.helper import main; main()"
)

Reply = tuple[int, bytearray, bytearray]  # kind, text, tail


class PickleProcess:
    """Manage one process that decodes pickles for this process, and ends with it."""

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds = seconds
        self.memory = memory
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None
        self.owner = 0  # pid of the reader: after a fork, parent and child must not share a process

    def ask(self, data: bytes) -> Reply:
        """Have one pickle decoded and return the reply.

        Raises ValueError if it takes too long or kills the process twice, UsageError if the process
        cannot be started.
        """
        with self.lock:
            try:
                return self._ask(data)
            except EOFError:  # not always because of the pickle: memory may be short elsewhere
                pass

            try:
                return self._ask(data)
            except EOFError as error:
                reason = f"the process that decodes pickles ended over it ({error})"
                raise ValueError(reason) from None

    def close(self) -> None:
        """Kill the process, if this process has started one."""
        if self.channel is not None:
            self.channel.close()

        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()

        self.process = None
        self.channel = None

    def _ask(self, data: bytes) -> Reply:
        """Have one pickle decoded; raise EOFError if the process has died."""
        if self.process is None or self.owner != os.getpid():
            self._start()

        try:
            return self._exchange(data)

        except TimeoutError:
            self.close()
            raise ValueError(f"takes longer than {self.seconds} s to decode") from None

        except (OSError, EOFError):
            raise EOFError(self._end()) from None

        except BaseException:  # interrupted: the answer would be taken for that of the next pickle
            self.close()
            raise

    def _start(self) -> None:
        """Start the process and wait until it is ready; raise UsageError if it does not start."""
        self.close()
        self.owner = os.getpid()
        atexit.unregister(self.close)
        atexit.register(self.close)
        self.channel, theirs = socket.socketpair()
        limits = [str(int(self.seconds) + 1), str(self.memory)]

        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-W", "ignore", "-c", START, str(ROOT), *limits],
                    stdin=theirs,
                    stdout=theirs,
                    stderr=subprocess.DEVNULL,
                )

            if self._receive(len(READY), time.monotonic() + SECONDS) != READY:
                raise EOFError("it did not report that it is ready")

        except (OSError, EOFError) as error:
            reason = self._end() if isinstance(error, EOFError) else error
            self.close()
            raise UsageError(
                f"cannot start the process that decodes pickles ({reason}); free memory or allow"
                " more processes (ulimit -u): the same command resumes"
            ) from None

    def _exchange(self, data: bytes) -> Reply:
        deadline = time.monotonic() + self.seconds
        self.channel.settimeout(self.seconds)
        self.channel.sendall(REQUEST.pack(len(data)))
        self.channel.sendall(data)

        kind, *lengths = REPLY.unpack(self._receive(REPLY.size, deadline))
        if max(lengths) > MAX_REPLY:
            self.close()
            raise ValueError(f"decoded to {max(lengths)} bytes")

        text, tail = (self._receive(length, deadline) for length in lengths)

        return kind, text, tail

    def _receive(self, length: int, deadline: float) -> bytearray:
        """Receive exactly `length` bytes; raise EOFError if fewer come, TimeoutError past the
        deadline.
        """
        content = bytearray(length)
        left = memoryview(content)
        while left:
            self.channel.settimeout(max(0.001, deadline - time.monotonic()))
            count = self.channel.recv_into(left)
            if count == 0:
                raise EOFError

            left = left[count:]

        return content

    def _end(self) -> str:
        """Make sure that the process has ended, and return how: a signal or an exit code."""
        process = self.process
        if process is None:
            return "not started"

        try:
            process.wait(1)
        except subprocess.TimeoutExpired:  # it has closed its side but still runs
            process.kill()

        self.close()
        code = process.returncode

        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
