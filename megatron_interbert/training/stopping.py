"""Have all ranks agree after each step whether the run ends here and whether to save.

A signal may reach some ranks or all. Each rank only notes it; after every step all ranks vote, so
that all save and end after the same step. The second Ctrl-C does not wait for the vote.
"""

import os
import signal
import socket
import threading
import time
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_interbert.config.training import TrainConfig
from megatron_interbert.errors import INTERRUPTED, TrainingStopped
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_interbert.signals import STOPPING, handle_signals


class Stopping:
    """Hold the vote after each step, and handle the signals that end a run.

    Create one per rank, in its main thread.
    """

    def __init__(self, config: TrainConfig, state: ParallelState) -> None:
        self.config = config
        self.state = state
        self.started = self._saved = time.monotonic()
        self._noted = 0  # the first signal that this rank received; only `_note` writes it

        # The result of the latest vote: the signal and the time-out that end the run, the same in
        # words, and whether a checkpoint is due by the clock.
        self._signal = 0
        self._late = False
        self.reason = ""
        self.save_is_due = False

        # A host-side group: the vote must not wait for the device.
        self._group = None
        if state.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

        handle_signals((*STOPPING, signal.SIGINT), self._note)
        end_at_second_interrupt(speaks=state.is_main)

        # The deepspeed command starts a process that starts the ranks; a signal that ends the
        # command is passed on to neither.
        self._command = grandparent() if read_launch().launcher == "deepspeed" else 0

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT and not self._noted and self.state.is_main:
            saves = "saves and ends" if self.config.save else "ends"
            line = f"\nSIGINT: the run {saves} after this step; Ctrl-C again ends it at once\n"
            os.write(2, line.encode())

        self._noted = self._noted or number

    def agreed(self, step: int, problem: str = "") -> str:
        """Vote after a step, on all ranks; return the reason to end now, the same on all, or "".

        Raises TrainingStopped on all ranks if one of them has a `problem` that ends the run.
        """
        minutes = self.config.exit_duration_in_mins
        late = bool(minutes) and time.monotonic() - self.started > minutes * 60
        if self._command and grandparent() != self._command:
            self._note(signal.SIGHUP)

        vote = torch.tensor(
            [self._noted, late, self._save_is_due(), bool(problem)], dtype=torch.int64
        )
        if self._group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)

        self._signal = int(vote[0])
        self._late = bool(vote[1])
        self.save_is_due = bool(vote[2])
        if vote[3]:
            self.agree_on(problem)

        self.reason = self._in_words(step)

        return self.reason

    def agree_on(self, problem: str) -> None:
        """Raise TrainingStopped on all ranks if one of them has a problem."""
        found = next((text for text in self.state.gather(problem, self._group) if text), "")
        if found:
            raise TrainingStopped(found)

    def _save_is_due(self) -> bool:
        """Check whether a checkpoint is due by the clock; only rank 0's counts."""
        minutes = self.config.minutes_between_saves()
        if not minutes or not self.state.is_main:
            return False
        return time.monotonic() - self._saved >= minutes * 60

    def saved(self) -> None:
        """Restart the time to the next checkpoint from now."""
        self._saved = time.monotonic()

    def _in_words(self, step: int) -> str:
        if self._signal:
            gone = ": a terminal or a launcher has gone" if self._signal == signal.SIGHUP else ""
            return signal.Signals(self._signal).name + gone

        if self._late:
            return f"--exit-duration-in-mins {self.config.exit_duration_in_mins:g}"

        interval = self.config.exit_interval

        return f"--exit-interval {interval}" if interval and step % interval == 0 else ""

    @property
    def signal_number(self) -> int:
        """Return the signal that ends the run, else 0."""
        return self._signal

    @property
    def interrupted(self) -> bool:
        """Check whether Ctrl-C has reached this process, even after the last vote."""
        return signal.SIGINT in (self._noted, self._signal)

    @property
    def urgent(self) -> bool:
        """Check whether a signal or a time limit ends the run: there is only time to save."""
        return bool(self._signal) or self._late


def end_at_second_interrupt(speaks: bool) -> None:
    """End this process at its second SIGINT, whatever its main thread is doing; print a line if it
    `speaks`.

    Python runs handlers between two instructions of the main thread, which may be stuck in a
    collective. The number of each signal is also written to a socket immediately, and a thread
    started here reads it.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    if before != -1:  # an embedding program has its own
        signal.set_wakeup_fd(before)
        return

    # Forked loader processes get the terminal's Ctrl-C too; theirs must not be counted here.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def count() -> None:
        interrupts = 0
        with reading, writing:  # open as long as this thread runs
            while interrupts < 2:
                interrupts += reading.recv(1)[0] == signal.SIGINT

        if speaks:
            os.write(2, b"SIGINT again: ended at once\n")

        os._exit(INTERRUPTED)

    threading.Thread(target=count, name="interrupts", daemon=True).start()


def grandparent() -> int:
    """Return the process id of this process's grandparent."""
    return psutil.Process(os.getppid()).ppid()
