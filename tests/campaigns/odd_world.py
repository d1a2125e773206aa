"""A small world of sound files, and every command that reads such files, with arguments that suit
it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.sample.corpus import World as SampleWorld
from megatron_interbert.sample.tasks.world import write_world
from tests.corpus import write_store
from tools.studies.world_tasks import tasks_of

# Refused even with sound files: no detector is there, and an analysis would take minutes.
ENDS_EARLY = ("tools/extract_features.py", "tools/ablate.py --model tiny --only none")


@dataclass
class Command:
    """A module or script with sound arguments; `files` are those whose file is exchanged."""

    name: str
    arguments: dict[str, str]  # by flag; names without dashes are places
    files: tuple[str, ...]

    def line(self, **changes: str) -> list[str]:
        """Its arguments, some of them changed."""
        found = []
        for flag, value in {**self.arguments, **changes}.items():
            found += [flag, value] if flag.startswith("--") else [value]
        return found


class World:
    """One sound file or folder of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = str(write_store(folder / "store", images=12))
        self.vocabulary = f"{self.store}/vocab.txt"
        names = [f"image-{number}" for number in range(12)]
        self.captions = self.lines("captions", [{"image_id": n, "caption": "a cat"} for n in names])
        self.items = self.lines("items", [{"item_id": n, "title": "a red cat"} for n in names])
        self.topics = self.lines("topics", [{"topic_id": "t", "name": "cats", "keywords": ["cat"]}])
        clicks = [{"topic_id": "t", "item_id": n, "clicked": 1} for n in names]
        self.clicks = self.lines("clicks", clicks)
        queries = [{"query_id": n, "query_text": f"cat {n}", "item_ids": [n]} for n in names]
        self.queries = self.lines("queries", queries)
        self.annotations = self.lines("vcr", [vcr_question(n) for n in names])
        result = {"metrics": {"R@1": 1.5}, "task": "retrieval", "protocol": "zero-shot"}
        self.result = self.text("result.json", json.dumps(result))
        self.settings = self.text("run.json", json.dumps({"lr": 1e-4, "train_iters": 1}))
        self.engine = self.text("engine.json", json.dumps({"train_batch_size": 2}))
        sizes = {"hidden_size": 64, "num_attention_heads": 4}
        self.sizes = self.text("sizes.json", json.dumps(sizes))
        rows = "sentence\tlabel\n" + "a cat\t1\na dog\t0\n" * 8
        self.glue = self.folder_of("glue", "train.tsv", rows)
        self.text("glue/dev.tsv", rows)
        self.photos = self.folder_of("photos", "image-1.jpg", "no picture")
        self.weights = str(folder / "weights")
        self.vcr_weights = f"{self.weights}-vcr"
        self.glue_weights = f"{self.weights}-glue"
        header = "product_id image_h image_w num_boxes boxes features class_labels query query_id"
        row = "1 4 4 0 - - - cat 7"
        kdd = "".join(line.replace(" ", "\t").replace("-", "") + "\n" for line in (header, row))
        self.kdd = self.text("kdd.tsv", kdd)
        self.answers = self.text("answers.json", '{"7": [1]}')
        self.tasks = folder / "tasks"
        write_world(SampleWorld(0, 0.3), self.tasks, {"train": 8, "test": 4}, 0)
        questions = {"questions": f"{self.tasks}/gqa/train_balanced_questions.json"}
        self.questions = self.text("questions.json", json.dumps({"gqa": questions}))
        flags = {name: tasks_of(self.tasks)[name].training() for name in ("gqa", "snli_ve")}
        self.task_flags = self.text("task_flags.json", json.dumps(flags))
        self.list = self.text("list.txt", "image-1\nimage-2\nimage-3\n")

    def text(self, name: str, text: str) -> str:
        """The path of a file with this content."""
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def lines(self, name: str, records: list) -> str:
        """The path of a file with a JSON object on each line."""
        return self.text(f"{name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def folder_of(self, name: str, file: str, text: str) -> str:
        """The path of a folder with one file in it."""
        (self.folder / name).mkdir()
        self.text(f"{name}/{file}", text)
        return str(self.folder / name)


def vcr_question(image: str) -> dict:
    """A record of VCR's annotations."""
    return {
        "objects": ["person"],
        "img_fn": image,
        "annot_id": f"train-{image}",
        "question": ["is", [0], "?"],
        "answer_choices": [["a"], ["cat"], ["the"], ["old"]],
        "answer_label": 2,
        "rationale_choices": [["a"], ["the"], ["red"], ["runs"]],
        "rationale_label": 3,
    }


def commands(world: World) -> list[Command]:
    """Every command that reads what users bring."""
    return [
        *training(world),
        *evaluations(world),
        *of_tasks(world),
        *preparations(world),
        *conversions(world),
    ]


def training(world: World) -> list[Command]:
    """What trains, and what looks at a run before it does."""
    run = {"--data-path": world.store, "--train-iters": "1", "--num-workers": "0", "--save": "out"}
    run |= {"--micro-batch-size": "2", "--data-partitions": "4", "--model": "tiny"}
    tuned = {**run, "--epochs": "1"}
    vcr = {**tuned, "--annotations": world.annotations}
    glue = {**tuned, "--task": "SST-2", "--data-path": world.glue, "--vocab-file": world.vocabulary}
    search = {**tuned, "--queries": world.queries}
    topics = {**tuned, "--topics": world.topics, "--clicks": world.clicks}

    data = ("--data-path", "--vocab-file")
    weights = ("--init-from", "--load", "--save")
    settings = ("--config", "--deepspeed_config")

    return [
        Command("pretrain", run, (*data, *weights, *settings, "--model", "--valid-data-path")),
        Command("preflight", run, ("--data-path", "--model", "--load", "--save")),
        Command("finetune retrieval", tuned, (*data, *weights, *settings, "--valid-data-path")),
        Command("finetune vcr", vcr, ("--annotations", "--annotated-path", "--valid-annotations")),
        Command("finetune glue", glue, ("--data-path",)),
        Command("finetune product_search", search, ("--queries",)),
        Command("finetune recommendation", topics, ("--topics", "--clicks")),
    ]


def of_tasks(world: World) -> list[Command]:
    """What trains and evaluates the tasks of the generated world."""
    run = {"--train-iters": "1", "--num-workers": "0", "--save": "out", "--model": "tiny"}
    run |= {"--micro-batch-size": "2", "--global-batch-size": "2", "--data-partitions": "2"}
    found = []

    for name, task in tasks_of(world.tasks).items():
        flags = {f"--{flag}": value for flag, value in task.training().items()}
        files = tuple(flag for flag in flags if flag != "--split")
        found.append(Command(f"finetune {name}", {**run, **flags}, files))

        read = {f"--{flag}": value for flag, value in task.evaluation().items()}
        read |= {"--load": f"{world.weights}-{name}", "--output": "out"}
        found.append(Command(f"evaluate {name}", read, (*files, "--load")))

    answers = {**found[0].arguments, "--answers": world.text("list.json", '["yes", "no"]')}
    several = {**run, "--task-flags": world.task_flags, "--exclude-images": world.list}
    asked = {**run, "--data-path": f"{world.tasks}/train", "--questions": world.questions}
    of_images = {"--load": world.weights, "--data-path": world.store, "--output": "out"}

    return [
        *found,
        Command("finetune vqa --min-occurrences 1", answers, ("--answers",)),
        Command("finetune multitask", several, ("--task-flags", "--exclude-images")),
        Command("pretrain --objectives msm,itm,vqa", asked, ("--questions",)),
        Command("evaluate retrieval", {**of_images, "--images": world.list}, ("--images",)),
    ]


def evaluations(world: World) -> list[Command]:
    """What uses a model that was trained."""
    read = {"--load": world.weights, "--data-path": world.store, "--output": "out"}
    vcr = {**read, "--load": world.vcr_weights, "--annotations": world.annotations}
    glue = {**read, "--load": world.glue_weights, "--task": "SST-2", "--data-path": world.glue}
    search = {**read, "--queries": world.queries}
    topics = {**read, "--topics": world.topics}
    clicks = {**topics, "--clicks": world.clicks}
    shop = {"--load": world.weights, "--data-path": world.store, "--index": "index"}
    shop |= {"--items": world.items}

    kept = ("--load", "--data-path", "--image-folder")

    return [
        Command("evaluate retrieval", read, (*kept, "--output")),
        Command("evaluate vcr", vcr, ("--annotations",)),
        Command("evaluate glue", glue, ("--data-path",)),
        Command("evaluate product_search", search, ("--queries",)),
        Command("evaluate recommendation", clicks, ("--topics", "--clicks")),
        Command("evaluate topic_scores", topics, ("--topics", "--output")),
        Command("serve --build-only", shop, (*kept, "--items", "--index", "--vocab-file")),
    ]


def preparations(world: World) -> list[Command]:
    """What makes and looks at region stores."""
    build = {"source": world.store, "--output": "out"}
    of_build = ("--captions", "--only", "--class-names", "--vocab-file", "--image-ids")
    photos = {"photos": world.photos, "--detector": world.weights, "--output": "out"}
    store = {"store": world.store}
    queries = {"source": world.kdd, "--output": "out"}

    return [
        Command("tools/build_features.py", build, ("source", "--output", *of_build)),
        Command(
            "tools/inspect_features.py",
            store,
            ("store", "--image-folder", "--class-names", "--json"),
        ),
        Command("tools/mine_negatives.py --overwrite", store, ("store",)),
        Command("tools/mine_neighbours.py", store, ("store",)),
        Command("tools/cluster_features.py --clusters 3", store, ("store", "--like")),
        Command("tools/make_queries.py", queries, ("source", "--answers")),
        Command("tools/extract_features.py", photos, ("photos", "--detector", "--captions")),
    ]


def conversions(world: World) -> list[Command]:
    """What reads weights, sizes and results."""
    convert = {"input": world.weights, "--output": "out"}
    of_convert = ("input", "--output", "--model", "--vocab-file", "--results")
    summarise = {"results": world.result, "--output": "out"}
    ablate = {"--data-path": world.store, "--test-data-path": world.store, "--output": "out"}

    return [
        Command("tools/convert_checkpoint.py --to sharded", convert, of_convert),
        Command("tools/summarise.py", summarise, ("results",)),
        Command("tools/plan.py", {"--model": world.sizes}, ("--model", "--output")),
        Command(
            "tools/ablate.py --model tiny --only none", ablate, ("--data-path", "--test-data-path")
        ),
    ]


def sound_files(world: World) -> dict[str, str]:
    """A file of JSON for each flag, to be mutated."""
    return {
        "--config": world.settings,
        "--deepspeed_config": world.engine,
        "--model": world.sizes,
        "--annotations": world.annotations,
        "--queries": world.queries,
        "--topics": world.topics,
        "--clicks": world.clicks,
        "--items": world.items,
        "--captions": world.captions,
        "--results": world.result,
        "--answers": world.answers,
        "results": world.result,
    }
