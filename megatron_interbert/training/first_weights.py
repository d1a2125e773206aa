"""First weights from elsewhere (`--init-from`): any format that `weights/sources.py` reads."""

from megatron_interbert.config import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.weights.sources import open_source, recognise


def load_initial_weights(model: InterBert, config: ModelConfig, path: str, state: ParallelState, vocabulary: str = "") -> set[str]:
    """Load --init-from into a model; the names of parameters that came from BERT (they may train at a lower rate).

    `vocabulary` is the sha256 of the run's vocabulary, which one of our checkpoints must share.
    """
    try:
        kind = recognise(path)
        source = open_source(path, kind, config if kind in ("official", "bert") else None)
        theirs = source.facts.get("vocabulary")
        if theirs and theirs != vocabulary:
            raise UsageError(f"{path}: made with another vocabulary; give that vocabulary by --vocab-file")
        loaded = load_full_state(model, source.state(), state, path, partial=kind == "bert")
    except UsageError as error:
        raise UsageError(f"--init-from {error}") from error
    return loaded if kind == "bert" else set()
