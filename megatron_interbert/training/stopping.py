"""What all ranks agree on after each step: whether the run ends here, and whether it is time to
save.

A signal may reach some ranks or all. Each rank only notes it; after every step all ranks vote, so
all save and end after the same step. The second Ctrl-C does not wait for that.
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
    """The vote after each step.

    One object in the main thread of each rank; it takes over signals.
    """

    def __init__(self, config: TrainConfig, state: ParallelState) -> None:
        self.config = config
        self.state = state
        self.started = self._saved = time.monotonic()
        self._noted = 0  # the first signal that came to this rank; only `_note` writes it

        # The result of the newest vote: the signal and the lapse of time for which all ranks end,
        # that in words, and whether the clock asks for a checkpoint.
        self._signal = 0
        self._late = False
        self.reason = ""
        self.save_is_due = False

        # A group on the host: the vote must not wait for the device.
        self._group = None
        if state.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

        handle_signals((*STOPPING, signal.SIGINT), self._note)
        end_at_second_interrupt(speaks=state.is_main)

        # The deepspeed command starts a process that starts the ranks; a signal to the command ends
        # it without a word to either.
        self._command = grandparent() if read_launch().launcher == "deepspeed" else 0

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT and not self._noted and self.state.is_main:
            saves = "saves and ends" if self.config.save else "ends"
            line = f"\nSIGINT: the run {saves} after this step; Ctrl-C again ends it at once\n"
            os.write(2, line.encode())

        self._noted = self._noted or number

    def agreed(self, step: int, problem: str = "") -> str:
        """Vote after a step, on all ranks: the same `reason` on all to end now, or an empty string.

        TrainingStopped on all ranks where one of them has a `problem` that ends the run.
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
        """Raise TrainingStopped on all ranks where one of them has a problem."""
        found = next((text for text in self.state.gather(problem, self._group) if text), "")
        if found:
            raise TrainingStopped(found)

    def _save_is_due(self) -> bool:
        """Tell whether the clock of rank 0 asks for a checkpoint."""
        minutes = self.config.minutes_between_saves()
        if not minutes or not self.state.is_main:
            return False
        return time.monotonic() - self._saved >= minutes * 60

    def saved(self) -> None:
        """Count the time to the next checkpoint from now on."""
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
        """The signal that ends the run, else 0."""
        return self._signal

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has reached this process, also after the last vote."""
        return signal.SIGINT in (self._noted, self._signal)

    @property
    def urgent(self) -> bool:
        """Whether a signal or the clock ends it: nothing but saving has time left."""
        return bool(self._signal) or self._late


def end_at_second_interrupt(speaks: bool) -> None:
    """End this process at its second SIGINT, whatever its main thread is doing; say so if it
    `speaks`.

    Python runs a handler between two instructions of the main thread, which may sit in a collective
    that never ends. The number of each signal is also written to a socket at once, and a thread of
    ours reads it there.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    if before != -1:  # a program around this one has its own
        signal.set_wakeup_fd(before)
        return

    # A forked loader process gets the terminal's Ctrl-C as well; it must not be counted here.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

    def count() -> None:
        interrupts = 0
        with reading, writing:  # they stay open as long as this thread runs
            while interrupts < 2:
                interrupts += reading.recv(1)[0] == signal.SIGINT

        if speaks:
            os.write(2, b"SIGINT again: ended at once\n")

        os._exit(INTERRUPTED)

    threading.Thread(target=count, name="interrupts", daemon=True).start()


def grandparent() -> int:
    """Give the process that has started the one that has started this one."""
    return psutil.Process(os.getppid()).ppid()
