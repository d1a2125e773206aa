"""Test finetuning as users run it: averaged weights, best checkpoint, early stopping, resuming, and
every task from launch to result.
"""

import csv
import json
import sys

import numpy as np
import pytest
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.retrieval.config import RetrievalConfig
from megatron_interbert.training.checkpoint import Progress
from megatron_interbert.training.optimizer import learning_rate
from megatron_interbert.weights.reader import CheckpointReader
from tests.corpus import VOCABULARY, write_store
from tests.launching import evaluate, finetune, free_ports, launch, ran, records, train
from tests.tasks.test_glue import write as write_lines
from tests.tasks.test_vcr import RECORD, write, write_regions


def refused(*command):
    code, out, err = launch(*command)
    assert code == 2, out + err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_store(tmp_path_factory.mktemp("store") / "s", images=24)
    np.save(path / "hard_images.npy", (np.arange(24)[:, None] + np.arange(1, 4)) % 24)
    return path


def flags(store, save, *more):
    return (
        *(
            "retrieval",
            "--model",
            "tiny",
            "--data-path",
            store,
            "--valid-data-path",
            store,
            "--save",
            save,
            "--micro-batch-size",
            4,
        ),
        *(
            "--global-batch-size",
            8,
            "--num-workers",
            0,
            "--log-interval",
            1,
            "--lr",
            "1e-3",
            "--max-tokens",
            20,
            *more,
        ),
    )


def test_rates_in_steps():
    config = RetrievalConfig(
        train_iters=100,
        lr=1.0,
        lr_warmup_fraction=0.1,
        lr_milestones="0.6,0.8",
        lr_decay_factor=0.1,
    )
    assert config.lr_decay_style == "multistep"
    rates = {step: learning_rate(step, config) for step in (1, 10, 11, 60, 61, 80, 81, 100)}
    assert rates == pytest.approx(
        {1: 0.1, 10: 1, 11: 1, 60: 1, 61: 0.1, 80: 0.1, 81: 0.01, 100: 0.01}
    )
    for wrong in ("0.8,0.6", "0,0.5", "x", "0.5,1"):
        with pytest.raises(UsageError, match="--lr-milestones"):
            RetrievalConfig(lr_milestones=wrong).milestones()


def test_best_and_stale_evaluations():
    progress = Progress()
    found = []
    for step, value in enumerate((2.0, 3.0, 3.0, 1.0, 4.0), 1):
        progress.step = step
        found.append((progress.note(value), progress.best_step, progress.stale))

    assert found == [(True, 1, 0), (True, 2, 0), (False, 2, 1), (False, 2, 2), (True, 5, 0)]


@pytest.mark.parametrize(("processes", "tensor", "stage"), [(1, 1, 0), (2, 1, 2), (4, 2, 3)])
def test_averaged_weights_are_the_average_of_all_steps(store, tmp_path, processes, tensor, stage):
    """Recompute the average in float64 from every step's weights, on any layout, with a resume."""
    shared = (
        "--train-iters",
        6,
        "--ema-decay",
        0.9,
        "--save-interval",
        1,
        "--keep-last",
        0,
        "--zero-stage",
        stage,
        "--tensor-model-parallel-size",
        tensor,
        "--sequence-parallel",
        "--eval-interval",
        6,
    )

    for stop in ("--exit-interval", 3), ():
        arguments = flags(store, tmp_path / "run", *shared, *stop)
        if processes == 1:
            launcher = f"--num_gpus 1 --master_port {free_ports(1)[0]}"
            code, out, err = launch(
                "bash", "launchers/finetune.sh", *arguments, LAUNCH_ARGS=launcher
            )
        else:
            code, out, err = train(processes, *arguments, module="megatron_interbert.finetune")

        assert code == 0, out + err

    readers = [CheckpointReader(tmp_path / "run" / f"global_step{step}") for step in range(1, 7)]
    for name in readers[0].names:
        average = None
        for step, reader in enumerate(readers, 1):
            decay = min(0.9, (1 + step) / (10 + step))
            weight = reader.get(name).double()

            if average is None:
                average = (
                    reader.get(name, "ema").double() - (1 - decay) * weight
                ) / decay  # recovers the initial weights from the first average

            average = decay * average + (1 - decay) * weight
            torch.testing.assert_close(
                reader.get(name, "ema").double(), average, atol=1e-6, rtol=1e-5
            )

    moved = readers[5].get("itm_head.weight") - readers[5].get("itm_head.weight", "ema")
    assert moved.abs().max() > 1e-5
    # The run evaluates the average, and so does an evaluation of its checkpoint.
    ran(
        *evaluate(
            "retrieval",
            "--load",
            tmp_path / "run" / "global_step6",
            "--data-path",
            store,
            "--max-regions",
            101,
            "--max-tokens",
            20,
        )
    )
    result = json.loads((tmp_path / "run" / "evaluation" / "retrieval" / "result.json").read_text())
    assert result["checkpoint"]["averaged"]
    assert result["protocol"] == "finetuned"
    logged = records(tmp_path / "run", "valid")[6]
    assert {name: logged[name] for name in result["metrics"]} == pytest.approx(result["metrics"])
    if stage:
        return

    figures = tmp_path / "run" / "evaluation" / "retrieval" / "result.json"
    ran(
        sys.executable,
        "tools/convert_checkpoint.py",
        tmp_path / "run" / "global_step6",
        "--averaged",
        "--to",
        "huggingface",
        "--output",
        tmp_path / "hf",
        "--results",
        figures,
    )
    assert (
        f"| retrieval, finetuned | {store / 'manifest.json'} | t2i_R@5 | {logged['t2i_R@5']:.2f} |"
        in (tmp_path / "hf" / "README.md").read_text()
    )
    ran(
        *evaluate(
            "retrieval",
            "--load",
            tmp_path / "hf",
            "--data-path",
            store,
            "--max-regions",
            101,
            "--max-tokens",
            20,
            "--output",
            tmp_path / "from-hf",
        )
    )
    assert json.loads((tmp_path / "from-hf" / "result.json").read_text())[
        "metrics"
    ] == pytest.approx(result["metrics"])


def test_early_stopping_keeps_the_best(store, tmp_path):
    """Check with a learning rate of 0, where no evaluation beats the first, that the run ends early
    and that the first checkpoint is kept and linked.
    """
    run = tmp_path / "run"
    still = (
        "--train-iters",
        40,
        "--lr",
        0,
        "--eval-interval",
        2,
        "--early-stopping",
        3,
        "--keep-last",
        1,
    )
    out = ran(*finetune(*flags(store, run, *still)))
    assert "step 8: 3 evaluations without a better t2i_R@1: the run ends" in out
    assert sorted(path.name for path in run.glob("global_step*")) == [
        "global_step2",
        "global_step8",
    ]
    assert (run / "best").resolve() == (run / "global_step2").resolve()
    assert "nothing to train" in ran(*finetune(*flags(store, run, *still)))
    assert (
        "/global_step2"
        in json.loads(
            (
                ran(
                    *evaluate(
                        "retrieval", "--load", run, "--data-path", store, "--output", tmp_path / "e"
                    )
                )
                and (tmp_path / "e" / "result.json")
            ).read_text()
        )["checkpoint"]["path"]
    )
    assert "--metric speed: expected one of t2i_R@1" in refused(
        *finetune(*flags(store, tmp_path / "other", *still, "--metric", "speed"))
    )
    assert "a run of retrieval; choose another --save" in refused(
        sys.executable,
        "-m",
        "megatron_interbert.pretrain",
        "--model",
        "tiny",
        "--data-path",
        store,
        "--save",
        run,
        "--data-partitions",
        8,
        "--max-tokens",
        20,
        "--micro-batch-size",
        8,
    )


def test_the_best_on_other_data_does_not_compare(store, tmp_path):
    """Check that a lucky result on three images does not compete with results on all images."""
    run = tmp_path / "run"
    few = ("--valid-images", 3, "--eval-interval", 2, "--keep-last", 0)
    ran(*finetune(*flags(store, run, *few, "--train-iters", 2)))
    assert (run / "best").resolve() == (run / "global_step2").resolve()

    out = ran(*finetune(*flags(store, run, "--eval-interval", 2, "--train-iters", 4)))
    assert (
        "note: the best checkpoint so far, step 2, was judged by another metric or on other"
        " validation data" in out
    )
    assert (run / "best").resolve() == (run / "global_step4").resolve()


def test_resumed_run_repeats_losses(store, tmp_path):
    shared = ("--train-iters", 6, "--epochs", 9)
    ran(*finetune(*flags(store, tmp_path / "a", *shared)))
    ran(*finetune(*flags(store, tmp_path / "b", *shared, "--exit-interval", 3)))
    ran(*finetune(*flags(store, tmp_path / "b", *shared, "--num-workers", 2)))
    first, second = (records(tmp_path / name) for name in "ab")
    assert sorted(second) == [1, 2, 3, 4, 5, 6]

    for step in first:
        assert [first[step][n] for n in ("match_loss", "grad_norm")] == [
            second[step][n] for n in ("match_loss", "grad_norm")
        ]

    told = "task 'retrievel' (did you mean 'retrieval'?), expected one of retrieval, vcr, vqa, "
    assert told in refused(*finetune("retrievel"))
    told = "error: the task is missing, expected one of retrieval, vcr, vqa, gqa,"
    assert refused(*finetune("--init-from", tmp_path / "a", "retrieval")).startswith(told)


def test_glue_from_training_to_prediction_files(tmp_path):
    """Learn in a few steps that longer sentences are good and shorter ones bad; check dev metrics,
    test predictions and wrong use.
    """
    random = np.random.default_rng(0)
    words = [word for word in VOCABULARY if word.isalpha()]

    def rows(count):
        for _ in range(count):
            label = int(random.integers(2))
            yield f"{' '.join(random.choice(words, 8 if label else 2))} \t{label}"

    folder = tmp_path / "SST-2"
    write_lines(folder / "train.tsv", "sentence\tlabel", *rows(400), "broken")
    write_lines(folder / "dev.tsv", "sentence\tlabel", *rows(60))
    write_lines(
        folder / "test.tsv",
        "index\tsentence",
        *(f"{i}\t{' '.join(words[: 8 if i % 2 else 2])}" for i in range(6)),
    )
    vocabulary = write_lines(tmp_path / "vocab.txt", *VOCABULARY)
    common = (
        "--model",
        "tiny",
        "--vocab-file",
        vocabulary,
        "--data-path",
        tmp_path,
        "--max-tokens",
        16,
        "--num-workers",
        0,
    )

    out = ran(
        *finetune(
            "glue",
            *common,
            "--lr",
            "3e-3",
            "--train-iters",
            60,
            "--save",
            tmp_path / "run",
            "--log-interval",
            20,
        )
    )
    assert "400 rows, 1 dropped" in out
    ran(*evaluate("glue", "--load", tmp_path / "run", "--data-path", tmp_path, "--max-tokens", 16))
    result = json.loads((tmp_path / "run" / "evaluation" / "glue" / "result.json").read_text())
    assert result["metrics"]["accuracy"] > 90
    assert result["data"]["files"].keys() == {str(folder / "dev.tsv")}
    ran(
        *evaluate(
            "glue",
            "--load",
            tmp_path / "run",
            "--data-path",
            tmp_path,
            "--max-tokens",
            16,
            "--split",
            "test",
        )
    )
    lines = (tmp_path / "run" / "evaluation" / "glue" / "SST-2.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", *(f"{i}\t{i % 2}" for i in range(6))]
    flags = (
        *common,
        "--train-iters",
        12,
        "--lr",
        "1e-3",
        "--no-dropout",
        "--micro-batch-size",
        8,
        "--save",
        tmp_path / "beside",
    )
    out = ran(sys.executable, "tools/compare_glue.py", *flags)
    beside = json.loads((tmp_path / "beside" / "comparison.json").read_text())
    assert beside["interbert_losses"] == pytest.approx(beside["bert_losses"], abs=2e-5), (
        "the same training as BERT's, step by step"
    )
    assert len(beside["bert_losses"]) == 12
    assert beside["interbert"] == pytest.approx(beside["bert"])
    assert f"{beside['bert']['accuracy']:.2f}" in out
    assert "finetuned on SST-2; give --task SST-2" in refused(
        *evaluate("glue", "--task", "CoLA", "--load", tmp_path / "run", "--data-path", tmp_path)
    )
    assert "--vocab-file is missing" in refused(
        *finetune("glue", "--model", "tiny", "--data-path", tmp_path)
    )
    assert "none of" in refused(*finetune("glue", *common, "--task", "RTE"))
    convert = (
        sys.executable,
        "tools/convert_checkpoint.py",
        tmp_path / "run",
        "--output",
        tmp_path / "bert",
        "--to",
    )
    assert "the text path alone (GLUE)" in refused(*convert, "huggingface")
    assert "holds no averaged weights" in refused(*convert, "bert", "--averaged")
    ran(*convert, "bert")
    ran(
        *finetune(
            "glue",
            *common,
            "--init-from",
            tmp_path / "bert",
            "--train-iters",
            1,
            "--lr",
            0,
            "--save",
            tmp_path / "again",
        )
    )
    assert records(tmp_path / "again", "valid")[1]["accuracy"] == result["metrics"]["accuracy"], (
        "classifier included"
    )
    assert "more than the model's 64 positions" in refused(
        *finetune("glue", *common[:-4], "--max-tokens", 90)
    )


def test_vcr_from_training_to_submission(tmp_path):
    names = [f"shot-{i}" for i in range(12)]
    for kind, count, seed in (("annotated", 3, 0), ("detected", 5, 1)):
        write_regions(tmp_path / kind, dict.fromkeys(names, count), seed)

    questions = [
        {**RECORD, "img_fn": f"m/{name}.jpg", "annot_id": f"val-{i}"}
        for i, name in enumerate(names)
    ]
    path = write(tmp_path / "q.jsonl", *questions, {**RECORD, "annot_id": "val-99"})
    data = (
        "--data-path",
        tmp_path / "detected",
        "--annotated-path",
        tmp_path / "annotated",
        "--max-tokens",
        24,
    )
    data += ("--max-rationale-tokens", 32)
    out = ran(
        *finetune(
            "vcr",
            "--model",
            "tiny",
            *data,
            "--annotations",
            path,
            "--valid-annotations",
            path,
            "--num-workers",
            1,
            "--lr",
            "3e-3",
            "--train-iters",
            30,
            "--global-batch-size",
            8,
            "--save",
            tmp_path / "run",
            "--ema-decay",
            0,
            "--data-partitions",
            4,
            "--eval-interval",
            30,
        )
    )
    assert (
        "12 questions; dropped 1: its image is not in the store of annotated regions"
        " (first: val-99)" in out
    )
    assert "q_ar 100.00" in out, "always the same option: learned"
    load = ("--load", tmp_path / "run", *data, "--annotations", path)
    assert "every question must be answered" in refused(*evaluate("vcr", *load, "--submission"))
    unlabelled = write(
        tmp_path / "t.jsonl", *({k: v for k, v in q.items() if "label" not in k} for q in questions)
    )
    assert "not all questions have labels" in refused(
        *evaluate("vcr", "--load", tmp_path / "run", *data, "--annotations", unlabelled)
    )
    ran(
        *evaluate(
            "vcr", "--load", tmp_path / "run", *data, "--annotations", unlabelled, "--submission"
        )
    )
    with open(tmp_path / "run" / "evaluation" / "vcr" / "submission.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))

    assert [row["annot_id"] for row in rows] == [f"val-{i}" for i in range(12)]
    assert all(
        float(row["answer_2"]) > 0.5 and float(row["rationale_conditioned_on_a2_3"]) > 0.5
        for row in rows
    )
    out = ran(*evaluate("vcr", *load))
    page = (tmp_path / "run" / "evaluation" / "vcr" / "result.html").read_text()
    assert page.count("<section>") == 12
    assert page.count("class=right") == 24
    assert "<script" not in page
