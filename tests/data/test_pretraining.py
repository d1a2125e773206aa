"""Pretraining samples: keyed by (seed, epoch, sample) alone, right negatives, packing, loader processes."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_interbert.config import RunConfig
from megatron_interbert.data.packing import Example, pack
from megatron_interbert.data.pretraining import BatchStream, PretrainingSet
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from tests.corpus import FEATURES, write_store
from tests.shared import SHARED, needs_shared


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


def dataset(path, **changes):
    config = RunConfig(data_path=str(path), data_partitions=8, micro_batch_size=4, global_batch_size=8, **changes)
    return PretrainingSet(RegionStore(str(path)), CaptionTokenizer(str(path / "vocab.txt")), config)


def same(a, b):
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(dataclasses.asdict(a).values(), dataclasses.asdict(b).values(), strict=True)
    )


def take(stream, count):
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize(("workers", "start"), [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_loader_processes_change_nothing(path, workers, start):
    expected = take(BatchStream(dataset(path, num_workers=0), 16, 8, 1, 2), 12)
    got = take(BatchStream(dataset(path, num_workers=workers, worker_start=start), 16, 8, 1, 2), 12)
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_an_error_in_a_loader_process_stays_one_clear_line(path, tmp_path):
    import shutil

    import h5py

    store = shutil.copytree(path, tmp_path / "bad")
    with h5py.File(store / "shard-00000.h5", "r+") as file:
        file["image_features"][:] = np.nan
    with pytest.raises(UsageError, match=r"^\S*shard-00000.h5: image \d+ \(image-\d+\): features hold NaN") as caught:
        take(BatchStream(dataset(store, num_workers=2), 0, 8, 0, 1), 40)
    assert caught.value.local


def test_the_same_sample_gets_the_same_mask_in_any_batch(path):
    data = dataset(path)
    for epoch, sample in ((0, 3), (2, 17)):
        first, second = data.example(epoch, sample), dataset(path).example(epoch, sample)
        np.testing.assert_array_equal(first.token_ids, second.token_ids)
        np.testing.assert_array_equal(first.hidden_regions, second.hidden_regions)
    masks = {tuple(data.example(epoch, 3).hidden_regions) for epoch in range(60)}
    assert len(masks) > 1, "epochs must differ"


def test_half_of_the_pairs_are_mismatched_with_captions_of_other_images(path):
    data = dataset(path)
    drawn = np.array([[data.draw_caption(epoch, sample), sample] for epoch in range(150) for sample in range(80)])
    mismatched = drawn[:, 0] != drawn[:, 1]
    assert abs(mismatched.mean() - 0.5) < 0.02
    image = data.store.caption_image
    assert (image[drawn[mismatched, 0]] != image[drawn[mismatched, 1]]).all()


def test_a_fifth_of_the_negatives_are_hard_where_the_file_is(tmp_path):
    path = write_store(tmp_path / "store")
    table = np.full((80, 3), -1, dtype=np.int32)
    table[:, 0] = (np.arange(80) + 40) % 80
    table[:, 1] = np.arange(80) ^ 1  # the other caption of the same image: must never be used
    np.save(path / "hard_negatives.npy", table)
    data = dataset(path)
    drawn = np.array([[data.draw_caption(epoch, sample), sample] for epoch in range(250) for sample in range(80)])
    negatives = drawn[drawn[:, 0] != drawn[:, 1]]
    hard = negatives[:, 0] == (negatives[:, 1] + 40) % 80
    by_chance = 0.8 / 78
    assert abs(hard.mean() - (0.2 + by_chance)) < 0.015
    assert (negatives[:, 0] != negatives[:, 1] ^ 1).all()
    np.save(path / "hard_negatives.npy", table[:50])
    with pytest.raises(UsageError, match="one row for each of 80 captions"):
        dataset(path)


def test_msm_on_mismatched_is_a_switch(path):
    on, off = dataset(path), dataset(path, msm_on_mismatched=False)
    for sample in range(80):
        kept, dropped = on.example(0, sample), off.example(0, sample)
        assert len(dropped.msm_labels) == (0 if dropped.mismatched else len(kept.msm_labels))


def test_targets_are_what_was_hidden(path):
    data = dataset(path)
    for sample in range(80):
        example = data.example(1, sample)
        caption = data.store.caption(data.draw_caption(1, sample))
        ids = data.tokenizer.encode(caption, 36).ids
        restored = example.token_ids.copy()
        restored[example.msm_positions] = example.msm_labels
        np.testing.assert_array_equal(restored, [data.tokenizer.cls, *ids, data.tokenizer.sep])


def test_packing_of_ragged_samples_with_and_without_images():
    random = np.random.default_rng(0)

    def example(tokens, regions, mismatched=0):
        text = {"token_ids": random.integers(0, 9, tokens), "token_types": np.zeros(tokens, np.int64), "mismatched": mismatched}
        if not regions:
            return Example(**text)
        hidden = np.arange(regions) % 2 == 0
        return Example(
            **text,
            features=random.normal(size=(regions, FEATURES)),
            locations=random.random((regions, 5)),
            class_ids=random.integers(0, 9, (regions, 2)),
            class_probs=random.random((regions, 2)),
            hidden_regions=hidden,
            msm_positions=np.array([1]),
            msm_labels=np.array([5]),
        )

    examples = [example(4, 3), example(2, 0), example(7, 1, mismatched=1), example(3, 5)]
    batch = pack(examples, FEATURES)
    assert batch.text_offsets.tolist() == [0, 4, 6, 13, 16]
    assert batch.image_offsets.tolist() == [0, 4, 4, 6, 12]
    assert (batch.max_text, batch.max_image, batch.max_joint) == (7, 6, 9)
    by_kind = torch.cat([batch.image_index, batch.text_index])
    assert torch.equal(batch.joint_order[by_kind], torch.arange(28))
    kinds = torch.cat([torch.zeros(12), torch.ones(16)])[batch.joint_order]  # 0 image, 1 text
    expected = [
        k for e in examples for k in ([0] * (len(e.features) + 1) if e.features is not None else []) + [1] * len(e.token_ids)
    ]
    assert kinds.tolist() == expected
    assert batch.locations[batch.summary_rows].tolist() == [[0, 0, 1, 1, 1]] * 3
    assert batch.hidden_regions.tolist() == [0, 2, 3, 4, 6, 8]
    assert batch.mrm_positions.tolist() == [1, 3, 7, 9, 11], "targets: hidden regions of matched samples, as image tokens"
    assert batch.msm_positions.tolist() == [1, 7, 14]
    np.testing.assert_array_equal(batch.mrm_class_ids[2:].numpy(), examples[3].class_ids[[0, 2, 4]])


def test_long_captions_keep_their_end_mark(path):
    data = dataset(path, max_tokens=5)
    for sample in range(20):
        example = data.example(0, sample)
        assert len(example.token_ids) <= 5
        assert example.token_ids[-1] == data.tokenizer.sep


def test_unusable_vocabulary_and_language_are_refused(path, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=r"no \[PAD\] in it"):
        CaptionTokenizer(str(tmp_path / "vocab.txt"))
    with pytest.raises(UsageError, match="no such file"):
        CaptionTokenizer(str(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match="--language zh"):
        dataset(path, language="zh")


@needs_shared
@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-chinese"])
def test_tokens_equal_transformers(name):
    from transformers import BertTokenizerFast

    file = SHARED / "data" / "vocab" / f"{name}-vocab.txt"
    words = file.read_text().rstrip("\n").split("\n")
    theirs = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    ours = CaptionTokenizer(str(file))
    assert ours.vocab_size == len(words) == theirs.vocab_size
    import json

    for line in (SHARED / "data" / "region_features" / "captions.jsonl").read_text().splitlines():
        caption = json.loads(line)["caption"]
        expected = theirs(caption, add_special_tokens=False)["input_ids"]
        assert ours.encode(caption, 512).ids.tolist() == expected
        assert ours.unknown not in expected or name == "bert-base-uncased"


def test_another_data_parallel_size_goes_on_with_the_same_global_batches(path):
    """Sample ids of whole steps, from the loaders of 1, 2 and 4 ranks, all after the same consumed samples."""

    def ids(ranks, micro):
        config_changes = {"num_workers": 0, "seed": 9}
        streams = []
        for rank in range(ranks):
            data = dataset(path, **config_changes)
            data.config.micro_batch_size = micro
            streams.append(iter(BatchStream(data, 24, 8, rank, ranks)))
        passes = 8 // (micro * ranks)
        return [sorted(i for stream in streams for _ in range(passes) for i in next(stream).sample_ids.tolist()) for _ in range(20)]

    assert ids(1, 8) == ids(2, 2) == ids(4, 2) == ids(8, 1)
