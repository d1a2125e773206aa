"""Load first weights (`--init-from`) in any format that `weights/sources.py` reads."""

from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.corpus import check_detector
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.weights.sources import open_weights, recognise

NEW_HEADS = ("choice_head.", "sentence_head.")  # of downstream tasks; pretrained weights lack them


def load_initial_weights(
    model: InterBert,
    config: ModelConfig,
    path: str,
    state: ParallelState,
    data: dict[str, Any] | None = None,
    allow_other_detector: bool = False,
) -> set[str]:
    """Load --init-from into a model and return the names of parameters that came from BERT, which
    may train at a lower learning rate.

    `data` holds the sha256 of the run's vocabulary and its detector; weights that name theirs must
    have been made with the same. Raises UsageError if they were not, or cannot be read.
    """
    data = data or {}

    try:
        kind = recognise(path)
        source = open_weights(path, kind, config if kind in ("official", "bert") else None)
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
        full = source.state()
        if kind == "bert":
            full = without_other_labels(full, model)
        loaded = load_full_state(
            model, full, state, path, partial=kind == "bert", may_lack=NEW_HEADS
        )
    except UsageError as error:
        raise UsageError(f"--init-from {error}") from error

    return loaded if kind == "bert" else set()


def without_other_labels(
    full: dict[str, torch.Tensor], model: InterBert
) -> dict[str, torch.Tensor]:
    """Leave out the classifier of a BERT that was finetuned for another number of labels."""
    own = dict(model.named_parameters())
    return {
        name: tensor
        for name, tensor in full.items()
        if not name.startswith("sentence_head.output.")
        or (name in own and len(own[name]) == len(tensor))
    }
