"""Test what TensorBoard itself reads from our event files."""

import os

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_interbert.board import Board


def scalars(folder, name):
    reader = EventAccumulator(str(folder), purge_orphaned_data=True)
    reader.Reload()
    return [(event.step, pytest.approx(event.value)) for event in reader.Scalars(name)]


def test_tensorboard_reads_what_was_written(tmp_path):
    board = Board(tmp_path, first_step=0)
    for step in range(1, 5):
        board.write(step, "train", {"loss": 0.5 * step, "grad_norm": 1.0})

    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert len(scalars(tmp_path, "train/grad_norm")) == 4

    again = Board(tmp_path, first_step=2)  # a run killed at step 4 and resumed from 2
    again.path = again.path.with_name(f"{board.path.name}.later")
    again.write(3, "train", {"loss": 9.0})
    assert scalars(tmp_path, "train/loss") == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_a_record_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    """Check that no half record is left: TensorBoard would stop reading the file there."""
    board = Board(tmp_path, first_step=0)
    board.write(1, "train", {"loss": 1.0})
    write = os.write

    def full(handle, data):
        write(handle, bytes(data)[:7])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            board.write(2, "train", {"loss": 2.0})

    board.write(3, "train", {"loss": 3.0})
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (3, 3.0)]
