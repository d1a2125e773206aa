"""Name the heads whose weights a source has, and the Hugging Face class that makes most of them."""

from collections.abc import Iterable

from megatron_interbert.weights.sources import WeightSource

HEADS = {
    "msm_head.bias": "msm",
    "mrm_head.decoder.weight": "mrm",
    "itm_head.weight": "itm",
    "choice_head.weight": "choice",
}
# our Hugging Face classes and the heads that they need, the best first
DOORS = {
    "InterBertForPreTraining": {"msm", "mrm", "itm"},
    "InterBertForImageTextRetrieval": {"itm"},
    "InterBertForMultipleChoice": {"choice"},
    "InterBertModel": set(),
}


def heads_of(source: WeightSource) -> tuple[str, ...]:
    """Return the names of the heads whose weights a source has."""
    return tuple(head for name, head in HEADS.items() if name in source.layouts)


def door_of(heads: Iterable[str]) -> str:
    """Return the name of the Hugging Face class that makes most of weights with these heads."""
    return next(name for name, needed in DOORS.items() if needed <= set(heads))
