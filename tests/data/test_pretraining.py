"""Test pretraining samples: keyed by (seed, epoch, sample) alone, valid negatives, packing, loader
processes.
"""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.packing import Example, normalised_locations, pack, to_batch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from tests.corpus import FEATURES, VOCABULARY, write_store
from tests.shared import SHARED, needs_shared


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


def dataset(path, **changes):
    config = RunConfig(
        data_path=str(path), data_partitions=8, micro_batch_size=4, global_batch_size=8, **changes
    )
    return PretrainingSet(Corpus([str(path)]), CaptionTokenizer(str(path / "vocab.txt")), config)


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
    with pytest.raises(
        UsageError, match=r"^\S*shard-00000.h5: image \d+ \(image-\d+\): features hold NaN"
    ) as caught:
        take(BatchStream(dataset(store, num_workers=2), 0, 8, 0, 1), 40)

    assert caught.value.local


def test_the_same_sample_gets_the_same_mask_in_any_batch(path):
    data = dataset(path)
    for epoch, sample in ((0, 3), (2, 17)):
        alone = data.fields([(epoch, sample)])
        among = dataset(path).fields([(1, 8), (epoch, sample), (0, 60)])
        text, image = (among[f"{kind}_offsets"][1:3] for kind in ("text", "image"))
        np.testing.assert_array_equal(alone["token_ids"], among["token_ids"][slice(*text)])
        regions = image - [1, 2]  # without one [IMG] up to its start, two to its end
        hidden = among["hidden_regions"]
        np.testing.assert_array_equal(
            alone["hidden_regions"],
            hidden[(hidden >= regions[0]) & (hidden < regions[1])] - regions[0],
        )

    masks = {tuple(data.fields([(epoch, 3)])["hidden_regions"]) for epoch in range(60)}
    assert len(masks) > 1, "epochs must differ"


def drawn_captions(data, epochs, samples=80):
    """Return (caption shown, sample) for all samples of some epochs, [epochs * samples, 2]."""
    keys = np.stack(np.meshgrid(np.arange(epochs), np.arange(samples)), axis=-1).reshape(-1, 2)
    return np.stack([data.draw_captions(keys[:, 0], keys[:, 1]), keys[:, 1]], axis=1)


def test_half_of_the_pairs_are_mismatched_with_captions_of_other_images(path):
    data = dataset(path)
    drawn = drawn_captions(data, 150)
    mismatched = drawn[:, 0] != drawn[:, 1]
    assert abs(mismatched.mean() - 0.5) < 0.02
    image = data.corpus.caption_image
    assert (image[drawn[mismatched, 0]] != image[drawn[mismatched, 1]]).all()
    counts = np.bincount(drawn[mismatched, 0], minlength=80)
    assert counts.min() > 0.5 * counts.mean(), "every caption serves as a negative"


def test_a_fifth_of_the_negatives_are_hard_where_the_file_is(tmp_path):
    path = write_store(tmp_path / "store")
    table = np.full((80, 3), -1, dtype=np.int32)
    table[:, 0] = (np.arange(80) + 40) % 80
    table[:, 1] = np.arange(80) ^ 1  # the other caption of the same image: must never be used
    np.save(path / "hard_negatives.npy", table)
    data = dataset(path)
    drawn = drawn_captions(data, 250)
    negatives = drawn[drawn[:, 0] != drawn[:, 1]]
    hard = negatives[:, 0] == (negatives[:, 1] + 40) % 80
    by_chance = 0.8 / 78
    assert abs(hard.mean() - (0.2 + by_chance)) < 0.015
    assert (negatives[:, 0] != negatives[:, 1] ^ 1).all()
    np.save(path / "hard_negatives.npy", table[:50])
    with pytest.raises(UsageError, match="one row for each of 80 captions"):
        dataset(path)


def test_msm_on_mismatched_is_a_switch(path):
    on = dataset(path)
    off = dataset(path, msm_on_mismatched=False)

    for sample in range(80):
        kept = on.fields([(0, sample)])
        dropped = off.fields([(0, sample)])
        assert len(dropped["msm_labels"]) == (
            0 if dropped["mismatched"][0] else len(kept["msm_labels"])
        )


def test_targets_are_what_was_hidden(path):
    data = dataset(path)
    for sample in range(80):
        fields = data.fields([(1, sample)])
        caption = data.corpus.caption(int(data.draw_captions(np.array([1]), np.array([sample]))[0]))
        ids = data.tokenizer.encode(caption, 36).ids
        restored = fields["token_ids"].copy()
        restored[fields["msm_positions"]] = fields["msm_labels"]
        np.testing.assert_array_equal(restored, [data.tokenizer.cls, *ids, data.tokenizer.sep])


def test_a_batch_is_what_pack_makes_of_its_samples(path):
    """Check the fields of a whole batch against single samples, read by the plain reader and laid
    end to end.
    """
    data = dataset(path, max_regions=5)
    pairs = [(0, 3), (1, 40), (0, 79), (5, 0), (2, 16)]
    whole = to_batch(data.fields(pairs))
    examples = []

    for epoch, sample in pairs:
        one = data.fields([(epoch, sample)])
        regions = data.corpus.stores[0].read(int(data.corpus.caption_image[sample]), 5)
        hidden = np.zeros(len(regions.features), bool)
        hidden[one["hidden_regions"]] = True
        examples.append(
            Example(
                token_ids=one["token_ids"],
                token_types=one["token_types"],
                features=regions.features,
                locations=normalised_locations(regions.boxes, regions.size),
                class_ids=regions.class_ids,
                class_probs=regions.class_probs,
                hidden_regions=hidden,
                msm_positions=one["msm_positions"],
                msm_labels=one["msm_labels"],
                mismatched=int(one["mismatched"][0]),
                sample_id=sample,
            )
        )

    assert same(whole, pack(examples, FEATURES))


def test_packing_of_ragged_samples_with_and_without_images():
    random = np.random.default_rng(0)

    def example(tokens, regions, mismatched=0):
        text = {
            "token_ids": random.integers(0, 9, tokens),
            "token_types": np.zeros(tokens, np.int64),
            "mismatched": mismatched,
        }
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
        k
        for e in examples
        for k in ([0] * (len(e.features) + 1) if e.features is not None else [])
        + [1] * len(e.token_ids)
    ]
    assert kinds.tolist() == expected
    assert batch.locations[batch.summary_rows].tolist() == [[0, 0, 1, 1, 1]] * 3
    assert batch.hidden_regions.tolist() == [0, 2, 3, 4, 6, 8]
    assert batch.mrm_positions.tolist() == [
        1,
        3,
        7,
        9,
        11,
    ], "targets: hidden regions of matched samples, as image tokens"
    assert batch.msm_positions.tolist() == [1, 7, 14]
    np.testing.assert_array_equal(batch.mrm_class_ids[2:].numpy(), examples[3].class_ids[[0, 2, 4]])


def test_long_captions_keep_their_end_mark(path):
    data = dataset(path, max_tokens=5)
    fields = data.fields([(0, sample) for sample in range(20)])
    lengths = np.diff(fields["text_offsets"])
    assert lengths.max() == 5
    assert (fields["token_ids"][fields["text_offsets"][1:] - 1] == data.tokenizer.sep).all()
    assert (fields["token_ids"][fields["text_offsets"][:-1]] == data.tokenizer.cls).all()


def test_stored_tokens_equal_those_made_while_loading(path, tmp_path):
    """Check the store's token file against another vocabulary, tokenised while loading, and both
    kinds of stores together.
    """
    other = tmp_path / "other.txt"
    other.write_text((path / "vocab.txt").read_text() + "zebra\n")
    stored, live = (CaptionTokenizer(str(file)) for file in (path / "vocab.txt", other))
    corpus = Corpus([str(path)])
    assert corpus.stores[0].captions.token_vocabulary == stored.sha256 != live.sha256
    captions = np.array([5, 79, 0, 5, 33])

    for longest in (3, 34):
        one, two = (corpus.tokens(captions, tokenizer, longest) for tokenizer in (stored, live))
        for name in ("ids", "word_starts", "offsets"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))

    for number, caption in enumerate(captions):
        alone = stored.encode(corpus.caption(int(caption)), 36)
        np.testing.assert_array_equal(
            one.ids[one.offsets[number] : one.offsets[number + 1]], alone.ids
        )
        starts = one.word_starts[one.offsets[number] : one.offsets[number + 1]]
        np.testing.assert_array_equal(np.cumsum(starts) - 1, alone.words)

    build = write_store(
        tmp_path / "second", images=8, vocabulary="\n".join([*VOCABULARY, "zebra"]) + "\n"
    )
    both = Corpus([str(path), str(build)])
    mixed = both.tokens(np.array([90, 3, 81]), stored, 34)

    for number, caption in enumerate((90, 3, 81)):
        expected = stored.encode(both.caption(caption), 36).ids
        np.testing.assert_array_equal(
            mixed.ids[mixed.offsets[number] : mixed.offsets[number + 1]], expected
        )


def test_unusable_vocabulary_and_language_are_refused(path, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match=r"has no \[PAD\]"):
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
    """Check the sample ids of whole steps from the loaders of 1, 2, 4 and 8 ranks, all resuming
    after the same number of samples.
    """

    def ids(ranks, micro):
        config_changes = {"num_workers": 0, "seed": 9}
        streams = []

        for rank in range(ranks):
            data = dataset(path, **config_changes)
            data.config.micro_batch_size = micro
            streams.append(iter(BatchStream(data, 24, 8, rank, ranks)))

        passes = 8 // (micro * ranks)

        return [
            sorted(
                i
                for stream in streams
                for _ in range(passes)
                for i in next(stream).sample_ids.tolist()
            )
            for _ in range(20)
        ]

    assert ids(1, 8) == ids(2, 2) == ids(4, 2) == ids(8, 1)
