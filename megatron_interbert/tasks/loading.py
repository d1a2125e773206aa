"""Open what an evaluation needs, the same on all ranks: a model from weights of any format, for any
parallel layout, region stores and the vocabulary.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.options import flag, rows
from megatron_interbert.data.corpus import Corpus, check_detector
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable, file_sha256, sibling
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.construction import give_memory, on_meta
from megatron_interbert.model.initialise import check_names, fill_model
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import fit_to_data
from megatron_interbert.parallel.agreement import check_alike, together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import list_folder
from megatron_interbert.tasks.config import EvaluateConfig, LoadConfig
from megatron_interbert.tasks.parts import open_stores, open_vocabulary, verify_stores
from megatron_interbert.tasks.precision import choose_precision
from megatron_interbert.tasks.results import output_folder
from megatron_interbert.weights.manifest import BEST
from megatron_interbert.weights.sources import WeightSource, open_weights


def load_model(
    load: str,
    heads: Sequence[str],
    kernels: str,
    device: torch.device,
    state: ParallelState | None = None,
    averaged: bool = False,
    precision: str = "fp32",
    options_of: Callable[[WeightSource], dict[str, Any]] | None = None,
    **options: Any,
) -> tuple[InterBert, WeightSource]:
    """Load a model in evaluation mode, in the given precision, and return it with the source of its
    weights.

    A run's folder stands for its best checkpoint, else its newest. `options` go to InterBert, and
    so do those that follow from the source by `options_of`.
    """
    if not load:
        raise UsageError("--load is missing; give a run's folder or a checkpoint")

    state = state or ParallelState()
    link = Path(load) / BEST
    best = sibling(link)
    source = open_weights(best or load, averaged=averaged)

    if best is None and os.path.lexists(link):
        source.notes.insert(
            0,
            f"note: {link} leads to no folder; using {source.path.name}, the newest checkpoint,"
            " instead",
        )

    if state.is_main:
        for note in source.notes:
            print(note, file=sys.stderr, flush=True)

    if options_of is not None:
        options |= options_of(source)

    source.facts.setdefault(
        "files", {path.name: file_sha256(path) for path in weight_files(source.path)}
    )
    source.config.check_tensor_parallel(state.tensor_size)
    chosen = choose_kernels(kernels, device)
    model = on_meta(lambda: InterBert(source.config, heads, state=state, kernels=chosen, **options))
    names = check_names({n: e.shape for n, e in source.layouts.items()}, model, state, load)
    model = give_memory(choose_precision(precision, device).convert(model), device)
    fill_model(model, source.read_run, state, names)

    return model.eval(), source


def check_photos(folder: str, state: ParallelState) -> None:
    """Raise UsageError on all ranks unless --image-folder is a folder that rank 0, which draws the
    page, can list.
    """

    def check() -> None:
        if folder and state.is_main:
            if not Path(folder).is_dir():
                raise UsageError(f"--image-folder {folder}: no such folder")
            list_folder(Path(folder))

    together(state, check)


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights of a source that does not list them itself."""
    return sorted([*path.glob("*.safetensors"), *path.glob("*.bin")]) if path.is_dir() else [path]


def as_trained(config: LoadConfig, source: WeightSource, task: str = "") -> None:
    """Fill in settings that were not given from the training run of the weights, if it trained
    `task` alone or among others, else from `as_trained` of their `Facts`.
    """
    fits = str(source.facts.get("task") or "").startswith(task)
    trained = (source.facts.get("run") or {}) if fits else {}
    head = (source.facts.get("task_heads") or {}).get(task, {})
    trained = {**trained, **head.get("settings", {})}

    for name, facts in rows(config):
        if facts.as_trained is None:
            continue

        given = (
            name in config.given if isinstance(facts.as_trained, bool) else getattr(config, name)
        )
        if not given:
            setattr(config, name, trained.get(name, facts.as_trained))


def open_for(
    config: EvaluateConfig, source: WeightSource, stores: Sequence[str]
) -> tuple[Corpus | None, CaptionTokenizer]:
    """Open the region stores (None if there are none) and the vocabulary of an evaluation.

    Raises UsageError if sizes, detector or vocabulary differ from those of the weights.
    """
    corpus = open_stores(stores, config) if stores else None
    refuse_generated(config, corpus)
    beside = source.path if source.path.is_dir() else source.path.parent
    tokenizer = open_vocabulary(config.vocab_file, [*stores, beside], source.config)
    where = corpus.path if corpus else config.load
    sizes = source.config
    width = corpus.feature_dim if corpus else sizes.feature_dim
    fit_to_data(sizes, tokenizer.vocab_size, width, sizes.num_classes, where)

    if corpus:
        check_detector(
            source.facts.get("detector"),
            corpus.stores[0].manifest["detector"],
            f"--data-path {where}",
            config.allow_other_detector,
        )

    vocabulary = source.facts.get("vocabulary")
    if vocabulary and vocabulary != tokenizer.sha256:
        raise UsageError(
            f"{tokenizer.vocab_file}: not the vocabulary that {config.load} was trained with; name"
            " that one with --vocab-file"
        )

    return corpus, tokenizer


def refuse_generated(config: EvaluateConfig, corpus: Corpus | None) -> None:
    """Raise UsageError if generated data are said to be a benchmark's."""
    benchmark = getattr(config, "benchmark", "")
    for store in corpus.stores if corpus and benchmark else ():
        if store.manifest.get("generated"):
            raise UsageError(
                f"--benchmark {benchmark}: {store.path} holds generated data, which published"
                " figures are not about; leave it out"
            )


def give_up(problem: str) -> None:
    """End an evaluation at once, with code 1, because its data turned out to be corrupt and its
    figures would be meaningless.
    """
    os.write(2, f"error: {problem}\n".encode())
    os._exit(1)


def agree_on_inputs(
    config: EvaluateConfig,
    state: ParallelState,
    source: WeightSource,
    tokenizer: CaptionTokenizer,
    files: Sequence[str | Path],
) -> Path:
    """Check the inputs of an evaluation on all ranks, and return the folder for its results.

    Raises UsageError on all ranks if the folder cannot be written, a store is corrupt, or ranks
    have opened different weights, vocabularies or data `files`, or were given different flags.
    """
    verify_stores(config, state).start(give_up)
    folder = output_folder(config, source)
    together(state, lambda: check_writable(folder, "--output") if state.is_main else None)
    if state.is_main:
        print(*config.notes, f"weights: {source.path}", sep="\n", flush=True)

    flags = {
        flag(name): getattr(config, name) for name, facts in rows(config) if not facts.may_differ
    }
    data = [file_sha256(file) for file in files if str(file)]  # readers tell what is missing
    check_alike(
        state,
        {"weights": source.facts["files"], "data": data, "vocabulary": tokenizer.sha256, **flags},
    )

    return folder
