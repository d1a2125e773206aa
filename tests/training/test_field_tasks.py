"""Test the field's tasks as users run them, all in one run: from a generated world to results,
pages and submissions; resumed on another layout; images to evaluate on left out.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.sample.corpus import World
from megatron_interbert.sample.tasks.world import write_world
from megatron_interbert.tasks.registry import EVALUATED
from megatron_interbert.weights.reader import CheckpointReader
from megatron_interbert.weights.sources import open_weights
from tests.launching import finetune, free_ports, launch, ran, records

CPU = torch.device("cpu")
STEPS = 20
ONE_STEP = 10  # every task trains once


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Write a small world of tasks."""
    folder = tmp_path_factory.mktemp("world")
    write_world(World(0, 0.3), folder, {"train": 40, "test": 12}, 0)
    return folder


def files_of(world):
    """Return the flags of each task for its training and its evaluation: (shared, train, valid)."""
    refs = str(world / "refcoco" / "refs(unc).p")
    entities = world / "flickr30k_entities"
    boxes = {"annotated-path": f"{world}/SPLIT_boxes"}
    detected = {"data-path": f"{world}/SPLIT"}

    def split(task, pattern, name):
        return {name: str(world / task / pattern)}

    return {
        "vqa": {
            **detected,
            **split("vqa", "SPLIT_questions.json", "questions"),
            **split("vqa", "SPLIT_annotations.json", "annotations"),
        },
        "gqa": {**detected, **split("gqa", "SPLIT_balanced_questions.json", "questions")},
        "vgqa": {**detected, **split("vgqa", "SPLIT_question_answers.json", "questions")},
        "snli_ve": {**detected, **split("snli_ve", "snli_ve_SPLIT.jsonl", "annotations")},
        "nlvr2": {
            "data-path": f"{world}/nlvr2/SPLIT",
            **split("nlvr2", "SPLIT.json", "annotations"),
        },
        "refcoco": {
            **detected,
            **boxes,
            "refs": refs,
            "instances": f"{world}/refcoco/instances.json",
        },
        "visual7w": {**detected, **boxes, "dataset": f"{world}/visual7w/dataset.json"},
        "flickr30k_entities": {
            **detected,
            "entities": str(entities),
            "images": str(entities / "SPLIT.txt"),
        },
        "guesswhat_guesser": {
            **boxes,
            **split("guesswhat", "guesswhat.SPLIT.jsonl.gz", "games"),
        },
        "guesswhat_oracle": {
            "data-path": f"{world}/SPLIT_boxes",
            **split("guesswhat", "guesswhat.SPLIT.jsonl.gz", "games"),
        },
    }


def of_split(flags, task, split):
    """Return flags with the name of a split filled in."""
    names = {"nlvr2": {"test": "dev"}}.get(task, {})
    return {name: value.replace("SPLIT", names.get(split, split)) for name, value in flags.items()}


def training_flags(world):
    """Return the content of --task-flags: files to train and to evaluate on."""
    found = {}
    for task, flags in files_of(world).items():
        train = of_split(flags, task, "train")
        valid = of_split(flags, task, "test")
        own = {f"valid-{name}": valid[name] for name in valid if valid[name] != train[name]}
        if task in ("refcoco", "visual7w"):
            own["valid-split"] = "val" if task == "refcoco" else "test"
        if task == "vqa":
            own["min-occurrences"] = 1
        found[task] = {**train, **own, "max-tokens": 48}
    return found


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Train on all tasks at once; return the run's folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tasks.yaml").write_text(yaml.safe_dump(training_flags(world), sort_keys=False))
    out = ran(*finetune(*flags_of(folder), "--save", folder / "whole"))
    return folder, out


def flags_of(folder):
    """Return the flags of the run."""
    return (
        *("multitask", "--model", "tiny", "--task-flags", folder / "tasks.yaml"),
        *("--train-iters", STEPS, "--global-batch-size", 8, "--micro-batch-size", 2),
        *("--lr", "1e-3", "--log-interval", 1, "--num-workers", 1, "--eval-interval", STEPS),
        *("--data-partitions", 4, "--no-dropout", "--seed", 5),
    )


def test_each_step_trains_one_task_in_turn(run, world):
    folder, out = run
    tasks = list(files_of(world))
    lines = records(folder / "whole", "train")
    assert len(lines) == STEPS
    for step, entry in enumerate(lines.values()):
        trained = [name for name in tasks if f"{name}_loss" in entry]
        assert trained == [tasks[step % len(tasks)]]
        assert entry["loss"] == pytest.approx(entry[f"{trained[0]}_loss"], rel=1e-5)

    valid = records(folder / "whole", "valid")[STEPS]
    main = [valid[f"{name}_accuracy"] for name in ("vqa", "gqa", "vgqa", "snli_ve", "nlvr2")]
    main += [valid["refcoco_accuracy_gt"], valid["visual7w_accuracy"]]
    main += [valid["flickr30k_entities_R@1_det"]]
    main += [valid[f"guesswhat_{name}_accuracy"] for name in ("guesser", "oracle")]
    assert valid["mean"] == pytest.approx(np.mean(main))
    counts = ", ".join(f"{name} 0" for name in tasks)
    assert f"left out, because a task is evaluated on their images: {counts}\n" in out
    assert "do not look like annotated boxes" not in out


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_resumed_run_on_two_ranks_ends_with_the_same_weights(run, tensor):
    folder, _ = run
    parts = f"parts-{tensor}"
    flags = (*flags_of(folder), "--save", folder / parts)
    ran(*finetune(*flags, "--exit-interval", 7))
    script = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    place = ("--master-port", free_ports(1)[0], "-m", "megatron_interbert.finetune")
    layout = ("--tensor-model-parallel-size", tensor)
    out = ran(sys.executable, *script, *place, *flags, *layout)
    assert "resumed from" in out
    losses = [
        {step: entry["loss"] for step, entry in records(folder / name, "train").items()}
        for name in ("whole", parts)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    readers = [CheckpointReader(folder / n / f"global_step{STEPS}") for n in ("whole", parts)]
    competing = ("visual7w", "guesswhat_guesser")  # softmax: their bias has no gradient but noise
    unmoved = [f"task_heads.{name}.output.bias" for name in competing]
    for name in set(readers[0].names) - set(unmoved):
        one, other = (reader.get(name, "weight") for reader in readers)
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)

    valid = [records(folder / name, "valid")[STEPS] for name in ("whole", parts)]
    figures = [{k: v for k, v in of.items() if "_" in k or k == "mean"} for of in valid]
    assert figures[0] == pytest.approx(figures[1], abs=0.5), "in percent"


def evaluated(task, run, world, tmp_path, **more):
    """Evaluate a task of the run in this process; return its result and the folder."""
    kind, function = EVALUATED[task]
    flags = of_split(files_of(world)[task], task, "test")
    config = kind(
        load=str(run[0] / "whole"),
        output=str(tmp_path / task),
        **{name.replace("-", "_"): value for name, value in flags.items()},
        **more,
    )
    config.given = {"examples"}
    config.precision = "fp32"
    return function(config, ParallelState(), CPU), tmp_path / task


SUBMISSIONS = {
    "vqa": "submission.json",
    "gqa": "submission.json",
    "vgqa": "predictions.json",
    "snli_ve": "predictions.jsonl",
    "nlvr2": "submission.csv",
    "refcoco": "predictions.jsonl",
    "visual7w": "predictions.jsonl",
    "flickr30k_entities": "predictions.jsonl",
    "guesswhat_guesser": "predictions.jsonl",
    "guesswhat_oracle": "predictions.jsonl",
}


def rows_of(path):
    """Return the entries of a submission."""
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.reader(text.splitlines()))
    return json.loads(text) if path.suffix == ".json" else text.splitlines()


@pytest.mark.parametrize("task", list(SUBMISSIONS))
def test_every_task_evaluates_its_own_head(run, world, tmp_path, task):
    more = {"split": "val"} if task == "refcoco" else {}
    result, folder = evaluated(task, run, world, tmp_path, submission=True, examples=5, **more)
    written = json.loads((folder / "result.json").read_text())
    assert written["metrics"] == result["metrics"]
    valid = records(run[0] / "whole", "valid")[STEPS]
    for name, value in result["metrics"].items():
        trained = valid.get(f"{task}_{name}")
        assert trained is None or trained == pytest.approx(value), name

    assert len(rows_of(folder / SUBMISSIONS[task])) == result["samples"]
    page = (folder / "result.html").read_text()
    assert page.count("<svg role") >= 5
    assert "<script" not in page

    if task == "vqa":
        evaluated(task, run, world, tmp_path, examples=0)
        assert {path.name for path in folder.iterdir()} == {"result.json", "tensorboard"}


def test_samples_without_an_answer_do_not_count(run, world, tmp_path, capsys):
    path = world / "gqa" / "test_balanced_questions.json"
    questions = json.loads(path.read_text())
    gone = list(questions)[::3]
    for number in gone:
        del questions[number]["answer"]
    (tmp_path / "some.json").write_text(json.dumps(questions))
    (tmp_path / "others.json").write_text(
        json.dumps({n: entry for n, entry in questions.items() if n not in gone})
    )
    kind, function = EVALUATED["gqa"]
    results = [
        function(
            kind(
                load=str(run[0] / "whole"),
                output=str(tmp_path / name),
                data_path=f"{world}/test",
                questions=str(tmp_path / f"{name}.json"),
                precision="fp32",
            ),
            ParallelState(),
            CPU,
        )
        for name in ("some", "others")
    ]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"])
    assert results[0]["samples"] == len(questions)
    note = f"{len(gone)} of {len(questions)} samples have no answer and do not count"
    assert note in capsys.readouterr().out


def test_a_run_is_not_resumed_with_other_settings_of_a_task(run, tmp_path):
    folder, _ = run
    flags = yaml.safe_load((folder / "tasks.yaml").read_text())
    flags["flickr30k_entities"]["several"] = "merged"
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(flags, sort_keys=False))
    code, out, err = launch(*finetune(*flags_of(tmp_path), "--save", folder / "whole"))
    assert code == 2, out + err
    assert "files or settings of its tasks have changed since" in err


def test_images_to_evaluate_on_are_taken_out_of_all_training(world, tmp_path):
    """Plant an overlap: VQA evaluates on images that SNLI-VE and RefCOCO train on."""
    flags = training_flags(world)
    chosen = {name: flags[name] for name in ("vqa", "snli_ve", "refcoco")}
    for name in ("questions", "annotations"):
        document = json.loads(Path(flags["vqa"][name]).read_text())
        entries = [e for e in document[name] if e["image_id"] in (1_000_003, 1_000_007)]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**document, name: entries}))
        chosen["vqa"][f"valid-{name}"] = str(path)
    chosen["vqa"]["valid-data-path"] = flags["vqa"]["data-path"]
    chosen["retrieval"] = {"data-path": f"{world}/train", "valid-data-path": f"{world}/test"}
    listed = tmp_path / "listed.json"
    listed.write_text("[1000011]")
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False))
    out = ran(
        *finetune(*flags_of(tmp_path), "--train-iters", 3, "--eval-interval", 3),
        *("--exclude-images", listed),
    )
    lines = Path(flags["snli_ve"]["annotations"]).read_text().splitlines()
    gone = ("1000003", "1000007", "1000011")
    pairs = sum(json.loads(line)["Flickr30K_ID"] in gone for line in lines)
    questions = json.loads(Path(flags["vqa"]["questions"]).read_text())["questions"]
    asked = sum(str(entry["image_id"]) in gone for entry in questions)
    # of each image 6 expressions and 2 captions
    counts = f"vqa {asked}, snli_ve {pairs}, refcoco 18, retrieval 6"
    assert (
        f"training samples left out, because a task is evaluated on their images: {counts}\n" in out
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vqaa": {}}, "no task 'vqaa' (did you mean 'vqa'?)"),
        ({"snli_ve": {"lr": 1e-3}}, "snli_ve: 'lr' is a flag of the whole run"),
        (
            {"snli_ve": {"anotations": "x"}},
            "unknown key 'anotations' (did you mean 'annotations'",
        ),
        ({"snli_ve": {"epochs": 3}}, "snli_ve: 'epochs' is a flag of the whole run"),
        ({3: {}}, "no task '3'"),
        ({"snli_ve": 3}, "snli_ve is 3, expected flags with their settings"),
        ({}, "tasks.yaml: tasks to train on: vqa; expected two or more"),
        ({"glue": {"data-path": "x"}}, "none of x/train.tsv"),
    ],
)
def test_tasks_that_cannot_be_trained_together(world, tmp_path, change, message):
    flags = {"vqa": training_flags(world)["vqa"], **change}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(flags, sort_keys=False))
    code, out, err = launch(*finetune(*flags_of(tmp_path)))
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in err


def test_a_task_that_the_run_has_no_head_for(run, world, tmp_path):
    path = run[0] / "whole"
    (tmp_path / "tasks.yaml").write_text("")
    command = ("-m", "megatron_interbert.evaluate", "retrieval", "--load", path)
    code, _, err = launch(sys.executable, *command, "--data-path", world / "test")
    assert code == 2
    assert "itm_head" in err


def test_heads_are_kept_by_our_format_and_left_out_of_others(run, world, tmp_path):
    convert = (sys.executable, "tools/convert_checkpoint.py", run[0] / "whole")
    ours = ran(*convert, "--to", "sharded", "--output", tmp_path / "sharded", "--tp", 2)
    assert "left out" not in ours
    theirs = ran(*convert, "--to", "huggingface", "--output", tmp_path / "hf")
    assert "note: left out: task_heads.vqa, task_heads.gqa" in theirs
    open_weights(tmp_path / "hf")

    whole, _ = evaluated("snli_ve", run, world, tmp_path / "a", examples=0)
    flags = of_split(files_of(world)["snli_ve"], "snli_ve", "test")
    parts = [word for name, value in flags.items() for word in (f"--{name}", value)]
    command = ("-m", "megatron_interbert.evaluate", "snli_ve", "--load", tmp_path / "sharded")
    ran(sys.executable, *command, *parts, "--output", tmp_path / "b", "--examples", 0)
    again = json.loads((tmp_path / "b" / "result.json").read_text())
    assert again["metrics"] == pytest.approx(whole["metrics"])
