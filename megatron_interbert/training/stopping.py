"""Whether a run is to end before its last step: asked by a signal, the clock or a step number, agreed on by all ranks.

A signal (signals.STOPPING) may reach some ranks or all. Each rank only notes it; after every step all ranks vote, so all save and end
after the same step.
"""

import os
import signal
import time
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_interbert.config import TrainConfig
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.signals import STOPPING, take_over


class Stopping:
    """The vote after each step. One object in the main thread of each rank; it takes over these signals."""

    def __init__(self, config: TrainConfig, state: ParallelState) -> None:
        self.config, self.state = config, state
        self.started = time.monotonic()
        self._noted = 0  # the first signal that came to this rank; only `_note` writes it, at any moment
        # The result of the newest vote: the signal and the lapse of time for which all ranks end, and that in words.
        self._signal, self._late, self.reason = 0, False, ""
        # A group on the host: the vote must not wait for the device.
        self._group = dist.new_group(backend="gloo") if state.world_size > 1 else None
        take_over(STOPPING, self._note)
        # The deepspeed command starts a process that starts the ranks; a signal to the command ends it without a word to either.
        self._command = grandparent() if read_launch().launcher == "deepspeed" else 0

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        self._noted = self._noted or number

    def agreed(self, step: int) -> str:
        """Called by all ranks after a step: the same `reason` on all to end now, or an empty string."""
        minutes = self.config.exit_duration_in_mins
        late = bool(minutes) and time.monotonic() - self.started > minutes * 60
        if self._command and grandparent() != self._command:
            self._note(signal.SIGHUP)
        vote = torch.tensor([self._noted, late], dtype=torch.int64)
        if self._group is not None:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        self._signal, self._late = int(vote[0]), bool(vote[1])
        self.reason = self._in_words(step)
        return self.reason

    def _in_words(self, step: int) -> str:
        if self._signal:
            lost = " (a terminal or a launcher has gone)" if self._signal == signal.SIGHUP else ""
            return signal.Signals(self._signal).name + lost
        if self._late:
            return f"--exit-duration-in-mins {self.config.exit_duration_in_mins:g}"
        interval = self.config.exit_interval
        return f"--exit-interval {interval}" if interval and step % interval == 0 else ""

    @property
    def preempted(self) -> bool:
        """Whether a signal ends the run."""
        return bool(self._signal)

    @property
    def urgent(self) -> bool:
        """Whether a signal or the clock ends it: nothing but saving has time left."""
        return self.preempted or self._late


def grandparent() -> int:
    """The process that has started the one that has started this one."""
    return psutil.Process(os.getppid()).ppid()
