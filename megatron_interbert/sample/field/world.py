"""Write everything that a generated world of tasks consists of."""

from pathlib import Path

import numpy as np

from megatron_interbert.progress import progress
from megatron_interbert.sample.corpus import World
from megatron_interbert.sample.field.gqa import write_gqa, write_vgqa
from megatron_interbert.sample.field.nlvr2 import write_nlvr2
from megatron_interbert.sample.field.scenes import draw_scene, write_scenes
from megatron_interbert.sample.field.snli_ve import write_snli_ve
from megatron_interbert.sample.field.vqa import write_vqa

FIRST_IMAGE = {"train": 1_000_000, "test": 2_000_000}
WRITERS = {"vqa": write_vqa, "gqa": write_gqa, "vgqa": write_vgqa, "snli_ve": write_snli_ve}
PAIRS = 4  # scenes for each couple of scenes of NLVR2


def write_world(world: World, folder: Path, split: str, scenes: int, seed: int) -> None:
    """Write the stores of a split, SPLIT and SPLIT_boxes, and its annotations for each task."""
    first = FIRST_IMAGE[split]
    drawn = {
        first + number: draw_scene(world, np.random.default_rng([seed, 26, first, number]))
        for number in range(scenes)
    }
    named = ((str(image), scene) for image, scene in drawn.items())
    shown = progress(named, total=scenes, desc=f"{split} scenes of tasks", unit="scene")
    write_scenes(world, folder / split, seed, iter(shown))

    for task, write in WRITERS.items():
        write(folder / task, split, drawn, seed)

    of_pairs = {"train": "train", "test": "dev"}[split]
    write_nlvr2(world, folder / "nlvr2", of_pairs, max(scenes // PAIRS, 1), seed)
