"""TensorBoard's event files, written without a thread: an error belongs to who writes."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_interbert.files import append


class Board:
    """A TensorBoard event file in a folder, of a run that begins behind `first_step`, where it is
    one.
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self.first_step = first_step
        self._begun = False

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append the scalars of a step.

        OSError where they cannot be, then none of them is there.
        """
        if not self._begun or not self.path.exists():  # somebody may have removed the folder
            self._begin()

        summary = Summary(
            value=[
                Summary.Value(tag=f"{split}/{name}", simple_value=value)
                for name, value in values.items()
            ]
        )
        append(self.path, record(Event(wall_time=time.time(), step=step, summary=summary)))

    def _begin(self) -> None:
        """Write the head, and that what an earlier run has told of later steps is void."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self.first_step is not None:
            void = SessionLog(status=SessionLog.START)
            head += record(Event(wall_time=time.time(), step=self.first_step + 1, session_log=void))

        append(self.path, head)
        self._begun = True


def record(event: Event) -> bytes:
    """Give an event as it stands in an event file."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
