"""Write TensorBoard event files without a thread, so that the writer sees its errors."""

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
    """Hold a TensorBoard event file in `folder`.

    With `first_step`, later steps that earlier files in the folder hold become void.
    """

    def __init__(self, folder: Path, first_step: int | None = None) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self.first_step = first_step
        self._begun = False

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Append the scalars of a step; on OSError none of them has been written."""
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
        """Write the file header, and the event that voids later steps of earlier files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self.first_step is not None:
            void = SessionLog(status=SessionLog.START)
            head += record(Event(wall_time=time.time(), step=self.first_step + 1, session_log=void))

        append(self.path, head)
        self._begun = True


def record(event: Event) -> bytes:
    """Return an event in the record format of event files."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
