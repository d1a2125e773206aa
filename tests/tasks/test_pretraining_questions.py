"""Test questions in pretraining: which answers are drawn and when, several files as one, what the
head becomes in finetuning, files that cannot be used.
"""

import json

import numpy as np
import pytest
import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.questions import Questions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.questions import read_questions
from megatron_interbert.weights.sources import open_weights
from tests.corpus import write_store
from tests.launching import evaluate, finetune, launch, pretrain, ran, records

IMAGES = 20
WORDS = ("red cat", "the old dog runs", "house")


def vqa_files(folder, answers, count=IMAGES, name="vqa"):
    """Write questions about images and ten answers to each; return the flags that name them."""
    questions = [
        {"question_id": 3 * n + k, "image_id": f"image-{n}", "question": WORDS[k]}
        for n in range(count)
        for k in range(3)
    ]
    annotations = []
    for entry in questions:
        said = answers(entry)
        best = max(sorted(set(said)), key=said.count)
        listed = [{"answer_id": i + 1, "answer": text} for i, text in enumerate(said)]
        annotations.append(
            {
                "question_id": entry["question_id"],
                "image_id": entry["image_id"],
                "multiple_choice_answer": best,
                "answers": listed,
            }
        )

    paths = folder / f"{name}_questions.json", folder / f"{name}_annotations.json"
    head = {"data_type": "other", "data_subtype": "train"}
    paths[0].write_text(json.dumps({**head, "questions": questions}))
    paths[1].write_text(json.dumps({**head, "annotations": annotations}))
    return {"questions": str(paths[0]), "annotations": str(paths[1]), "min_occurrences": 1}


def by_question(entry):
    """Return ten answers: three say something else, seven of the first question."""
    most = ("brown", "a dog", "red")[entry["question_id"] % 3]
    count = 7 if entry["question_id"] else 3
    return [most] * count + ["sometimes"] * (10 - count)


def gqa_file(folder):
    """Write questions with one answer each in the format of GQA."""
    entries = {
        str(n): {"imageId": f"image-{n}", "question": "car", "answer": ("red", "yes")[n % 2]}
        for n in range(IMAGES)
    }
    path = folder / "gqa.json"
    path.write_text(json.dumps(entries))
    return {"questions": str(path)}


@pytest.fixture
def folder(tmp_path):
    """Write a store, and a YAML that names questions in two formats."""
    write_store(tmp_path / "store", images=IMAGES)
    flags = {"vqa": vqa_files(tmp_path, by_question), "gqa": gqa_file(tmp_path)}
    (tmp_path / "questions.yaml").write_text(json.dumps(flags))
    return tmp_path


def open_set(folder, **more):
    """Open the training set of a pretraining with questions."""
    config = RunConfig(
        data_path=str(folder / "store"),
        objectives="msm,mrm,itm,vqa",
        questions=str(folder / "questions.yaml"),
        data_partitions=2,
        micro_batch_size=64,
        global_batch_size=64,
        **more,
    )
    config.given |= {"objectives", "data_partitions"}
    config.check()
    asked = read_questions(config, ParallelState())
    tokenizer = CaptionTokenizer(f"{config.data_path}/vocab.txt")
    samples = PretrainingSet(Corpus([config.data_path]), tokenizer, config, asked.questions)
    return samples, asked


def test_answers_are_drawn_by_their_scores():
    questions = Questions(
        ["a", "b", "c", "d"],
        np.arange(4),
        np.array([5, 7, 2, 9]),
        np.array([0.9, 0.3, 1.0, 0.0], np.float32),
        np.array([0, 2, 2, 3, 4]),
    )
    draws = (np.arange(1000) + 0.5) / 1000
    found = questions.draw(np.zeros(1000, np.int64), draws)
    assert set(found.tolist()) == {5, 7}
    assert (found == 5).mean() == pytest.approx(0.75, abs=0.002)
    assert questions.draw(np.array([1, 2, 3]), np.array([0.5, 0.999999, 0.5])).tolist() == [
        -1,
        2,
        -1,
    ]
    assert questions.draw(np.array([2, 2]), np.array([0.0, 1 - 1e-12])).tolist() == [2, 2]


def test_only_questions_with_their_own_image_have_answers(folder, capsys):
    samples, asked = open_set(folder)
    assert set(asked.answers.answers) == {"brown", "dog", "red", "sometimes", "yes"}
    captions = samples.first_question
    assert captions == 2 * IMAGES
    assert len(samples.samples) == captions + 4 * IMAGES

    seen = {"matched": 0, "mismatched": 0, "caption": 0}
    answers = {kind: set() for kind in range(4)}
    for start in range(0, 960, 64):
        batch = samples[list(range(start, start + 64))]
        labels = dict(zip(batch.label_owner.tolist(), batch.labels.tolist(), strict=True))
        for row, sample in enumerate(batch.sample_ids.tolist()):
            question = sample - captions
            if question < 0:
                seen["caption"] += 1
            elif batch.mismatched[row]:
                seen["mismatched"] += 1
            else:
                seen["matched"] += 1
                kind = question % 3 if question < 3 * IMAGES else 3
                answers[kind].add(asked.answers[labels.pop(row)])
                text = samples.tokenizer.encode(asked.questions.texts[question], 99).ids
                start_of = int(batch.text_offsets[row])
                shown = batch.token_ids[start_of + 1 : batch.text_offsets[row + 1] - 1]
                same = shown == torch.from_numpy(text)
                assert (same | (shown == samples.tokenizer.mask)).all()
        assert not labels, "nothing else has an answer"

    assert answers == {
        0: {"brown", "sometimes"},
        1: {"dog", "sometimes"},
        2: {"red", "sometimes"},
        3: {"red", "yes"},
    }
    assert seen["matched"] == pytest.approx(320, abs=80)
    assert seen["mismatched"] == pytest.approx(320, abs=80)
    assert seen["caption"] == pytest.approx(320, abs=80)


def test_answers_join_the_steps_of_matching(folder):
    samples, _ = open_set(folder, objective_mix="msm:1,mrm:1,itm:1")
    counts = {"msm": 0, "mrm": 0, "itm": 0}
    for step in range(20):
        pairs = samples.order.pairs(range(64 * step, 64 * step + 64), 64 * step)
        fields = samples.fields(pairs)
        counts[fields["head"]] += len(fields["labels"])
    assert counts["itm"] > 0
    assert counts["msm"] == counts["mrm"] == 0


def test_pretrained_answers_are_kept_in_finetuning(folder):
    """Pretrain, resume, evaluate at once, and finetune on VQA with other answers."""
    flags = ("--model", "tiny", "--data-path", folder / "store", "--num-workers", 0)
    flags += ("--micro-batch-size", 40, "--data-partitions", 2, "--lr", "5e-3", "--no-dropout")
    asked = ("--objectives", "msm,mrm,itm,vqa", "--questions", folder / "questions.yaml")
    save = ("--save", folder / "run", "--log-interval", 10)
    out = ran(*pretrain(*flags, *asked, *save, "--train-iters", 60))
    lines = list(records(folder / "run", "train").values())
    assert lines[-1]["vqa_loss"] < 0.8 * lines[0]["vqa_loss"]
    assert "vqa_accuracy" in lines[0]
    assert "samples; dropped" not in out

    vqa = json.loads((folder / "questions.yaml").read_text())["vqa"]
    files = ("--questions", vqa["questions"], "--annotations", vqa["annotations"])
    out = ran(
        *evaluate("vqa", "--load", folder / "run", "--data-path", folder / "store"),
        *(*files, "--output", folder / "result", "--examples", 0),
    )
    assert "accuracy" in out

    other = vqa_files(
        folder, lambda entry: ["green" if entry["question_id"] % 3 else "brown"] * 10, name="other"
    )
    out = ran(
        *finetune("vqa", "--init-from", folder / "run", "--data-path", folder / "store"),
        *("--questions", other["questions"], "--annotations", other["annotations"]),
        *("--train-iters", 1, "--micro-batch-size", 8, "--global-batch-size", 8, "--lr", "1e-9"),
        *("--num-workers", 0, "--save", folder / "tuned", "--min-occurrences", 1),
    )
    assert "knows 1 of the 2 answers; the others begin at 0" in out
    before, after = open_weights(folder / "run"), open_weights(folder / "tuned")
    name = "task_heads.vqa.output.weight"
    theirs = before.facts["task_heads"]["vqa"]["answers"].index("brown")
    ours = after.facts["task_heads"]["vqa"]["answers"].index("brown")
    torch.testing.assert_close(
        after.get(name)[ours], before.get(name)[theirs], atol=1e-6, rtol=1e-5
    )
    assert after.get(name)[1 - ours].abs().max() < 1e-6

    changed = json.loads((folder / "questions.yaml").read_text())
    (folder / "questions.yaml").write_text(json.dumps({"vqa": changed["vqa"]}))
    code, _, err = launch(*pretrain(*flags, *asked, *save, "--train-iters", 80))
    assert code == 2
    assert "made with other answers to choose from" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vqb": {}}, "no format 'vqb' (did you mean 'vqa'"),
        ({"nlvr2": {}}, "no format 'nlvr2'"),
        ({"vqa": {"questions": "nowhere.json"}}, "--annotations is missing"),
        ({"vqa": {"question": "x"}}, "'question'"),
        ({"vqa": {"lr": 1}}, "'lr' has no meaning in pretraining"),
        ({"gqa": {"questions": "nowhere.json"}}, "nowhere.json"),
        ({"gqa": {"questions": "x", "data_path": "elsewhere"}}, "'data_path' has no meaning"),
        ({"gqa": []}, "expected flags with their settings"),
        ({}, "names no files"),
    ],
)
def test_questions_that_cannot_be_used(folder, change, message):
    (folder / "questions.yaml").write_text(json.dumps(change))
    flags = ("--model", "tiny", "--data-path", folder / "store", "--train-iters", 1)
    asked = ("--objectives", "msm,itm,vqa", "--questions", folder / "questions.yaml")
    code, out, err = launch(*pretrain(*flags, *asked))
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in err
