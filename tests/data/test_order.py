"""The order of samples: the same global batches for every data-parallel size, each sample once an epoch, own partitions only."""

import numpy as np
import pytest

from megatron_interbert.data.order import MicroBatches, SampleOrder, check_partitions
from megatron_interbert.data.randomness import CounterRandom
from megatron_interbert.errors import UsageError


def global_batches(order, ranks, batch, micro, steps, consumed=0):
    """For each step the set of (epoch, sample) over all ranks, and what each rank saw."""
    streams = [iter(MicroBatches(consumed, batch, micro, rank, ranks)) for rank in range(ranks)]
    passes = batch // (micro * ranks)
    steps_seen, by_rank = [], [[] for _ in range(ranks)]
    for _ in range(steps):
        seen = []
        for rank, stream in enumerate(streams):
            mine = [order.at(p) for _ in range(passes) for p in next(stream)]
            by_rank[rank] += mine
            seen += mine
        steps_seen.append(sorted(seen))
    return steps_seen, by_rank


@pytest.mark.parametrize("samples", [160, 163, 1000])
def test_same_global_batches_for_every_layout(samples):
    order = SampleOrder(np.arange(samples), 16, seed=3)
    expected, _ = global_batches(order, 1, 16, 16, 40)
    for ranks, micro in ((1, 4), (2, 8), (2, 2), (4, 4), (8, 1), (16, 1)):
        assert global_batches(order, ranks, 16, micro, 40)[0] == expected, (ranks, micro)


def test_resume_continues_the_stream_on_another_size():
    order = SampleOrder(np.arange(500), 16, seed=3)
    whole, _ = global_batches(order, 2, 16, 8, 50)
    later, _ = global_batches(order, 8, 16, 2, 30, consumed=20 * 16)
    assert later == whole[20:]


def test_a_rank_reads_only_its_partitions():
    order = SampleOrder(np.arange(640), 16, seed=0)
    _, by_rank = global_batches(order, 4, 16, 4, 200)
    for rank, seen in enumerate(by_rank):
        assert {sample // 40 % 4 for _, sample in seen} == {rank}


def test_each_sample_once_an_epoch_and_the_tail_changes():
    order = SampleOrder(np.arange(103), 8, seed=1)
    assert order.epoch_length == 96
    dropped = []
    for epoch in range(6):
        seen = [order.at(epoch * 96 + i) for i in range(96)]
        assert {e for e, _ in seen} == {epoch}
        samples = {s for _, s in seen}
        assert len(samples) == 96
        dropped.append(frozenset(range(103)) - samples)
    assert len(set(dropped)) > 1


def test_epochs_and_seeds_shuffle_differently():
    first = SampleOrder(np.arange(200), 4, seed=1)
    epochs = [[first.at(e * 200 + i)[1] for i in range(200)] for e in range(2)]
    other = [SampleOrder(np.arange(200), 4, seed=2).at(i)[1] for i in range(200)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != other
    assert epochs[0] != sorted(epochs[0])


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match="--data-partitions 32 or less"):
        SampleOrder(np.arange(40), 64, seed=0)
    with pytest.raises(UsageError, match="does not divide"):
        check_partitions(64, 3)


def test_the_generator_is_uniform_and_keyed():
    draws = CounterRandom(1, 2, 3, 4).uniform(100_000)
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    assert np.histogram(draws, 10)[0].std() < 250
    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    assert len({CounterRandom(*key).uniform(1)[0] for key in keys}) == 5
    assert CounterRandom(1, 2, 3, 4).uniform(3).tolist() == draws[:3].tolist()


def test_the_stream_never_changes():
    """Values written down once: resuming an old run depends on them."""
    assert CounterRandom(1234, 1, 0, 7).permutation(8).tolist() == [4, 6, 3, 7, 0, 2, 1, 5]
