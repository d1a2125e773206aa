"""Write everything that a generated world of tasks consists of."""

from collections.abc import Mapping
from pathlib import Path

from megatron_interbert.data.store import RegionStore
from megatron_interbert.progress import progress
from megatron_interbert.sample.corpus import World
from megatron_interbert.sample.tasks.draws import Purpose, draw_for
from megatron_interbert.sample.tasks.gqa import write_gqa, write_vgqa
from megatron_interbert.sample.tasks.nlvr2 import write_nlvr2
from megatron_interbert.sample.tasks.one_sided import write_looks, write_texts
from megatron_interbert.sample.tasks.pictures import write_captions, write_pictures
from megatron_interbert.sample.tasks.pointing import (
    write_entities,
    write_guesswhat,
    write_visual7w,
)
from megatron_interbert.sample.tasks.refcoco import write_refcoco
from megatron_interbert.sample.tasks.scenes import TaskScene, draw_scene, write_scenes
from megatron_interbert.sample.tasks.snli_ve import write_snli_ve
from megatron_interbert.sample.tasks.vqa import write_vqa

FIRST_IMAGE = {"train": 1_000_000, "test": 2_000_000}
WRITERS = {
    "vqa": write_vqa,
    "gqa": write_gqa,
    "vgqa": write_vgqa,
    "snli_ve": write_snli_ve,
    "glue": write_texts,
    "looks": write_looks,
}
# what tasks call the splits
OTHER_NAMES = {
    "nlvr2": {"train": "train", "test": "dev"},
    "refcoco": {"train": "train", "test": "val"},
    "visual7w": {"train": "train", "test": "test"},
    "flickr30k_entities": {"train": "train", "test": "test"},
    "guesswhat": {"train": "train", "test": "test"},
}
WRITERS_OF_ALL = {  # of files that hold all splits, or folders that do
    "refcoco": write_refcoco,
    "visual7w": write_visual7w,
    "flickr30k_entities": write_entities,
    "guesswhat": write_guesswhat,
}
PAIRS = 4  # scenes for each couple of scenes of NLVR2


def write_world(
    world: World, folder: Path, sizes: Mapping[str, int], seed: int, pictures: bool = False
) -> None:
    """Write the stores of each split, SPLIT and SPLIT_boxes, with so many scenes, annotations for
    each task and perhaps pictures of the scenes, pictures/SPLIT/IMAGE.png, with their captions.
    """
    drawn = {split: draw_scenes(world, split, count, seed) for split, count in sizes.items()}

    for split, scenes in drawn.items():
        named = ((str(image), scene) for image, scene in scenes.items())
        shown = progress(named, total=len(scenes), desc=f"{split} scenes of tasks", unit="scene")
        write_scenes(world, folder / split, seed, iter(shown))

        for task, write in WRITERS.items():
            write(folder / task, split, scenes, seed)
        if pictures:
            write_pictures(folder / "pictures" / split, scenes)
            captions = folder / "pictures" / f"{split}_captions.jsonl"
            write_captions(RegionStore(str(folder / split)), captions)

        sets = max(len(scenes) // PAIRS, 1)
        write_nlvr2(world, folder / "nlvr2", OTHER_NAMES["nlvr2"][split], sets, seed)

    for task, write in WRITERS_OF_ALL.items():
        by_name = {OTHER_NAMES[task][split]: scenes for split, scenes in drawn.items()}
        write(folder / task, by_name, seed)


def draw_scenes(world: World, split: str, count: int, seed: int) -> dict[int, TaskScene]:
    """Draw the scenes of a split, by image number."""
    first = FIRST_IMAGE[split]
    return {
        first + number: draw_scene(world, draw_for(Purpose.SCENE, seed, first, number))
        for number in range(count)
    }
