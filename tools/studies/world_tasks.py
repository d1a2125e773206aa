"""Name the files of each task of a generated world (interbert make-sample --tasks), as flags."""

from pathlib import Path

SPLIT = "SPLIT"  # in a flag's value: the name of the split
NAMES = {"nlvr2": {"test": "dev"}}  # of splits
# of parts of a file that holds all
PARTS = {"refcoco": ("train", "val"), "visual7w": ("train", "test")}
MAIN = {
    "refcoco": "accuracy_gt",
    "flickr30k_entities": "R@1_det",
}  # figures; others: accuracy


def flags_of_tasks(world: Path) -> dict[str, dict[str, str]]:
    """Return the flags of each task, with SPLIT for the split."""
    regions = {"data-path": f"{world}/{SPLIT}"}
    boxes = {"annotated-path": f"{world}/{SPLIT}_boxes"}
    games = f"{world}/guesswhat/guesswhat.{SPLIT}.jsonl.gz"

    return {
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


def of_split(flags: dict[str, str], task: str, split: str) -> dict[str, str]:
    """Return the flags of a task for a split, train or test."""
    name = NAMES.get(task, {}).get(split, split)
    return {flag: value.replace(SPLIT, name) for flag, value in flags.items()}


def training_flags(flags: dict[str, str], task: str) -> dict[str, str]:
    """Return the flags of a task for training on the one split."""
    parts = {"split": PARTS[task][0]} if task in PARTS else {}
    return {**of_split(flags, task, "train"), **parts}


def evaluation_flags(flags: dict[str, str], task: str) -> dict[str, str]:
    """Return the flags of a task for evaluating on the other split."""
    parts = {"split": PARTS[task][1]} if task in PARTS else {}
    return {**of_split(flags, task, "test"), **parts}


def main_figure(task: str) -> str:
    """Return the name of a task's main figure."""
    return MAIN.get(task, "accuracy")
