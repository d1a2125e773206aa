"""Write the README.md of a model folder: what the model is, its sizes, use, origin and limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.hf.stream import TorchStream
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.pages.templates import render

# Facts that a caller may know, and their wording on the card; those not given are not mentioned.
FACTS = {
    "source": "Made from",
    "detector": "Detector of the region features",
    "vocabulary": "sha256 of the vocabulary (vocab.txt)",
    "iteration": "Optimizer steps",
    "consumed_samples": "Samples seen in training",
}

# head -> its wording on the card
HEADS = {
    "msm": "masked words",
    "mrm": "masked regions",
    "itm": "matching",
    "choice": "choice",
}
# heads -> what loads weights that have them
LOADERS = {
    PRETRAINING_HEADS: "`AutoModelForPreTraining`",
    ("itm",): (
        "`InterBertForImageTextRetrieval` and `InterBertScorer` of `megatron_interbert.hf`, which"
        " score pairs of images and captions"
    ),
    ("choice",): "`AutoModelForMultipleChoice`",
}

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def model_card(config: ModelConfig, facts: dict[str, Any]) -> str:
    """Return the card as Markdown with YAML front matter.

    `facts` may hold any of FACTS, `heads` of the weights (default: those of pretraining),
    `generated` (bool), `license` and `results`; others are ignored.
    """
    heads = facts.get("heads", PRETRAINING_HEADS)
    known = {
        words: wording(facts[name]) for name, words in FACTS.items() if facts.get(name) is not None
    }
    return render(
        TEMPLATE,
        license=facts.get("license"),
        generated=facts.get("generated"),
        sizes=sizes(config),
        parameters=parameter_count(config, heads),
        heads=[words for head, words in HEADS.items() if head in heads],
        loaders=[loader for needed, loader in LOADERS.items() if set(needed) <= set(heads)],
        config=config,
        known=known,
        rows=result_rows(facts.get("results", [])),
    )


def result_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each figure of evaluations (their result.json), with protocol and data.

    Raises UsageError for a result without figures.
    """
    rows = []
    for result in results:
        if not isinstance(result.get("metrics"), dict):
            raise UsageError(
                "--results: a file has no figures; give the result.json of an evaluation"
            )
        about = result.get("data", {})
        files = ", ".join(about.get("files", {}))
        for name, value in result["metrics"].items():
            rows.append(
                {
                    "task": result["task"],
                    "protocol": result["protocol"],
                    "data": "generated scenes" if about.get("generated") else files,
                    "figure": name,
                    "value": value,
                }
            )
    return rows


def wording(fact: Any) -> str:
    """Return a fact as text; the detector is an object of name and revision."""
    return (
        ", ".join(f"{key} {value}" for key, value in fact.items())
        if isinstance(fact, dict)
        else str(fact)
    )


def sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the sizes of the model in the configuration's order, without settings of training."""
    rest = ("initializer_range", "layer_norm_eps")
    return {
        name: value
        for name, value in vars(config).items()
        if name not in rest and not name.endswith("dropout")
    }


def parameter_count(config: ModelConfig, heads: Sequence[str] = PRETRAINING_HEADS) -> int:
    """Return the number of parameters, with these heads, without padded vocabulary rows."""
    with torch.device("meta"):
        # because the default stream would seed torch's generator
        model = InterBert(config, heads, streams=TorchStream())

    # rows of the word embedding, and entries of the word head's bias
    columns = config.hidden_size + ("msm" in heads)
    padding = (config.padded_vocab_size - config.vocab_size) * columns

    return sum(parameter.numel() for parameter in model.parameters()) - padding
