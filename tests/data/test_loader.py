"""Test loader processes: the same batches for any number of them, reused memory, and every kind of
death reported in one line.
"""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus, detector_text
from megatron_interbert.data.loader import SLOTS, BatchStream, pinned_ahead
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import TrainingStopped, UsageError
from tests.corpus import write_store
from tests.data.test_pretraining import same, take

PARTITIONS = 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Write two stores with many small shards."""
    folder = tmp_path_factory.mktemp("data")
    first = write_store(folder / "first", images=128, captions_each=2, images_per_shard=4)
    second = write_store(folder / "second", images=64, captions_each=1, images_per_shard=2, seed=1)
    return [str(first), str(second)]


def dataset(paths, **changes):
    settings = {
        "data_partitions": PARTITIONS,
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "data_epochs": "",
        **changes,
    }
    return PretrainingSet(
        Corpus(paths), CaptionTokenizer(f"{paths[0]}/vocab.txt"), RunConfig(**settings)
    )


def test_global_batches_are_the_same_for_every_layout_and_after_resume(paths):
    """Check the sample ids of each global batch with 1, 2, 4 and 8 ranks and 0 to 4 loader
    processes, from several first steps; two stores, 1 and 2 passes.
    """

    def ids(ranks, workers, consumed, steps):
        data = dataset(paths, data_epochs="1,2", micro_batch_size=16 // ranks, num_workers=workers)
        streams = [iter(BatchStream(data, consumed, 16, rank, ranks)) for rank in range(ranks)]
        found = [
            sorted(i for stream in streams for i in next(stream).sample_ids.tolist())
            for _ in range(steps)
        ]
        for stream in streams:
            stream.close()

        return found

    expected = ids(1, 0, 0, 50)
    epoch = sorted(i for batch in expected[:24] for i in batch)
    assert len(epoch) == 384
    assert epoch == sorted([*range(256), *range(256, 320), *range(256, 320)]), (
        "every sample once, those of the second store twice"
    )

    for ranks, workers in ((1, 1), (1, 4), (2, 0), (2, 3), (4, 1), (4, 2), (8, 0), (8, 1)):
        consumed = 5 * workers + ranks
        assert ids(ranks, workers, 16 * consumed, 20) == expected[consumed : consumed + 20], (
            ranks,
            workers,
        )


def test_a_rank_opens_the_shards_of_its_partitions_only(paths):
    for ranks in (2, 4):
        for rank in range(ranks):
            data = dataset(paths)
            take(BatchStream(data, 0, 16, rank, ranks, workers=0), 120)

            for store, per_partition in zip(data.corpus.stores, (4, 4), strict=True):
                wanted = {
                    p * per_partition + i
                    for p in range(rank, PARTITIONS, ranks)
                    for i in range(per_partition)
                }
                assert set(store._open) == wanted, (ranks, rank)


def test_open_files_stay_bounded(tmp_path):
    path = write_store(tmp_path / "store", images=300, captions_each=1, images_per_shard=2)
    data = dataset([str(path)])
    before = len(os.listdir("/proc/self/fd"))
    take(BatchStream(data, 0, 16, 0, 1, workers=0), 150)
    store = data.corpus.stores[0]
    assert len(store._open) == 64
    assert len(store._known) == 150, "what is known of a shard outlives its open file"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 64 + 4


def test_slots_are_used_again_only_when_their_batch_is_gone(paths):
    """Check that batches kept by the caller do not change, even if there are more than slots, and
    that dropped ones release their memory.
    """
    data = dataset(paths)
    expected = take(BatchStream(data, 0, 16, 0, 1, workers=0), 6 * SLOTS)
    stream = iter(BatchStream(data, 0, 16, 0, 1, workers=1))
    kept = [next(stream) for _ in range(3 * SLOTS)]
    assert all(same(a, b) for a, b in zip(expected, kept, strict=False)), "kept batches"
    one_row = kept[0].features[1]
    kept.clear()
    for number in range(3 * SLOTS, 6 * SLOTS):
        assert same(next(stream), expected[number])

    assert torch.equal(one_row, expected[0].features[1]), "a view alone keeps its slot"
    stream.close()


def test_a_micro_batch_that_is_settled_late_still_fits_its_slot(paths):
    """Check this because a DeepSpeed JSON may set --micro-batch-size after the samples were
    opened.
    """
    late = dataset(paths)
    known = dataset(paths, micro_batch_size=16)
    late.config.micro_batch_size = 16
    both = [
        iter(BatchStream(samples, 0, 16, 0, 1, workers=workers))
        for samples, workers in ((late, 1), (known, 0))
    ]
    kept = []

    for _ in range(SLOTS + 2):
        one, other = (next(stream) for stream in both)
        kept = [*kept[-2:], (one, other)]
        assert all(same(a, b) for a, b in kept), "earlier batches are not written over"


def test_memory_of_a_process_does_not_grow(paths):
    """Check the memory of a loader process and of this one over 1,000 batches, after the first 200
    (long form: tools/benchmark.py data).
    """

    def resident(pid):
        with open(f"/proc/{pid}/status") as handle:
            return next(int(line.split()[1]) for line in handle if line.startswith("RssAnon"))

    import multiprocessing

    stream = iter(BatchStream(dataset(paths), 0, 16, 0, 1, workers=1))
    take(stream, 200)
    pids = [os.getpid(), multiprocessing.active_children()[0].pid]
    before = [resident(pid) for pid in pids]
    for _ in range(1000):
        next(stream)

    after = [resident(pid) for pid in pids]
    stream.close()
    assert all(b - a < 4096 for a, b in zip(before, after, strict=True)), (before, after)


def test_batches_larger_than_a_pipe_do_not_block(paths):
    """Check requests and results of 20,000 samples, which fill both directions of the pipe at
    once.
    """
    stream = iter(
        BatchStream(
            dataset(paths, micro_batch_size=20_000, data_timeout=60), 0, 20_000, 0, 1, workers=1
        )
    )
    assert [len(next(stream)) for _ in range(6)] == [20_000] * 6
    stream.close()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_killed_process_is_named_at_once(paths, start):
    import multiprocessing

    stream = iter(BatchStream(dataset(paths, worker_start=start), 0, 16, 0, 1, workers=2))
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    began = time.monotonic()

    with pytest.raises(
        TrainingStopped,
        match=r"loader process \d \(pid \d+\) was killed by SIGKILL; memory may have run out",
    ) as caught:
        take(stream, 100)

    assert caught.value.local
    assert time.monotonic() - began < 20, "seconds, not the minutes of a collective's timeout"


def test_a_read_that_hangs_ends(paths):
    import multiprocessing

    stream = iter(BatchStream(dataset(paths, data_timeout=2), 0, 16, 0, 1, workers=1))
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)

    with pytest.raises(
        TrainingStopped, match="has given no batch for 2 s: the disk of the region store hangs"
    ):
        take(stream, 100)


def test_a_disk_that_fails_is_one_line(paths, tmp_path):
    """Check shards that are truncated under a running loader."""
    path = write_store(tmp_path / "store", images=64, images_per_shard=4)
    stream = iter(BatchStream(dataset([str(path)]), 0, 16, 0, 1, workers=2))
    next(stream)
    for shard in path.glob("shard-*.h5"):
        os.truncate(shard, 3000)
    with pytest.raises(UsageError, match=r"shard-\d+\.h5"):
        take(stream, 100)


def test_processes_end_with_the_one_they_work_for(paths):
    """Check that no loader process remains after the training process was killed by SIGKILL."""
    program = f"""
        import multiprocessing, sys, time
        from tests.data.test_loader import BatchStream, dataset
        stream = iter(BatchStream(dataset({paths!r}), 0, 16, 0, 1, workers=3))
        next(stream)
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.1)

    assert not any(alive(pid) for pid in pids)


def test_processes_do_not_outlive_an_unexpected_error(paths):
    """Check that a training process ends at an error outside the stream, before the first batch and
    after it, though loader processes ignore the signal by which multiprocessing ends them.
    """
    for begin in ("", "next(stream)"):
        program = f"""
            import multiprocessing
            from megatron_interbert.errors import run_entry
            from tests.data.test_loader import BatchStream, dataset

            def main():
                stream = iter(BatchStream(dataset({paths!r}), 0, 16, 0, 1, workers=2))
                {begin}
                assert len(multiprocessing.active_children()) == 2
                raise ValueError("unexpected")

            run_entry(main)
        """
        command = (sys.executable, "-c", textwrap.dedent(program))
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1
        assert ended.stderr.strip().endswith("ValueError: unexpected")


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as handle:
            return handle.read().split()[2] != "Z"
    except OSError:
        return False


def test_wrong_mixtures_are_refused(paths, tmp_path):
    for changes, message in (
        ({"data_epochs": "1"}, "expected 2 positive numbers"),
        ({"data_weights": "1,x"}, "expected numbers separated by commas"),
        ({"data_epochs": "1,-1"}, "expected 2 positive numbers"),
    ):
        with pytest.raises(UsageError, match=message):
            dataset(paths, **changes)

    with pytest.raises(UsageError, match="give only one"):
        RunConfig(data_epochs="1,1", data_weights="1,1").check()

    other = write_store(
        tmp_path / "other", images=16, seed=3, detector={"name": "another", "revision": "1"}
    )
    with pytest.raises(
        UsageError,
        match=r"features of another \(revision 1\), expected those of random \(revision 0\);"
        " use features of the expected detector, or give --allow-other-detector",
    ):
        Corpus([paths[0], str(other)])

    assert Corpus([paths[0], str(other)], allow_other_detector=True).num_images == 144


def test_text_of_a_detector() -> None:
    """Give it hashes, sizes, and boxes of a detector of their own."""
    one = {"name": "clip", "weights_sha256": "a" * 64, "size": {"height": 224, "width": 224}}
    other = {**one, "weights_sha256": "b" * 64, "size": {"height": 384, "width": 224}}
    assert detector_text(one, other) == (
        "clip (weights_sha256 aaaaaaaaaaaaaaaa, size height 224 and width 224)"
    )
    assert detector_text(one, one) == "clip"

    boxed = {**one, "boxes": {"name": "frcnn", "revision": 1}}
    again = {**one, "boxes": {"name": "frcnn", "revision": 2}}
    assert detector_text(boxed, one) == "clip (boxes frcnn (revision 1))"
    assert detector_text(boxed, again) == "clip (boxes frcnn (revision 1))"
    assert detector_text({}, one) == "a detector without a name"


def test_regions_without_labels_cannot_be_predicted(tmp_path):
    path = write_store(tmp_path / "store", images=64, soft_labels="none")
    with pytest.raises(UsageError, match="train with --objectives msm,mrfr,itm"):
        dataset([str(path)])
    assert len(dataset([str(path)], objectives="msm,itm")[[0, 1]]) == 2


def test_chunked_shards_of_others_are_read_too(tmp_path):
    """Check that a shard as another tool may write it, compressed and in float32, gives the same
    batches.
    """
    path = write_store(tmp_path / "store", images=64, images_per_shard=64)
    expected = take(BatchStream(dataset([str(path)]), 0, 16, 0, 1, workers=0), 8)
    shard = path / "shard-00000.h5"

    with h5py.File(shard, "r+") as file:
        values = file["image_features"][:]
        del file["image_features"]
        file.create_dataset(
            "image_features",
            data=values.astype(np.float32),
            chunks=(16, values.shape[1]),
            compression="gzip",
        )

    manifest = (path / "manifest.json").read_text()
    import json

    entry = json.loads(manifest)
    entry["shards"][0]["bytes"] = shard.stat().st_size
    (path / "manifest.json").write_text(json.dumps(entry))
    got = take(BatchStream(dataset([str(path)]), 0, 16, 0, 1, workers=0), 8)
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


class FakeBatch:
    """Stand in for a batch, because pinned memory needs a GPU."""

    def __init__(self, number):
        self.number = number

    def pin_memory(self):
        if self.number == 5:
            raise UsageError("a bad record")
        return ("pinned", self.number)


def test_pinning_runs_one_batch_ahead_in_order_and_passes_errors_on():
    made = []

    def batches():
        for number in range(10):
            made.append(number)
            yield FakeBatch(number)

    stream = pinned_ahead(batches())
    assert [next(stream) for _ in range(3)] == [("pinned", number) for number in range(3)]
    deadline = time.monotonic() + 5
    while made[-1] < 3 and time.monotonic() < deadline:
        time.sleep(0.01)

    assert made == [0, 1, 2, 3], "only one ahead"
    assert [next(stream)[1], next(stream)[1]] == [3, 4]
    with pytest.raises(UsageError, match="a bad record"):
        next(stream)
