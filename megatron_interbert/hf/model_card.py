"""The README.md of a model folder: what the model is, its sizes, how to load it, where it came from, what it is not for."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.hf.stream import TorchStream
from megatron_interbert.model.interbert import InterBert

# Facts that a caller may know, and how the card words them. What is not given is not mentioned.
FACTS = {
    "source": "Made from",
    "detector": "Detector of the region features",
    "vocabulary": "sha256 of the vocabulary (vocab.txt)",
    "iteration": "Optimizer steps",
    "consumed_samples": "Samples seen in training",
}

CARD = """\
---
{front}
---

# InterBERT

A vision-and-language encoder after [InterBERT](https://arxiv.org/abs/2003.13198): an interaction module attends over the
regions of an image and the words of a text together, two independent streams refine each side, and the pooled vectors of both
are fused. An object detector gives the regions; this model does not read pixels.
{generated}
## Sizes

| | |
|---|---|
{sizes}

{parameters:,} parameters (encoder and pretraining heads).

## Use

```python
import megatron_interbert  # registers the classes below with transformers
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder")
output = model(input_ids, attention_mask, visual_feats=visual_feats, visual_pos=visual_pos)
```

`AutoModelForPreTraining`, `AutoModelForMultipleChoice` and `AutoModelForSequenceClassification` load it too, and
`megatron_interbert.hf` has `InterBertForImageTextRetrieval` and `InterBertScorer`, which scores pairs of images and captions.

| input | shape | what |
|---|---|---|
| `input_ids` | [samples, tokens] | WordPiece ids, `[CLS] words [SEP]`, at most {config.max_position_embeddings} |
| `attention_mask` | [samples, tokens] | 1 for real tokens (default: all) |
| `token_type_ids` | [samples, tokens] | 0 (default) to {types} |
| `visual_feats` | [samples, regions, {config.feature_dim}] | features of the detected regions; leave out for text alone |
| `visual_pos` | [samples, regions, 5] | x1/width, y1/height, x2/width, y2/height, share of the image's area |
| `visual_attention_mask` | [samples, regions] | 1 for real regions (default: all) |

The token that stands for the whole image is made inside and must not be given.
{training}{results}
## Intended use and limits

For research on matching, retrieving and classifying images with text, as a start for finetuning. It works on features of the
detector and on the vocabulary it was trained with; others of the same size run and give nothing of use. What is wrong or
one-sided in the detector's classes and in the training captions is learned with the rest. It must not decide about people.
"""


def model_card(config: ModelConfig, facts: dict[str, Any]) -> str:
    """Markdown with YAML front matter. `facts` may hold any of FACTS, `generated` (bool) and `license`; others are left out."""
    front = ["library_name: transformers", "tags:", "- interbert", "- vision-and-language", "- region-features"]
    if facts.get("license"):
        front.insert(0, f"license: {facts['license']}")
    known = [f"- {words}: {wording(facts[name])}" for name, words in FACTS.items() if facts.get(name) is not None]
    note = "\nIt was trained on **generated scenes**, a made-up world for trying out the software, not on photographs.\n"
    return CARD.format(
        front="\n".join(front),
        generated=note if facts.get("generated") else "",
        sizes="\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in sizes(config).items()),
        parameters=parameter_count(config),
        config=config,
        types=config.type_vocab_size - 1,
        results=results_table(facts.get("results", [])),
        training="\n## Training\n\n" + "\n".join(known) + "\n" if known else "",
    )


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A section with the figures of evaluations (their result.json), each with its protocol and whether its data were generated."""
    rows = []
    for result in results:
        if not isinstance(result.get("metrics"), dict):
            raise UsageError("--results: a file without figures; give the result.json of an evaluation")
        data = "generated scenes" if result.get("data", {}).get("generated") else ", ".join(result.get("data", {}).get("files", {}))
        rows += [f"| {result['task']}, {result['protocol']} | {data} | {name} | {v:.2f} |" for name, v in result["metrics"].items()]
    return "\n## Results\n\n| task | data | figure | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""


def wording(fact: Any) -> str:
    """A fact in words; the detector is an object of name and revision."""
    return ", ".join(f"{key} {value}" for key, value in fact.items()) if isinstance(fact, dict) else str(fact)


def sizes(config: ModelConfig) -> dict[str, Any]:
    """What says how large the model is, in the configuration's order; not what matters to training only."""
    rest = ("initializer_range", "layer_norm_eps")
    return {name: value for name, value in vars(config).items() if name not in rest and not name.endswith("dropout")}


def parameter_count(config: ModelConfig) -> int:
    """Parameters with the pretraining heads, without the rows that pad the vocabulary."""
    with torch.device("meta"):
        model = InterBert(config, streams=TorchStream())  # the default stream would seed torch's generator
    padding = (config.padded_vocab_size - config.vocab_size) * (config.hidden_size + 1)
    return sum(parameter.numel() for parameter in model.parameters()) - padding
