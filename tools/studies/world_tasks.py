"""Name the files of each task of a generated world (interbert make-sample --tasks), as flags."""

from dataclasses import dataclass, replace
from pathlib import Path

SPLIT = "SPLIT"  # in a flag's value: the name of the split


@dataclass(frozen=True)
class WorldTask:
    """Hold the finetuning of a task, its flags with SPLIT for a split's name, the names of both
    splits, the flag that chooses a part of a file that holds both, and the main figure.
    """

    command: str
    flags: dict[str, str]
    splits: tuple[str, str] = ("train", "test")
    part: str = ""
    figure: str = "accuracy"

    def training(self) -> dict[str, str]:
        """Return the flags for training."""
        return self._of(0)

    def evaluation(self) -> dict[str, str]:
        """Return the flags for evaluating on unseen scenes."""
        return self._of(1)

    def _of(self, number: int) -> dict[str, str]:
        stores = ("train", "test")[number]
        part = {self.part: self.splits[number]} if self.part else {}
        own = self.splits[number] if not self.part else stores
        found = {name: value.replace(SPLIT, own) for name, value in self.flags.items()}

        return {**found, **part}


def tasks_of(world: Path) -> dict[str, WorldTask]:
    """Return the tasks that need words and regions, by name."""
    regions = {"data-path": f"{world}/{SPLIT}"}
    boxes = {"annotated-path": f"{world}/{SPLIT}_boxes"}
    games = f"{world}/guesswhat/guesswhat.{SPLIT}.jsonl.gz"
    flags = {
        "vqa": {
            **regions,
            "questions": f"{world}/vqa/{SPLIT}_questions.json",
            "annotations": f"{world}/vqa/{SPLIT}_annotations.json",
        },
        "gqa": {**regions, "questions": f"{world}/gqa/{SPLIT}_balanced_questions.json"},
        "vgqa": {**regions, "questions": f"{world}/vgqa/{SPLIT}_question_answers.json"},
        "snli_ve": {**regions, "annotations": f"{world}/snli_ve/snli_ve_{SPLIT}.jsonl"},
        "nlvr2": {
            "data-path": f"{world}/nlvr2/{SPLIT}",
            "annotations": f"{world}/nlvr2/{SPLIT}.json",
        },
        "refcoco": {
            **regions,
            **boxes,
            "refs": f"{world}/refcoco/refs(unc).p",
            "instances": f"{world}/refcoco/instances.json",
        },
        "visual7w": {**regions, **boxes, "dataset": f"{world}/visual7w/dataset.json"},
        "flickr30k_entities": {
            **regions,
            "entities": f"{world}/flickr30k_entities",
            "images": f"{world}/flickr30k_entities/{SPLIT}.txt",
        },
        "guesswhat_guesser": {**boxes, "games": games},
        "guesswhat_oracle": {"data-path": f"{world}/{SPLIT}_boxes", "games": games},
    }
    found = {name: WorldTask(name, given) for name, given in flags.items()}
    in_parts = {"part": "split"}

    return {
        **found,
        "nlvr2": replace(found["nlvr2"], splits=("train", "dev")),
        "refcoco": replace(
            found["refcoco"], splits=("train", "val"), figure="accuracy_gt", **in_parts
        ),
        "visual7w": replace(found["visual7w"], **in_parts),
        "flickr30k_entities": replace(found["flickr30k_entities"], figure="R@1_det"),
    }


def one_sided(world: Path) -> dict[str, WorldTask]:
    """Return the tasks that one side alone answers, by name."""
    looks = {
        "data-path": f"{world}/{SPLIT}",
        "questions": f"{world}/looks/{SPLIT}_questions.json",
    }
    return {
        "rte": WorldTask("glue", {"data-path": f"{world}/glue", "task": "RTE"}),
        "looks": WorldTask("gqa", looks),
    }
