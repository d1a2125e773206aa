"""Generate the sample corpus: a made-up world with captions in English and Chinese, to try things
out.

interbert make-sample --output sample_corpus
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable
from megatron_interbert.sample.corpus import World, write_questions, write_split
from megatron_interbert.sample.tasks.blind import write_baselines, write_vcr_baselines
from megatron_interbert.sample.tasks.world import write_world

TWO = "a mismatched pair needs another image"


@dataclass
class Options(Flags):
    """Hold the flags of make-sample."""

    GROUP: ClassVar[str] = "data"

    output: str = option("sample_corpus", "folder for the stores train/ and test/")
    train_scenes: int = option(20000, f"scenes to train on; {TWO}", least=2)
    test_scenes: int = option(200, "unseen scenes for evaluation", least=2)
    noise: float = option(0.3, "noise of the features, against prototypes of norm 1 per entry")
    seed: int = option(0, "the same seed gives the same corpus", least=0)
    vcr: bool = option(False, "also write a question about each scene in the format of VCR to vcr/")
    tasks: bool = option(
        False,
        "also write other scenes to tasks/, with annotations in the formats of VQA, GQA, NLVR2 and"
        " more",
    )
    pictures: bool = option(
        False, "also draw the scenes of --tasks, for patch features: tasks/pictures/SPLIT"
    )

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other."""
        super().check()
        if self.pictures and not self.tasks:
            raise UsageError("--pictures are of the scenes of --tasks; give both")


def run(options: Options) -> None:
    """Generate both splits."""
    folder = Path(options.output)
    check_writable(folder, "--output")
    world = World(options.seed, options.noise)

    for split, scenes in (("train", options.train_scenes), ("test", options.test_scenes)):
        write_split(world, folder, split, scenes, options.seed)
        if options.vcr:
            write_questions(world, folder, split, scenes, options.seed)

    if options.vcr:
        write_vcr_baselines(folder / "vcr")
    if options.tasks:
        sizes = {"train": options.train_scenes, "test": options.test_scenes}
        write_world(world, folder / "tasks", sizes, options.seed, options.pictures)
        write_baselines(folder / "tasks")

    print(
        f"generated corpus in {options.output}: {options.train_scenes} training and"
        f" {options.test_scenes} unseen test scenes"
        + (f"; tasks about as many scenes in {folder / 'tasks'}" if options.tasks else "")
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
