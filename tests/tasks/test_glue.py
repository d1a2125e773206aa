"""Test GLUE: official files, metrics against plain arithmetic, logits against the BERT of
transformers, bad input.
"""

import itertools

import numpy as np
import pytest
import torch

from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.glue.config import GLUE_TASKS
from megatron_interbert.tasks.glue.job import (
    glue_metrics,
    labels_of,
    mean_ranks,
    metric_names,
    predict,
    prediction_lines,
)
from megatron_interbert.tasks.glue.samples import FORMATS, find_file, read_rows
from megatron_interbert.tasks.pairs import frame
from megatron_interbert.tasks.texts import FramedTexts
from megatron_interbert.training.first_weights import load_initial_weights
from tests.corpus import VOCABULARY
from tests.model.test_bert import CONFIG
from tests.shared import SHARED, needs_shared

# The header lines of the official files and one row of each, shortened.
FILES = {
    "CoLA": ("", "gj04\t1\t\tthe cat sits"),
    "SST-2": ("sentence\tlabel", "the cat \t1"),
    "MRPC": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tthe " cat\tthe dog'),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tnews\tf\t2012\t1\tn\tn\tthe cat\tthe dog\t3.800",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "9\t1\t2\tthe cat\tthe dog\t0"),
    "MNLI": (
        (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1"
            "\tsentence2\tlabel1\tgold_label"
        ),
        "0\t1\t1n\tg\t(\t(\t(\t(\tthe cat\tthe dog\tneutral\tneutral",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tthe cat\tthe dog\tentailment"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tthe cat\tthe dog\tnot_entailment"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\tthe cat\tthe dog\t1"),
}
LABELS = {
    "CoLA": 1,
    "SST-2": 1,
    "MRPC": 1,
    "STS-B": 3.8,
    "QQP": 0,
    "MNLI": 2,
    "QNLI": 0,
    "RTE": 1,
    "WNLI": 1,
}


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer(tmp_path):
    return CaptionTokenizer(write(tmp_path / "vocab.txt", *VOCABULARY))


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_official_columns(tmp_path, task):
    header, row = FILES[task]
    path = write(tmp_path / task / "train.tsv", header, row, row)
    assert (
        find_file(str(tmp_path), task, "train")
        == find_file(str(tmp_path / task), task, "train")
        == path
    )
    rows = read_rows(path, task, training=True)
    assert rows.labels.tolist() == pytest.approx([LABELS[task]] * 2)
    assert len(rows.texts[0]) == len(FORMATS[task].texts)
    assert rows.texts[0][0].startswith("the")
    assert all(text.split()[-1] in ("cat", "dog", "sits") for text in rows.texts[1])
    test = write(
        tmp_path / task / "test.tsv",
        "index\tsentence" if task == "CoLA" else header,
        "5\tthe old cat" if task == "CoLA" else row,
    )
    if task == "CoLA":
        unseen = read_rows(test, task)
        assert (unseen.texts, unseen.index, len(unseen.labels)) == ([("the old cat",)], ["5"], 0)


def test_rows_and_files_that_cannot_be_used(tmp_path):
    good = "the cat \t1"
    rows = read_rows(
        write(tmp_path / "a.tsv", "sentence\tlabel", good, "broken", " \t0"), "SST-2", training=True
    )
    assert (len(rows.texts), rows.dropped) == (1, 2)
    with pytest.raises(UsageError, match="line 3: label '2', expected one of 0, 1"):
        read_rows(write(tmp_path / "b.tsv", "sentence\tlabel", good, "the dog \t2"), "SST-2")
    with pytest.raises(UsageError, match=r"no column 'sentence1' \(found sentence, label"):
        read_rows(write(tmp_path / "c.tsv", "sentence\tlabel", good), "RTE")
    with pytest.raises(UsageError, match="no column 'label', so there is nothing to train on"):
        read_rows(
            write(tmp_path / "d.tsv", "index\tsentence", "0\tthe cat"), "SST-2", training=True
        )

    with pytest.raises(UsageError, match="score 'high', expected a number"):
        read_rows(
            write(
                tmp_path / "e.tsv", FILES["STS-B"][0], FILES["STS-B"][1].replace("3.800", "high")
            ),
            "STS-B",
        )

    with pytest.raises(
        UsageError, match="line 3 has 1 fields, expected 2; every row of a test file needs"
    ):
        read_rows(write(tmp_path / "f.tsv", "index\tsentence", "0\tthe cat", "1"), "SST-2")

    with pytest.raises(UsageError, match=r"none of .*train.tsv.*is there"):
        find_file(str(tmp_path), "RTE", "train")
    with pytest.raises(UsageError, match="no rows"):
        read_rows(write(tmp_path / "g.tsv", "sentence\tlabel"), "SST-2")


def test_framing_cuts_the_longer_text(tokenizer):
    a = np.arange(10, 22)
    b = np.arange(30, 35)
    ids, types = frame([a, b], tokenizer, 30)
    assert ids.tolist() == [tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep]
    assert types.tolist() == [0] * 14 + [1] * 6

    for room in range(4, 21):
        ids, types = frame([a, b], tokenizer, room)
        kept = [int((types == kind).sum()) - 2 + kind for kind in (0, 1)]
        assert len(ids) == len(types) == room == sum(kept) + 3
        assert kept[0] >= kept[1] - 1
        assert kept[1] == 5 or kept[0] - kept[1] in (-1, 0, 1)
        assert ids[1 : 1 + kept[0]].tolist() == a[: kept[0]].tolist()
        assert (ids == tokenizer.sep).sum() == 2, "no [SEP] is lost"


def test_metrics_are_those_of_their_definitions():
    random = np.random.default_rng(0)
    for trial in range(20):
        found, labels = random.integers(2, size=(2, 50))
        logits = np.eye(2)[found] + random.normal(size=(50, 2)) * 0.1
        tp, tn = ((found == v) & (labels == v) for v in (1, 0))
        fp = (found == 1) & (labels == 0)
        fn = (found == 0) & (labels == 1)
        tp, tn, fp, fn = (int(x.sum()) for x in (tp, tn, fp, fn))
        expected = (tp * tn - fp * fn) / np.sqrt(
            float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        )
        assert glue_metrics("CoLA", logits, labels) == {"matthews": pytest.approx(100 * expected)}
        assert glue_metrics("MRPC", logits, labels) == {
            "accuracy": pytest.approx(100 * (tp + tn) / 50),
            "f1": pytest.approx(100 * 2 * tp / (2 * tp + fp + fn)),
        }
        scores = random.normal(size=50).round(1 if trial % 2 else 8)
        truth = random.integers(6, size=50).astype(np.float32)
        values = glue_metrics("STS-B", scores[:, None], truth)
        assert values["pearson"] == pytest.approx(100 * np.corrcoef(scores, truth)[0, 1])
        by_hand = [
            np.mean([sorted(x).index(v) + 1 + i for i in range(list(x).count(v))])
            for x in (scores,)
            for v in x
        ]
        np.testing.assert_allclose(mean_ranks(scores), by_hand)
        assert values["spearman"] == pytest.approx(
            100 * np.corrcoef(mean_ranks(scores), mean_ranks(truth))[0, 1]
        )

    assert glue_metrics("CoLA", np.array([[1.0, 0.0]] * 4), np.array([0, 1, 0, 1])) == {
        "matthews": 0.0
    }, "one class only"
    assert glue_metrics("MNLI", np.eye(3), np.array([0, 1, 1])) == {
        "accuracy": pytest.approx(200 / 3)
    }
    assert [labels_of(task) for task in ("STS-B", "MNLI", "RTE")] == [1, 3, 2]
    assert metric_names("QQP") == ("accuracy", "f1")


def test_prediction_files(tmp_path):
    rows = read_rows(
        write(tmp_path / "t.tsv", "index\tsentence1\tsentence2", "0\ta\tb", "1\tb\tc"), "RTE"
    )
    lines = prediction_lines("RTE", rows, np.array([[0.1, 0.9], [0.8, 0.2]]))
    assert lines == ["index\tprediction", "0\tnot_entailment", "1\tentailment"]
    assert prediction_lines("STS-B", rows, np.array([[7.0], [-1.0]]))[1:] == [
        "0\t5.000",
        "1\t0.000",
    ]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 150,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    model = BertForSequenceClassification(
        BertConfig(**sizes, max_position_embeddings=40, num_labels=3)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)

    return folder, model


def test_same_logits_as_bert(bert, tmp_path, tokenizer):
    """Check pooler and classifier too, on sentence pairs of different lengths, with several batch
    sizes, and in file order.
    """
    folder, theirs = bert
    ours = InterBert(CONFIG, ("sentence",), num_labels=3, text_only=True)
    initialise(ours, CONFIG, 0, ParallelState())
    loaded = load_initial_weights(ours, CONFIG, str(folder), ParallelState())
    assert loaded == {name for name, _ in ours.named_parameters()}, "every weight came from BERT"
    random = np.random.default_rng(0)
    texts = [
        " ".join(random.choice(["cat", "dog", "tree", "house"], random.integers(1, 18)))
        for _ in range(40)
    ]
    lines = [f"{i}\t{a}\t{b}\tneutral" for i, (a, b) in enumerate(itertools.pairwise(texts))]
    rows = read_rows(
        write(tmp_path / "m.tsv", "index\tsentence1\tsentence2\tgold_label", *lines), "MNLI"
    )
    inputs = FramedTexts(rows.texts, tokenizer, 24)
    assert len(set(inputs.lengths())) > 5
    assert inputs.lengths().tolist() == [len(ids) for ids, _ in inputs.inputs(range(39))]

    for batch_size in (1, 7, 64):
        logits = predict(ours.eval(), inputs, ParallelState(), torch.device("cpu"), batch_size)
        for row, (ids, types) in enumerate(inputs.inputs(range(39))):
            with torch.no_grad():
                expected = theirs(
                    torch.tensor(ids)[None], token_type_ids=torch.tensor(types)[None]
                ).logits[0]

            np.testing.assert_allclose(logits[row], expected, atol=1e-5)


@needs_shared
def test_real_sst2_files():
    folder = str(SHARED / "data" / "glue")
    rows = read_rows(find_file(folder, "SST-2", "train"), "SST-2", training=True)
    assert (len(rows.texts), rows.dropped) == (60614, 0)
    assert 0.54 < rows.labels.mean() < 0.57
    assert len(read_rows(find_file(folder, "SST-2", "test"), "SST-2").texts) == 872
