"""Load first weights (`--init-from`) in any format that `weights/sources.py` reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.corpus import check_detector
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import FirstWeights, check_names, fill_model
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import SliceRun
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.weights.sources import WeightSource, open_weights, recognise
from megatron_interbert.weights.views import divided_into_experts, untied, with_answers

# of downstream tasks and further objectives; pretrained weights lack them
NEW_HEADS = ("choice_head.", "sentence_head.", "task_heads.", "mrfr_head.", "attribute_head.")


@dataclass(frozen=True)
class InitialWeights:
    """Read the weights of --init-from where it has them, and draw the others."""

    source: WeightSource
    names: set[str]  # of the parameters that it has
    first: FirstWeights

    @property
    def pretrained(self) -> set[str]:
        """Return the parameters that came from BERT, which may train at a lower learning rate."""
        return self.names if self.source.kind == "bert" else set()

    def read(self, kind: str, run: SliceRun) -> torch.Tensor:
        """Return a run of a parameter's weights ("weight"): [length]."""
        if run.name not in self.names:
            return self.first.read(kind, run)
        return self.source.read_run(run)


def open_initial_weights(
    model: InterBert,
    first: FirstWeights,
    path: str,
    state: ParallelState,
    data: dict[str, Any] | None = None,
    allow_other_detector: bool = False,
) -> InitialWeights:
    """Open --init-from for a model, whose parameters may be without memory; nothing is read yet.

    `data` holds the sha256 of the run's vocabulary and its detector; weights that name theirs must
    have been made with the same. Raises UsageError if they were not, or cannot be read.
    """
    data = data or {}

    try:
        kind = recognise(path)
        dense = dataclasses.replace(first.config, experts=0, prototypes=1, share_layers=False)
        source = open_weights(path, kind, dense if kind in ("official", "bert") else None)
        source = viewed_as(first.config, source, first.seed)
        source = with_our_answers(source, data.get("task_heads", {}))
        if state.is_main:
            print(*source.notes, sep="\n", end="\n" * bool(source.notes), flush=True)

        theirs = source.facts.get("vocabulary")
        if theirs and theirs != data.get("vocabulary"):
            raise UsageError(
                f"{path}: made with another vocabulary; give that vocabulary by --vocab-file"
            )

        check_detector(
            source.facts.get("detector"),
            data.get("detector"),
            f"for {path}, the region store has",
            allow_other_detector,
        )
        shapes = {name: entry.shape for name, entry in source.layouts.items()}
        if kind == "bert":
            shapes = without_other_labels(shapes, model)
        names = check_names(shapes, model, state, path, partial=kind == "bert", may_lack=NEW_HEADS)
    except UsageError as error:
        raise UsageError(f"--init-from {error}") from error

    return InitialWeights(source, names, first)


def viewed_as(config: ModelConfig, source: WeightSource, seed: int) -> WeightSource:
    """Return weights as those of a model of `config`: with experts made from the MLPs of a dense
    one, and with layers of their own made from shared ones.
    """
    if config.share_layers and not source.config.share_layers:
        raise UsageError(
            f"{source.path}: its layers are not shared, so they cannot become shared ones; leave"
            " --share-layers out"
        )

    if source.config.experts:
        check_same_experts(config, source)

    if source.config.share_layers and not config.share_layers:
        source = untied(source)
        source.notes.append(f"note: the shared layers of {source.path} become layers of their own")

    if config.experts and not source.config.experts:
        source = divided_into_experts(
            source, config.experts, config.prototypes, config.expert_stacks, seed
        )
        source.notes.append(
            f"note: each MLP of {source.path} becomes {config.experts} experts with its outputs"
        )

    return source


def with_our_answers(source: WeightSource, ours: Mapping[str, Any]) -> WeightSource:
    """Return weights whose heads have the answers of the run's; a head for another number of images
    is left out.
    """
    for name, theirs in (source.facts.get("task_heads") or {}).items():
        if name not in ours or "answers" not in theirs:
            continue

        if theirs["rows"] != ours[name]["rows"]:
            begin = f"task_heads.{name}."
            layouts = {n: entry for n, entry in source.layouts.items() if not n.startswith(begin)}
            source = dataclasses.replace(source, layouts=layouts)
            source.notes.append(
                f"note: the head of {source.path} for {name} is for {theirs['rows']} rows of a"
                f" sample, not {ours[name]['rows']}; it starts anew"
            )
        elif theirs["answers"] != ours[name]["answers"]:
            source = with_answers(source, name, ours[name]["answers"])

    return source


def check_same_experts(config: ModelConfig, source: WeightSource) -> None:
    """Raise UsageError unless a model of `config` has the experts of weights that have some."""
    theirs = source.config
    if (config.experts, config.prototypes) != (theirs.experts, theirs.prototypes):
        raise UsageError(
            f"{source.path}: its model has {theirs.described_experts()}, the run's"
            f" has {config.described_experts()}; give --experts {theirs.experts} --prototypes"
            f" {theirs.prototypes}"
        )

    if config.stacks_with_experts != theirs.stacks_with_experts:
        raise UsageError(
            f"{source.path}: its model has {theirs.described_experts()}, the run's"
            f" has {config.described_experts()}; give --model FILE.json with"
            f' "expert_stacks": "{theirs.expert_stacks}"'
        )


def load_initial_weights(
    model: InterBert,
    config: ModelConfig,
    path: str,
    state: ParallelState,
    data: dict[str, Any] | None = None,
) -> set[str]:
    """Load --init-from into a model that has its other weights already, and return the names of
    parameters that came from BERT.
    """
    initial = open_initial_weights(model, FirstWeights(config, 0), path, state, data)

    try:
        fill_model(model, lambda run: initial.read("weight", run), state, initial.names)
    except UsageError as error:
        raise UsageError(f"--init-from {error}") from error

    return initial.pretrained


def without_other_labels(
    shapes: Mapping[str, Sequence[int]], model: InterBert
) -> dict[str, Sequence[int]]:
    """Leave out the classifier of a BERT that was finetuned for another number of labels."""
    own = dict(model.named_parameters())
    return {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith("sentence_head.output.")
        or (name in own and len(own[name]) == shape[0])
    }
