"""Test the order of samples: the same global batches for every data-parallel size, each sample once
per epoch, each rank in its own partitions.
"""

import numpy as np
import pytest

from megatron_interbert.data.order import (
    MicroBatches,
    SampleOrder,
    check_partitions,
    epochs_from_weights,
)
from megatron_interbert.data.randomness import CounterRandom, philox, uniforms
from megatron_interbert.errors import UsageError


def global_batches(order, ranks, batch, micro, steps, consumed=0):
    """Return the sorted (epoch, sample) of each step over all ranks, and those of each rank."""
    streams = [iter(MicroBatches(consumed, batch, micro, rank, ranks)) for rank in range(ranks)]
    passes = batch // (micro * ranks)
    steps_seen = []
    by_rank = [[] for _ in range(ranks)]

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
    order = SampleOrder([np.arange(samples)], 16, seed=3)
    expected, _ = global_batches(order, 1, 16, 16, 40)
    for ranks, micro in ((1, 4), (2, 8), (2, 2), (4, 4), (8, 1), (16, 1)):
        assert global_batches(order, ranks, 16, micro, 40)[0] == expected, (ranks, micro)


def test_resume_continues_the_stream_on_another_size():
    order = SampleOrder([np.arange(500)], 16, seed=3)
    whole, _ = global_batches(order, 2, 16, 8, 50)
    later, _ = global_batches(order, 8, 16, 2, 30, consumed=20 * 16)
    assert later == whole[20:]


def test_a_rank_reads_only_its_partitions():
    order = SampleOrder([np.arange(640)], 16, seed=0)
    _, by_rank = global_batches(order, 4, 16, 4, 200)
    for rank, seen in enumerate(by_rank):
        assert {sample // 40 % 4 for _, sample in seen} == {rank}


def test_each_sample_once_an_epoch_and_the_tail_changes():
    order = SampleOrder([np.arange(103)], 8, seed=1)
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
    first = SampleOrder([np.arange(200)], 4, seed=1)
    epochs = [[first.at(e * 200 + i)[1] for i in range(200)] for e in range(2)]
    other = [SampleOrder([np.arange(200)], 4, seed=2).at(i)[1] for i in range(200)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != other
    assert epochs[0] != sorted(epochs[0])


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match="--data-partitions 32 or less"):
        SampleOrder([np.arange(40)], 64, seed=0)
    with pytest.raises(UsageError, match="does not divide"):
        check_partitions("--data-partitions 64", 64, 3)


def test_the_generator_is_uniform_and_keyed():
    draws = CounterRandom(1, 2, 3, 4).uniform(100_000)
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    assert np.histogram(draws, 10)[0].std() < 250
    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    assert len({CounterRandom(*key).uniform(1)[0] for key in keys}) == 5
    assert CounterRandom(1, 2, 3, 4).uniform(3).tolist() == draws[:3].tolist()


def test_the_stream_never_changes():
    """Check recorded values, because resuming an old run depends on them."""
    assert CounterRandom(1234, 1, 0, 7).permutation(8).tolist() == [4, 6, 3, 7, 0, 2, 1, 5]


def test_philox_gives_the_known_answers():
    """Check the test vectors published with the algorithm (Random123, philox4x32, 10 rounds)."""
    cases = [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        words = philox(tuple(np.array([c], np.uint64) for c in counter), key)
        assert [int(w[0]) for w in words] == expected


def test_numbers_of_a_sample_depend_on_its_key_and_place_alone():
    epochs = np.array([0, 3, 3, 1 << 33])
    samples = np.array([5, 7, 5, 1 << 40])
    both = uniforms(11, epochs, samples, [(2, 0, 9), (3, 4, 6)])
    for i in range(4):
        alone = uniforms(11, epochs[i : i + 1], samples[i : i + 1], [(3, 0, 12)])[0][0]
        np.testing.assert_array_equal(both[1][i], alone[4:10])

    many = uniforms(12, np.zeros(20000, int), np.arange(20000), [(2, 0, 8)])[0]
    assert np.histogram(many, 16)[0].std() < 300
    assert abs(np.corrcoef(many.T) - np.eye(8)).max() < 0.03
    assert (
        len(
            {
                x
                for seed in (1, 2, 1 << 40)
                for x in uniforms(seed, epochs, samples, [(2, 0, 1), (9, 0, 1)])[0][:, 0]
            }
        )
        == 12
    )


def test_several_stores_share_an_epoch_as_told():
    """Check passes of 1, 2 and 0.5: in two epochs the stores' samples come 2, 4 and 1 times, in
    each partition, on any layout.
    """
    parts = [np.arange(0, 320), np.arange(320, 480), np.arange(480, 800)]
    order = SampleOrder(parts, 16, seed=3, epochs=[1, 2, 0.5])
    assert order.epoch_length == 320 + 320 + 160
    drawn = [order.at(i) for i in range(2 * order.epoch_length)]
    counts = np.bincount([sample for _, sample in drawn], minlength=800)
    assert set(counts[:320]) == {2}
    assert set(counts[320:480]) == {4}
    assert set(counts[480:]) == {1}
    assert len(set(drawn)) == len(drawn), (
        "a sample has a new pass number each time, and therefore new masks"
    )

    for position, (_, sample) in enumerate(drawn):
        store = int(np.searchsorted([320, 480], sample, side="right"))
        inside = sample - parts[store][0]
        assert inside * 16 // len(parts[store]) == position % 16, (
            "each store is cut into the same partitions"
        )

    expected, _ = global_batches(order, 1, 16, 16, 60)
    assert global_batches(order, 8, 16, 2, 60)[0] == expected
    stores = np.searchsorted([320, 480], [s for _, s in drawn[:160]], side="right")
    assert 40 < (stores == 0).sum() < 88, "mixed, not one after another"


def test_weights_are_shares_of_an_epoch():
    epochs = epochs_from_weights([0.5, 0.3, 0.2], [1000, 100, 400])
    np.testing.assert_allclose(np.array(epochs) * [1000, 100, 400], [750, 450, 300])


def test_like_lengths_meet_so_that_ranks_are_even():
    """Check with adaptive region counts that the most loaded of 8 ranks has under 2 % more tokens
    than the mean; without balancing it has over 8 %.
    """
    random = np.random.default_rng(0)
    lengths = random.integers(10, 101, 64 * 640) + random.integers(5, 30, 64 * 640)
    worst = {}

    for name, known in (("plain", None), ("even", lengths)):
        order = SampleOrder([np.arange(len(lengths))], 64, seed=1, lengths=known)
        over = []

        for step in range(100):
            loads = np.array(
                [
                    [lengths[order.at(step * 256 + i)[1]] for i in range(rank, 256, 8)]
                    for rank in range(8)
                ]
            ).sum(axis=1)
            over.append(loads.max() / loads.mean())

        worst[name] = np.mean(over)
        seen = [order.at(i)[1] for i in range(order.epoch_length)]
        assert len(set(seen)) == len(seen) == len(lengths)

    assert worst["even"] < 1.02
    assert worst["plain"] > 1.08
