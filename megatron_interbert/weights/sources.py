"""Read weights of every known format in one way: under our names, as full tensors, one at a time.

Nothing here runs code from a file: it uses safetensors, JSON, and `torch.load(weights_only=True)`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.errors import UsageError, out_of_memory
from megatron_interbert.model.partition import SliceRun
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.reading import read_json
from megatron_interbert.weights.expert_tensors import stacked, whole_names
from megatron_interbert.weights.fitting import (
    REGION,
    WORD,
    Shapes,
    by_their_name,
    check_own,
    fit,
)
from megatron_interbert.weights.foreign import DECODER, EXTRA, Link, config_from_official
from megatron_interbert.weights.foreign_files import (
    Tensors,
    check_path,
    open_tensors,
    tensor_names,
)
from megatron_interbert.weights.manifest import (
    MANIFEST,
    newest_checkpoint,
    passed_over,
    read_manifest,
    verify,
)
from megatron_interbert.weights.other_models import refuse_model_type, refuse_other_models
from megatron_interbert.weights.reader import KINDS as FILE_OF
from megatron_interbert.weights.reader import CheckpointReader, holds
from megatron_interbert.weights.tensor_files import TensorLayout

KINDS = ("checkpoint", "huggingface", "official", "bert")
HF_PREFIX = "interbert."
DECODER_BIAS = "cls.predictions.decoder.bias"  # of BERT: the same as cls.predictions.bias
# what our converter writes to a config.json
FACTS = {"iteration": int, "consumed_samples": int, "detector": dict, "vocabulary": str}


@dataclasses.dataclass
class WeightSource:
    """Hold weights under our names.

    `get` reads one full tensor, `read` elements [start, start + length) of it, flattened; a `bert`
    source has the text path only.
    """

    kind: str
    path: Path
    config: ModelConfig
    layouts: dict[str, TensorLayout]
    get: Callable[[str], torch.Tensor]
    # detector, vocabulary, iteration .. if known
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    # tensors in the file that our model has no place for
    left_out: list[str] = dataclasses.field(default_factory=list)
    # lines for the user about what was chosen
    notes: list[str] = dataclasses.field(default_factory=list)
    read: Callable[[str, int, int], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.read = self.read or runs_of(lambda name: self.get(name))

    def read_run(self, run: SliceRun) -> torch.Tensor:
        """Read a run of a rank's slice of a parameter: [length]."""
        return run.gather(lambda start, length: self.read(run.name, start, length))


def recognise(path: str | Path) -> str:
    """Determine which of KINDS a path holds; UsageError for anything else."""
    where = Path(path)
    check_path(where)
    if where.is_dir():
        if newest_checkpoint(where):
            return "checkpoint"
        if next(where.glob("**/*model_states.pt"), None):
            raise UsageError(
                f"{path}: a DeepSpeed checkpoint that we did not write. Its files are pickles,"
                " which can run code when loaded, so they are not read; export its weights as"
                " safetensors with the program that made it"
            )

        if _model_type(where) == "interbert":
            return "huggingface"

    names = tensor_names(open_tensors(where))
    if any(".v_embeddings." in name for name in names):
        return "official"
    if any(name.endswith("embeddings.word_embeddings.weight") for name in names):
        return "bert"

    refuse_other_models(names, str(path))
    raise UsageError(
        f"{path}: neither one of our checkpoints, nor a Hugging Face folder of InterBERT or BERT,"
        " nor an official InterBERT state dict (its first tensor is"
        f" {next(iter(names), 'missing')})"
    )


def _model_type(folder: Path) -> object:
    """Return what the config.json of a Hugging Face folder calls its model; None if it does not."""
    config = folder / "config.json"
    return read_json(config, str(folder)).get("model_type") if config.is_file() else None


def open_weights(
    path: str | Path, kind: str = "auto", config: ModelConfig | None = None, averaged: bool = False
) -> WeightSource:
    """Open weights of any format.

    `config` gives the sizes if the format lacks them (official, bert); `averaged`: from one of our
    checkpoints, take the averaged weights (--ema-decay) if it has them. Raises UsageError.
    """
    kind = recognise(path) if kind == "auto" else kind
    if kind not in KINDS:
        raise UsageError(f"unknown format '{kind}', expected one of auto, {', '.join(KINDS)}")

    check_path(Path(path))
    with sound(path, kind):
        if kind == "checkpoint":
            source = _checkpoint(Path(path), averaged)
        elif kind == "huggingface":
            source = _huggingface(Path(path))
        else:
            source = _foreign(kind, Path(path), config)

    source.get = _checked(source, source.get)
    source.read = _checked(source, source.read)

    return source


@contextlib.contextmanager
def sound(where: str | Path, kind: str) -> Iterator[None]:
    """Turn errors raised by well-formed files with wrong content into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{where}: not a sound {kind} source ({type(error).__name__}: {reason})"
        ) from error


def _checked(source: WeightSource, get: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a source's `get` or `read`, so that parts which do not fit together raise a
    UsageError.
    """

    def checked(name: str, *run: int) -> torch.Tensor:
        with sound(f"{source.path}: {name}", source.kind):
            return get(name, *run)

    return checked


def _checkpoint(path: Path, averaged: bool) -> WeightSource:
    folder = newest_checkpoint(path)
    if folder is None:
        raise UsageError(
            f"{path}: no complete checkpoint there, expected a folder with {MANIFEST}, or"
            " global_stepN folders of a run"
        )

    manifest = read_manifest(folder)
    weights = "ema" if averaged and holds(manifest, "ema") else "weight"
    problem = verify(folder, only=f"{FILE_OF[weights]}-")
    if problem:
        raise UsageError(f"{folder}: {problem}; use another checkpoint")

    reader = CheckpointReader(folder)
    facts = {
        "iteration": manifest.get("iteration"),
        "consumed_samples": manifest.get("consumed_samples"),
        **manifest.get("data", {}),
        "files": {
            name: entry["sha256"]
            for name, entry in manifest["files"].items()
            if name.startswith(f"{FILE_OF[weights]}-")
        },
        "averaged": weights == "ema",
        "run": dict(manifest.get("configs", {}).get("run") or {}),
        "topology": manifest["topology"],
    }
    layouts = {n: reader.layout(n) for n in reader.names}
    source = WeightSource(
        "checkpoint",
        folder,
        reader.config,
        layouts,
        lambda name: reader.get(name, weights),
        facts,
        read=lambda name, *run: reader.read_full(name, weights, *run),
    )

    if newer := passed_over(path, folder):
        source.notes.append(
            f"note: {newer[0]} has no {MANIFEST} and is not a complete checkpoint; using"
            f" {folder.name} instead"
        )

    return source


def _huggingface(path: Path) -> WeightSource:
    values = read_json(path / "config.json", str(path))
    if values.get("model_type") != "interbert":
        raise UsageError(
            f"{path}/config.json: model_type is {values.get('model_type')!r}, expected 'interbert'"
        )

    known = {f.name for f in dataclasses.fields(ModelConfig)}
    sizes = model_config_from_dict(
        {k: v for k, v in values.items() if k in known}, str(path / "config.json")
    )
    tensors = open_tensors(path)
    left_out = [name for name in tensor_names(tensors) if name.startswith("classifier.")]
    ours = {
        name.removeprefix(HF_PREFIX): name for name in tensor_names(tensors) if name not in left_out
    }
    layouts, read = stacked(
        whole_names(ours, str(path)),
        lambda name: tensors.layout(ours[name]),
        lambda name, *run: tensors.read(ours[name], *run),
        str(path),
    )
    check_own({name: entry.shape for name, entry in layouts.items()}, sizes, str(path))
    facts = facts_of(values.get("training_facts") or {}, path / "config.json")

    return WeightSource(
        "huggingface",
        path,
        sizes,
        layouts,
        lambda name: (
            tensors.get(ours[name])
            if name in ours
            else read(name, 0, math.prod(layouts[name].shape)).view(layouts[name].shape)
        ),
        facts,
        left_out,
        read=read,
    )


def facts_of(values: Any, where: Path) -> dict[str, Any]:
    """Return what our converter recorded about training; UsageError for wrong types."""
    if not isinstance(values, dict):
        raise UsageError(
            f"{where}: training_facts is {values!r:.60}, expected an object; leave it out, or"
            " export again"
        )

    facts = {name: values[name] for name in FACTS if values.get(name) is not None}
    for name, value in facts.items():
        if type(value) is not FACTS[name]:
            raise UsageError(
                f"{where}: {name} of training_facts is {value!r:.60}, expected"
                f" {FACTS[name].__name__}; leave it out, or export again"
            )

    return facts


def _foreign(kind: str, path: Path, config: ModelConfig | None) -> WeightSource:
    """Open an official InterBERT or a BERT, after checking that it is one."""
    tensors = open_tensors(path)
    refuse_other_models(tensor_names(tensors), str(path))
    by_name = by_their_name(tensor_names(tensors), kind, str(path))
    shapes = {name: tensors.layout(original).shape for name, original in by_name.items()}
    if kind == "bert" and path.is_dir():
        refuse_model_type(_model_type(path), str(path))

    config = config or _sizes_like(kind, path, shapes)
    links = fit(kind, shapes, config, str(path))
    recipes = {link.ours: link for link in links}

    def get(name: str) -> torch.Tensor:
        link = recipes[name]
        return link.to_ours([tensors.get(by_name[part]) for part in link.theirs], config)

    def layout(link: Link) -> TensorLayout:
        parts = [torch.empty(shapes[name], device="meta") for name in link.theirs]
        dtype = tensors.layout(by_name[link.theirs[0]]).dtype
        return TensorLayout(dtype, tuple(link.to_ours(parts, config).shape))

    source = WeightSource(kind, path, config, {link.ours: layout(link) for link in links}, get)
    used = {name for link in links for name in link.theirs} | {DECODER, DECODER_BIAS}
    rest = [name for name in by_name if name not in used]
    if kind == "official":
        check_tied(tensors, by_name, path)
        carry_along(source, tensors, {EXTRA + name: by_name[name] for name in rest})
    else:
        source.left_out = sorted(rest)

    return source


def carry_along(source: WeightSource, tensors: Tensors, extras: Mapping[str, str]) -> None:
    """Add tensors (our name -> theirs) that our model lacks, for converting back."""
    linked = source.get
    source.layouts |= {ours: tensors.layout(theirs) for ours, theirs in extras.items()}
    source.get = lambda name: tensors.get(extras[name]) if name in extras else linked(name)


def runs_of(get: Callable[[str], torch.Tensor]) -> Callable[[str, int, int], torch.Tensor]:
    """Return a `read` for tensors that are made from several: it keeps the last one, so that a
    parameter's runs do not make it again.
    """
    kept = functools.lru_cache(maxsize=1)(lambda name: get(name).reshape(-1))

    return lambda name, start, length: kept(name)[start : start + length]


def check_tied(tensors: Tensors, by_name: Mapping[str, str], path: Path) -> None:
    """Raise UsageError if the official decoder differs from the word embedding: our model has only
    one of them.
    """
    if DECODER in by_name and not torch.equal(
        tensors.get(by_name[DECODER]), tensors.get(by_name[WORD])
    ):
        raise UsageError(
            f"{path}: {DECODER} differs from {WORD}; InterBERT's decoder is tied, so one of them"
            " would be lost"
        )


def _sizes_like(kind: str, path: Path, shapes: Shapes) -> ModelConfig:
    """Return the configuration in the official JSON beside the file, else the preset that matches
    the tensors' sizes, with their vocabulary.
    """
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if kind == "official" and beside.is_file():
        values = read_json(beside, str(path))
        if "v_feature_size" in values:
            return config_from_official(values, str(beside))

    if WORD not in shapes:
        name = "an official InterBERT state dict" if kind == "official" else "BERT"
        raise UsageError(f"{path}: {WORD} is missing; not {name}")

    like = {"hidden_size": shapes[WORD][1]}
    if kind == "official":
        like["feature_dim"] = shapes.get(REGION, (0, 0))[1]

    return dataclasses.replace(_preset_like(path, like), vocab_size=shapes[WORD][0])


def _preset_like(path: Path, sizes: dict[str, int]) -> ModelConfig:
    for preset in PRESETS.values():
        if all(getattr(preset, name) == value for name, value in sizes.items()):
            return preset

    raise UsageError(
        f"{path}: no preset has these sizes ({', '.join(f'{k} {v}' for k, v in sizes.items())});"
        " give them by --model FILE.json, or put the official config.json beside the file"
    )
