"""The parts that every job is put together from: stores, vocabulary, sizes of the model, what a checkpoint remembers of its data."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.config import ModelConfig, TrainConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST, VOCABULARY, file_sha256
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.model.presets import fit_to_data, load_model_config
from megatron_interbert.weights.manifest import newest_checkpoint
from megatron_interbert.weights.sources import open_source, recognise


def open_stores(paths: Sequence[str], config: TrainConfig) -> Corpus:
    """Region stores as one corpus."""
    return Corpus(paths, config.strict_boxes, config.allow_other_detector)


def open_vocabulary(config: TrainConfig, stores: Sequence[str] = ()) -> CaptionTokenizer:
    """The vocabulary of --vocab-file, else of the first store that has one, else of the weights to start from."""
    folders = [Path(path) for path in stores]
    if config.init_from:
        folders.append(newest_checkpoint(config.init_from) or Path(config.init_from))
    found = next((folder / VOCABULARY for folder in folders if (folder / VOCABULARY).is_file()), None)
    if not config.vocab_file and found is None:
        raise UsageError("--vocab-file is missing: neither the data nor the weights to start from have a vocab.txt beside them")
    return CaptionTokenizer(config.vocab_file or str(found))


def sizes_of_model(config: TrainConfig) -> ModelConfig:
    """The sizes that --model names; without it those of --init-from where it holds them, else of `base`."""
    if not config.model and config.init_from and recognise(config.init_from) in ("checkpoint", "huggingface"):
        return open_source(config.init_from).config
    return load_model_config(config.model or "base")


def fitted_sizes(
    config: TrainConfig, tokenizer: CaptionTokenizer, corpus: Corpus | None, longest: int, flag: str = "--max-tokens"
) -> ModelConfig:
    """Sizes of the model with those that come from the data filled in and checked; `longest` text in tokens, as `flag` says."""
    sizes = sizes_of_model(config)
    feature_dim, num_classes = (corpus or sizes).feature_dim, (corpus or sizes).num_classes
    where = f"{corpus.path} with {tokenizer.vocab_file}" if corpus else tokenizer.vocab_file
    sizes = fit_to_data(sizes, tokenizer.vocab_size, feature_dim or 1, num_classes or 2, where)
    if longest > sizes.max_position_embeddings:
        raise UsageError(f"{flag} {longest} is more than the model's {sizes.max_position_embeddings} positions")
    return sizes if config.dropout else sizes.without_dropout()


def describe_data(
    tokenizer: CaptionTokenizer, corpus: Corpus | None, files: Sequence[str] = (), task: str | None = None
) -> dict[str, Any]:
    """What a checkpoint remembers of its data; `files` are those beside the stores that decide what the samples are."""
    manifests = [file_sha256(store.path / MANIFEST) for store in corpus.stores] if corpus else []
    hashes = manifests + [file_sha256(file) for file in files]
    return {
        "store": ", ".join([*([corpus.path] if corpus else []), *files]),
        "manifest_sha256": hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "detector": corpus.stores[0].manifest["detector"] if corpus else None,
        "vocabulary": tokenizer.sha256,
        **({"task": task} if task else {}),
    }
