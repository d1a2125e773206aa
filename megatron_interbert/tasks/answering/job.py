"""Build the job that finetunes on a task which chooses one of fixed answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.heads import TaskHead
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.answering.config import AnswerConfig, EvaluateAnswersConfig
from megatron_interbert.tasks.answering.prediction import predict
from megatron_interbert.tasks.answering.records import Record
from megatron_interbert.tasks.answering.samples import AnswerSamples, AnswerSet, Targets
from megatron_interbert.tasks.answering.task import AnswerTask
from megatron_interbert.tasks.answering.vocabulary import AnswerList
from megatron_interbert.tasks.config import refuse_idle_stores
from megatron_interbert.tasks.overlaps import image_names, leave_out
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.task import Evaluate, Job
from megatron_interbert.tasks.task_flags import own_settings

Metrics = Callable[[Sequence[Record], Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Answering:
    """Describe a task that chooses one of fixed answers.

    `soft`: a sample may have several right answers, each with a score. `images`: how many a sample
    has, and `side_by_side` whether it shows them as one; `samples` lays them out. `metrics`
    computes the task's figures in percent from records and the answers given to them; `figures` are
    the names that are always among them, the main one first; `check` raises UsageError for records
    of which they cannot be computed.
    """

    name: str
    metrics: Metrics
    figures: tuple[str, ...] = ("accuracy",)
    soft: bool = False
    images: int = 1
    side_by_side: bool = False
    samples: type[AnswerSamples] = AnswerSamples
    check: Callable[[Records], None] = lambda records: None

    @property
    def rows(self) -> int:
        """Return the batch rows of a sample."""
        return 1 if self.side_by_side else self.images

    def head(self, answers: AnswerList) -> TaskHead:
        """Return the head for some answers."""
        return TaskHead("answers", len(answers), self.rows)

    def record(self, answers: AnswerList) -> dict[str, object]:
        """Return what a checkpoint keeps of the head."""
        return {
            "answers": list(answers.answers),
            "rows": self.rows,
            "side_by_side": self.side_by_side,
        }

    def lay_out(
        self,
        records: Records,
        corpus: Corpus,
        tokenizer: CaptionTokenizer,
        config: AnswerConfig | EvaluateAnswersConfig,
    ) -> AnswerSamples:
        """Return what makes batches of records."""
        return self.samples(
            self.name,
            records,
            corpus,
            tokenizer,
            config.max_tokens,
            config.max_regions,
            self.side_by_side,
        )

    def figures_of(self, records: Records, given: Sequence[str]) -> dict[str, float]:
        """Return the figures of the answers given to records, of those whose right answers are
        known; none if no one is.
        """
        known = records.known()
        if not known:
            return {}

        return self.metrics([records.items[row] for row in known], [given[row] for row in known])


@dataclass
class Opened:
    """Hold what finetuning on a task has opened: images, vocabulary, and the model's sizes."""

    corpus: Corpus
    tokenizer: CaptionTokenizer
    sizes: ModelConfig


def open_run(config: AnswerConfig) -> Opened:
    """Open the stores and the vocabulary of a finetuning."""
    corpus = open_stores(config.stores(), config)
    tokenizer = vocabulary_of_run(config, config.stores())
    return Opened(corpus, tokenizer, fitted_sizes(config, tokenizer, corpus))


def open_valid(config: AnswerConfig, corpus: Corpus) -> Corpus:
    """Open the stores of the validation images, by default those of the training images."""
    if not config.valid_data_path:
        return corpus

    valid = open_stores(config.valid_stores(), config)
    corpus.check_alike(valid.stores[0], config.allow_other_detector, "--valid-data-path")
    return valid


def answer_job(
    task: Answering,
    config: AnswerConfig,
    state: ParallelState,
    opened: Opened,
    answers: AnswerList,
    records: Records,
    files: Sequence[str],
    valid: tuple[Records, Corpus] | None = None,
) -> Job:
    """Build the job that trains on `records`, which `files` determine, and evaluates on `valid`.

    Samples without answers are dropped and counted. Raises UsageError if none is left, or if the
    head could give none of the answers.
    """
    records = records.labelled("answer")

    def make_set(records: Records) -> AnswerSet:
        samples = task.lay_out(records, opened.corpus, opened.tokenizer, config)
        return AnswerSet(samples, Targets(records, answers), config)

    samples = make_set(records)
    say_samples(state, records, samples.targets, answers)
    data = describe_data(opened.tokenizer, opened.corpus, files, task.name)
    data["task_heads"] = {task.name: {**task.record(answers), "settings": own_settings(config)}}

    job = Job(
        AnswerTask(task.name, task.rows, task.soft),
        samples,
        opened.sizes,
        (),
        data,
        opened.tokenizer.vocab_file,
        model_options={"task_heads": {task.name: task.head(answers)}},
        metric=config.metric or task.figures[0],
        figures=task.figures,
        patience=config.early_stopping,
    )
    job.leave_out = partial(leave_out, job, make_set, records)
    if valid is None:
        refuse_idle_stores(config)
    else:
        judged = valid[0].labelled("answer")
        job.judged_images = image_names(judged)
        shown = task.lay_out(judged, valid[1], opened.tokenizer, config)
        job.evaluate = evaluation_of(task, config, state, judged, shown, answers)

    return job


def evaluation_of(
    task: Answering,
    config: AnswerConfig,
    state: ParallelState,
    judged: Records,
    shown: AnswerSamples,
    answers: AnswerList,
) -> Evaluate:
    """Return a function that evaluates a model on records, which `shown` lays out."""
    task.check(judged)
    if state.is_main:
        print(judged.report(), flush=True)

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        predictions = predict(model, shown, task.soft, state, device, config.eval_batch_size)
        given = [answers[number] for number in predictions.numbers[:, 0]]
        found = task.figures_of(judged, given)
        return {name: found[name] for name in task.figures}

    return evaluate


def say_samples(
    state: ParallelState, records: Records, targets: Targets, answers: AnswerList
) -> None:
    """Print how many samples there are, how many answers the head can give, and how many samples
    have none of these; raises UsageError if all have none.
    """
    if targets.without == len(records):
        wanted = next(iter(records.items[0].answers))
        raise UsageError(
            f"{records.files}: none of the answers (such as '{wanted}') is among those that the"
            f" head can give (such as '{answers[0]}'); give the list of answers of these files"
        )

    beyond = ""
    if targets.without:
        beyond = f"; {targets.without} of the samples have none of them"
    if state.is_main:
        print(f"{records.report()}; {len(answers)} answers to choose from{beyond}", flush=True)
