"""Build the parts that jobs share: stores, vocabulary, model sizes, and the record of the data that
a checkpoint keeps.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import Flags
from megatron_interbert.config.stores import paths_of_stores, split_paths
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.integrity import Integrity
from megatron_interbert.data.manifest import MANIFEST, VOCABULARY, content_sha256
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256
from megatron_interbert.model.presets import fit_to_data, load_model_config, with_experts
from megatron_interbert.parallel.agreement import together
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.config import LoadConfig
from megatron_interbert.weights.manifest import newest_checkpoint
from megatron_interbert.weights.sources import open_weights, recognise


def open_stores(paths: Sequence[str], config: TrainConfig | LoadConfig) -> Corpus:
    """Open region stores as one corpus; training on cells of a grid takes all of them by
    default.
    """
    corpus = Corpus(paths, config.strict_boxes, config.allow_other_detector)
    if isinstance(config, TrainConfig):
        fit_regions(config, corpus)

    return corpus


def fit_regions(config: TrainConfig, corpus: Corpus) -> None:
    """Raise a default --max-regions to the most cells of an image, if regions are those of a grid:
    the first ones would be the upper part of each image.
    """
    cells = max(
        (
            int(store.region_counts().max())
            for store in corpus.stores
            if (store.manifest["detector"] or {}).get("grid")
            and not (store.manifest["detector"] or {}).get("boxes")
        ),
        default=0,
    )
    if cells > config.max_regions and config.is_default("max_regions"):
        config.fit("max_regions", cells, f"the images of {corpus.path} have up to {cells} cells")


def verify_stores(config: TrainConfig | LoadConfig, state: ParallelState) -> Integrity:
    """Verify the region stores of a configuration, in one process per machine.

    Small stores, and files that have changed since they were verified here, are checked at once;
    raises UsageError on all ranks if one is corrupt. The rest is verified when the returned object
    is started.
    """
    first = read_launch().local_rank == 0
    stores = [
        path for path in paths_of_stores(config) if first and (Path(path) / MANIFEST).is_file()
    ]
    integrity = together(state, lambda: Integrity(stores))
    together(state, integrity.check_at_once)

    return integrity


def open_vocabulary(
    given: str, folders: Iterable[str | Path], sizes: ModelConfig, segmenter: str = "characters"
) -> CaptionTokenizer:
    """Open the vocabulary of --vocab-file (`given`), else of the first of `folders` (stores,
    weights) that has one, with the text normalisation of `sizes`.
    """
    found = next(
        (path for folder in folders if (path := Path(folder) / VOCABULARY).is_file()), None
    )
    if not given and found is None:
        raise UsageError(
            "--vocab-file is missing: there is no vocab.txt beside the data or the weights; give"
            " one"
        )

    return CaptionTokenizer(given or str(found), sizes.text_normalisation, segmenter)


def vocabulary_of_run(config: TrainConfig, stores: Sequence[str] = ()) -> CaptionTokenizer:
    """Open the vocabulary of a run: --vocab-file, else that of its stores, else of --init-from."""
    weights = [newest_checkpoint(config.init_from) or config.init_from] if config.init_from else []
    # only pretraining has this flag, because nothing else masks words
    segmenter = getattr(config, "segmenter", "characters")

    return open_vocabulary(
        config.vocab_file, [*stores, *weights], sizes_of_model(config), segmenter
    )


def fit_length(config: Flags, sizes: ModelConfig, name: str = "max_tokens") -> None:
    """Lower a default text length to the number of positions of the model.

    Raises UsageError if the length was given and is too large.
    """
    most = sizes.max_position_embeddings
    if getattr(config, name) <= most:
        return
    if not config.is_default(name):
        raise UsageError(
            f"{config.told(name)} is more than the model's {most} positions; give {most} or fewer"
        )

    config.fit(name, most, f"the model has {most} positions")


def sizes_of_model(config: TrainConfig) -> ModelConfig:
    """Return the model sizes that --model names; without it those of --init-from if it records
    them, else `base`; with the experts that flags give.
    """
    recorded = (
        not config.model
        and config.init_from
        and recognise(config.init_from) in ("checkpoint", "huggingface")
    )
    sizes = (
        open_weights(config.init_from).config
        if recorded
        else load_model_config(config.model or "base")
    )

    return with_experts(sizes, config.experts, config.prototypes, config.share_layers)


def fitted_sizes(
    config: TrainConfig,
    tokenizer: CaptionTokenizer,
    corpus: Corpus | None,
    predicts_classes: bool = False,
) -> ModelConfig:
    """Return the model sizes with those that follow from the data filled in, and fit --max-tokens
    to them.

    The number of classes is the model's own, unless it `predicts_classes` of regions.
    """
    sizes = sizes_of_model(config)
    like = corpus or sizes
    classes = like.num_classes if predicts_classes else sizes.num_classes or like.num_classes
    where = f"{corpus.path} with {tokenizer.vocab_file}" if corpus else tokenizer.vocab_file
    sizes = fit_to_data(sizes, tokenizer.vocab_size, like.feature_dim or 1, classes or 2, where)
    fit_length(config, sizes)

    return sizes if config.dropout else sizes.without_dropout()


def describe_data(
    tokenizer: CaptionTokenizer,
    corpus: Corpus | None,
    files: Sequence[str] = (),
    task: str | None = None,
    content: str = "",
) -> dict[str, Any]:
    """Return the record of the data that a checkpoint keeps.

    `files` are further files, besides the stores, that determine the samples, and `content` is the
    sha256 of others.
    """
    manifests = [content_sha256(store.path) for store in corpus.stores] if corpus else []
    manifests += [clusters.centroids for clusters in corpus.clusters] if corpus else []
    hashes = manifests + [file_sha256(file) for file in files] + [content] * bool(content)

    return {
        "store": ", ".join([*([corpus.path] if corpus else []), *files]),
        "manifest_sha256": (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        ),
        "detector": corpus.stores[0].manifest["detector"] if corpus else None,
        "vocabulary": tokenizer.sha256,
        **({"task": task} if task else {}),
    }


def validation_digest(configs: Iterable[TrainConfig]) -> str:
    """Return one sha256 of what a run is judged on: all --valid-.. flags of the run, or of its
    tasks, and the data they name.
    """
    digest = hashlib.sha256()
    for config in configs:
        for name, value in sorted(vars(config).items()):
            if name.startswith("valid_"):
                digest.update(f"{name} {content_of(value)}\n".encode())

    return digest.hexdigest()


def content_of(value: Any) -> str:
    """Return the hashes of the stores or files that a flag names; its text if it names none."""
    paths = [Path(path) for path in split_paths(value)] if isinstance(value, str) else []
    if not paths or not all(path.exists() for path in paths):
        return str(value)

    return " ".join(content_sha256(path) if path.is_dir() else file_sha256(path) for path in paths)
