"""Build the job that pretrains: data, heads, and what a checkpoint records."""

import copy
from typing import Any

from megatron_interbert.config.objectives import ANSWER_HEAD
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.files import file_sha256, json_sha256
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.pretraining.questions import Asked, read_questions
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.task import Job


def heads_of(config: RunConfig, has_labels: bool) -> tuple[str, ...]:
    """Return the heads that pretraining needs."""
    heads = ["msm", "mrm", "itm"] if has_labels else ["msm", "itm"]
    if "mrfr" in config.objective_names():
        heads.append("mrfr")

    return tuple(heads)


def model_options(
    config: RunConfig, num_attributes: int = 0, asked: Asked | None = None
) -> dict[str, Any]:
    """Return the further arguments of InterBert that the objectives need."""
    names = config.objective_names()
    options: dict[str, Any] = {}
    if "wra" in names:
        options["states"] = True
    if "attributes" in names:
        options["attributes"] = num_attributes
    if asked is not None:
        options["task_heads"] = {ANSWER_HEAD: asked.head()}

    return options


def open_labelled(config: RunConfig) -> Corpus:
    """Open the region stores of --data-path with the classes that --region-labels chooses, and fit
    the objectives to them.
    """
    corpus = open_stores(config.stores(), config)
    corpus.label_by(config.region_labels)
    config.fit_objectives(corpus.has_labels)

    return corpus


def open_validation(config: RunConfig, corpus: Corpus) -> Corpus:
    """Open the store of --valid-data-path, whose classes must mean the same as those trained on."""
    valid = open_stores([config.valid_data_path], config)
    store = valid.stores[0]
    corpus.check_alike(store, config.allow_other_detector, "--valid-data-path")

    if corpus.clusters:
        valid.label_by("clusters")
        corpus.check_clusters(store, valid.clusters[0], "--valid-data-path")

    return valid


def pretraining_job(config: RunConfig, state: ParallelState) -> Job:
    """Build the job that pretrains on the region stores of --data-path."""
    corpus = open_labelled(config)
    tokenizer = vocabulary_of_run(config, config.stores())
    sizes = fitted_sizes(config, tokenizer, corpus, predicts_classes=corpus.has_labels)
    asked = read_questions(config, state)
    questions = asked.questions if asked is not None else None
    samples = PretrainingSet(corpus, tokenizer, config, questions)
    valid = None

    if config.valid_data_path:
        valid_corpus = open_validation(config, corpus)
        valid = PretrainingSet(valid_corpus, tokenizer, config_of_validation(config))

    task = PretrainingTask(config, corpus.has_labels, corpus.background_class)
    data = describe_data(tokenizer, corpus)
    data["mined"] = (
        mined_negatives(corpus) if config.hard_negatives and samples.has_hard_negatives else []
    )
    if asked is not None:
        note_questions(data, asked, config)

    return Job(
        task,
        samples,
        sizes,
        heads_of(config, corpus.has_labels),
        data,
        tokenizer.vocab_file,
        model_options=model_options(config, corpus.num_attributes, asked),
        valid_samples=valid,
    )


def note_questions(data: dict[str, Any], asked: Asked, config: RunConfig) -> None:
    """Add the questions to the record of the data that a checkpoint keeps, and their head."""
    data["manifest_sha256"] = json_sha256([data["manifest_sha256"], *asked.record])
    settings = {"max_tokens": config.max_tokens, "max_regions": config.max_regions}
    answers = list(asked.answers.answers)
    data["task_heads"] = {ANSWER_HEAD: {"answers": answers, "rows": 1, "settings": settings}}


def mined_negatives(corpus: Corpus) -> list[str]:
    """Return the hashes of the tables of mined negatives, on which the samples depend."""
    tables = [store.path / HARD_NEGATIVES for store in corpus.stores]
    return [file_sha256(path) for path in tables if path.is_file()]


def config_of_validation(config: RunConfig) -> RunConfig:
    """Return a copy of the settings for the validation store, which has its own partitions.

    Evaluations route each token by itself, so no partition has to hold whole routing groups.
    """
    own = copy.copy(config)
    own.data_epochs = own.data_weights = own.objective_mix = ""
    own.capacity_factor = own.balance_coefficient = 0.0
    own.fitted = config.fitted - {"data_partitions"}
    own.given = config.given - {"data_partitions"}
    own.origins = {name: of for name, of in config.origins.items() if name != "data_partitions"}
    own.notes = []

    return own
