"""Start our programs from a stage, as a user does."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# Variables that a stage has set if it started a process group itself.
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Ended:
    """Hold how a program ended: its exit code and all that it printed."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """Return the lines that tell the user the reason."""
        return [line for line in self.text.splitlines() if line.startswith("error")]

    @property
    def last(self) -> str:
        """Return the last line, for a report."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing printed"


class Program:
    """Run a program; `wait` for its end. `changes` sets variables; None removes one."""

    def __init__(
        self,
        *command: Any,
        prepare: Callable[[], None] | None = None,
        **changes: str | None,
    ) -> None:
        self.command = [str(word) for word in command]
        changed = {**os.environ, **dict.fromkeys(OF_A_LAUNCH), **changes}
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={name: value for name, value in changed.items() if value is not None},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare,
        )

    def signal(self, number: int) -> None:
        """Send a signal to the program."""
        self.process.send_signal(number)

    def wait(self) -> Ended:
        """Wait for its end, and print its output to the stage's log."""
        text, _ = self.process.communicate()
        print(f"$ {' '.join(self.command)}\n{text}", flush=True)
        return Ended(self.process.returncode, text)


def module(name: str, *flags: Any, **options: Any) -> Program:
    """Start `python -m megatron_interbert.NAME FLAGS`."""
    return Program(sys.executable, "-m", f"megatron_interbert.{name}", *flags, **options)


def until(condition: Callable[[], bool], program: Program) -> None:
    """Wait until `condition` holds or the program has ended."""
    while program.process.poll() is None and not condition():
        time.sleep(0.01)
