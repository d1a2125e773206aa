"""Measure how far the texts alone, or the images alone, answer the generated tasks, and write it
beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import VOCABULARY
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.files import write_json
from megatron_interbert.progress import progress
from megatron_interbert.tasks.answering.baselines import answer_by_image, answer_by_text
from megatron_interbert.tasks.answering.job import Metrics as AnswerMetrics
from megatron_interbert.tasks.baselines import FILE, document_of, entry_of
from megatron_interbert.tasks.flickr30k_entities.job import ENTITIES
from megatron_interbert.tasks.flickr30k_entities.samples import read_phrases
from megatron_interbert.tasks.gqa.metrics import gqa_metrics
from megatron_interbert.tasks.gqa.samples import read_questions as read_gqa
from megatron_interbert.tasks.grounding.baselines import rank_by_chance, rank_by_image
from megatron_interbert.tasks.grounding.job import Pointing, samples_by_way
from megatron_interbert.tasks.guesswhat.guesser import GUESSER, read_dialogues
from megatron_interbert.tasks.guesswhat.oracle import oracle_metrics, read_turns
from megatron_interbert.tasks.nlvr2.job import nlvr2_metrics
from megatron_interbert.tasks.nlvr2.samples import read_statements
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.refcoco.job import REFCOCO
from megatron_interbert.tasks.refcoco.refs import read_expressions
from megatron_interbert.tasks.snli_ve.job import snli_ve_metrics
from megatron_interbert.tasks.snli_ve.samples import read_pairs
from megatron_interbert.tasks.two_stores import TwoStores
from megatron_interbert.tasks.vcr.baselines import TextOnly, scores_by_overlap
from megatron_interbert.tasks.vcr.job import vcr_metrics
from megatron_interbert.tasks.vcr.samples import VcrImages
from megatron_interbert.tasks.vcr.samples import read_questions as read_vcr
from megatron_interbert.tasks.vgqa.job import vgqa_metrics
from megatron_interbert.tasks.vgqa.samples import read_questions as read_vgqa
from megatron_interbert.tasks.visual7w.job import VISUAL7W
from megatron_interbert.tasks.visual7w.samples import read_questions as read_visual7w
from megatron_interbert.tasks.vqa.job import vqa_metrics
from megatron_interbert.tasks.vqa.samples import read_annotations
from megatron_interbert.tasks.vqa.samples import read_questions as read_vqa

SPLITS = ("train", "test")
MOST_TOKENS = 64
MOST_REGIONS = 64


@dataclass(frozen=True)
class AnswerFiles:
    """Hold the files of a task with fixed answers: its figures, what reads the files of a split
    with a corpus, names of the files, the name of the store, and those of both splits, which stand
    for {} in the others.
    """

    folder: Path
    metrics: AnswerMetrics
    read: Callable[..., Records]
    names: tuple[str, ...]
    store: str = "{}"
    splits: tuple[str, str] = SPLITS

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that determine the samples of the second split."""
        return self._files(self.splits[1])

    def _files(self, split: str) -> tuple[Path, ...]:
        return tuple(self.folder / name.format(split) for name in self.names)

    def entry(self) -> dict[str, Any]:
        """Return the figures of answers by the text alone, and by the image alone."""
        corpora = [Corpus([str(self.folder / self.store.format(name))]) for name in self.splits]
        trained, asked = (
            self.read(*map(str, self._files(split)), corpus)
            for split, corpus in zip(self.splits, corpora, strict=True)
        )
        by_text = answer_by_text(trained, asked)
        by_image = answer_by_image(trained, corpora[0], asked, corpora[1])

        figures = {
            "text only": self.metrics(asked.items, by_text),
            "image only": self.metrics(asked.items, by_image),
        }
        return entry_of(self.files, len(asked), figures)


@dataclass(frozen=True)
class RegionFiles:
    """Hold the files of a task that points at regions; see AnswerFiles. A pair of stores is that of
    annotated boxes and that of detected ones.
    """

    task: Pointing
    read: Callable[[str, TwoStores], Records]
    stores: tuple[tuple[Path | None, Path | None], tuple[Path | None, Path | None]]
    splits: tuple[str, str]
    files: tuple[Path, ...]

    def entry(self) -> dict[str, Any]:
        """Return the figures of regions in a random order, and by the image alone."""
        stores = [TwoStores(*map(opened, pair), MOST_REGIONS) for pair in self.stores]
        trained, asked = (
            self.read(split, both) for split, both in zip(self.splits, stores, strict=True)
        )
        tokenizer = CaptionTokenizer(str(stores[0].corpora[0].stores[0].path / VOCABULARY))
        found: dict[str, dict[str, float]] = {"chance": {}, "image only": {}}
        of_train, of_test = (
            samples_by_way(self.task, records, both, tokenizer, MOST_TOKENS)
            for records, both in ((trained, stores[0]), (asked, stores[1]))
        )

        for end, samples in of_test.items():
            most = self.task.most
            ranked = {
                "chance": rank_by_chance(samples, most),
                "image only": rank_by_image(of_train[end], trained, samples, most),
            }
            for name, best in ranked.items():
                values = self.task.figures_of(asked, best, "plain")
                found[name] |= {f"{figure}{end}": value for figure, value in values.items()}

        return entry_of(self.files, len(asked), found)


def opened(path: Path | None) -> Corpus | None:
    """Open a store, if there is one."""
    return Corpus([str(path)]) if path else None


def tasks_in(folder: Path) -> list[AnswerFiles | RegionFiles]:
    """List the tasks of a generated world."""
    rows = (
        (vqa_metrics, vqa, ("vqa/{}_questions.json", "vqa/{}_annotations.json")),
        (gqa_metrics, gqa, ("gqa/{}_balanced_questions.json",)),
        (vgqa_metrics, vgqa, ("vgqa/{}_question_answers.json",)),
        (snli_ve_metrics, pairs, ("snli_ve/snli_ve_{}.jsonl",)),
        (nlvr2_metrics, statements, ("nlvr2/{}.json",), "nlvr2/{}", ("train", "dev")),
        (oracle_metrics, turns, ("guesswhat/guesswhat.{}.jsonl.gz",), "{}_boxes"),
    )
    return [*(AnswerFiles(folder, *row) for row in rows), *pointing_in(folder)]


def vqa(questions: str, annotations: str, corpus: Corpus) -> Records:
    """Read questions of VQA."""
    return read_vqa([questions], read_annotations([annotations]), corpus)


def gqa(questions: str, corpus: Corpus) -> Records:
    """Read questions of GQA."""
    return read_gqa([questions], corpus)


def vgqa(questions: str, corpus: Corpus) -> Records:
    """Read questions of Visual Genome."""
    return read_vgqa([questions], "valid", 0, corpus)


def pairs(annotations: str, corpus: Corpus) -> Records:
    """Read statements of SNLI-VE."""
    return read_pairs([annotations], corpus)


def statements(annotations: str, corpus: Corpus) -> Records:
    """Read statements of NLVR2."""
    return read_statements([annotations], corpus)


def turns(games: str, corpus: Corpus) -> Records:
    """Read questions to the oracle of GuessWhat."""
    return read_turns([games], corpus)


def pointing_in(folder: Path) -> Iterator[RegionFiles]:
    """Yield the tasks of a generated world that point at regions."""
    detected = folder / "train", folder / "test"
    boxes = folder / "train_boxes", folder / "test_boxes"
    both = (boxes[0], detected[0]), (boxes[1], detected[1])
    refs = folder / "refcoco" / "refs(unc).p", folder / "refcoco" / "instances.json"
    dataset = folder / "visual7w" / "dataset.json"
    entities = folder / "flickr30k_entities"
    games = folder / "guesswhat"

    yield RegionFiles(
        REFCOCO,
        lambda split, stores: read_expressions(*map(str, refs), split, stores),
        both,
        ("train", "val"),
        refs,
    )
    yield RegionFiles(
        VISUAL7W,
        lambda split, stores: read_visual7w(str(dataset), split, stores),
        both,
        SPLITS,
        (dataset,),
    )
    yield RegionFiles(
        ENTITIES,
        lambda split, stores: read_phrases(str(entities), str(entities / f"{split}.txt"), stores),
        ((None, detected[0]), (None, detected[1])),
        SPLITS,
        (entities / "test.txt",),
    )
    yield RegionFiles(
        GUESSER,
        lambda split, stores: read_dialogues([str(games / f"guesswhat.{split}.jsonl.gz")], stores),
        ((boxes[0], None), (boxes[1], None)),
        SPLITS,
        (games / "guesswhat.test.jsonl.gz",),
    )


def write_baselines(folder: Path) -> None:
    """Write the figures of all tasks of a generated world that read only one side."""
    tasks = progress(tasks_in(folder), desc="baselines of tasks", unit="task")
    write_json(folder / FILE, document_of([task.entry() for task in tasks]))


def write_vcr_baselines(folder: Path) -> None:
    """Write the figures of options of VCR that are chosen without the image."""
    stores = [VcrImages(Corpus([str(folder / split)]), None, MOST_REGIONS) for split in SPLITS]
    files = [folder / f"{split}.jsonl" for split in SPLITS]
    trained, asked = (
        read_vcr(str(file), images).items for file, images in zip(files, stores, strict=True)
    )
    figures = {
        "word overlap": vcr_metrics(asked, *scores_by_overlap(asked)),
        "text only": vcr_metrics(asked, *TextOnly(trained).scores(asked)),
    }
    write_json(folder / FILE, document_of([entry_of(files[1:], len(asked), figures)]))
