"""Run one batch through two sets of weights, each loaded as its users load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.packing import Example, PackedBatch, pack
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.weights.heads import heads_of
from megatron_interbert.weights.sources import WeightSource, open_weights

TOKENS = 12
REGIONS = 9
SAMPLES = 3
ON_ROUTING = ("balance", "router_figures")  # statistics beside the outputs


def largest_difference(source: WeightSource, kind: str, folder: Path) -> dict[str, float]:
    """Return the largest absolute difference of each output, by name, between the source and what
    was written in `folder` as `kind`.

    The source runs in our model; the written weights in our model again, the Hugging Face
    classes whose heads they have or, for the text path, transformers' BertForMaskedLM.
    """
    ours = load_core(source)
    random = np.random.default_rng(0)
    if kind == "bert":
        return _against_bert(ours, source, folder, random)

    batch = random_batch(source.config, random)
    with torch.no_grad():
        expected = ours(batch, everything=True)._asdict()
        if kind == "huggingface":
            found = _through_the_doors(folder, heads_of(source), batch)
            expected = {name: expected[name] for name in found}
        else:
            found = load_core(
                open_weights(folder, "official" if kind == "official" else "checkpoint")
            )(batch, everything=True)._asdict()

    return {
        name: _difference(value, found[name])
        for name, value in expected.items()
        if value is not None and name not in ON_ROUTING
    }


def load_core(source: WeightSource) -> InterBert:
    """Load the source's weights into our model in float32, with all heads that it has."""
    model = InterBert(source.config, heads_of(source))
    load_full_state(
        model,
        {name: source.get(name).float() for name in source.layouts},
        ParallelState(),
        str(source.path),
    )

    return model.eval()


def random_batch(config: ModelConfig, random: np.random.Generator) -> PackedBatch:
    """Return samples of equal length, all words and regions targets, none hidden."""
    length = min(TOKENS, config.max_position_embeddings)
    examples = []

    for _ in range(SAMPLES):
        ids = random.integers(0, config.vocab_size, length)
        corner = random.uniform(0, 0.5, (REGIONS, 2))
        far = corner + random.uniform(0.1, 0.5, (REGIONS, 2))
        area = np.prod(far - corner, axis=1, keepdims=True)
        examples.append(
            Example(
                token_ids=ids,
                token_types=np.zeros(length, np.int64),
                features=random.normal(size=(REGIONS, config.feature_dim)).astype(np.float16),
                locations=np.concatenate([corner, far, area], axis=1).astype(np.float32),
                msm_positions=np.arange(length),
                msm_labels=ids,
            )
        )

    batch = pack(examples, config.feature_dim)
    batch.mrm_positions = batch.region_rows

    return batch


def _through_the_doors(
    folder: Path, heads: Sequence[str], batch: PackedBatch
) -> dict[str, torch.Tensor]:
    """Return the outputs of the Hugging Face classes whose heads the weights have, flat and by the
    names of our model's.
    """
    from megatron_interbert import hf

    samples = len(batch)
    ids = batch.token_ids.view(samples, -1)
    images = {
        "visual_feats": batch.features.float().view(samples, REGIONS, -1),
        "visual_pos": batch.locations[batch.region_rows].view(samples, REGIONS, -1),
    }

    def run(door: str, input_ids: torch.Tensor) -> Any:
        model = getattr(hf, door).from_pretrained(folder, dtype=torch.float32).eval()
        return model(input_ids, **images)

    streams = run("InterBertModel", ids)
    outputs = {"text_hidden": streams.text_hidden, "image_hidden": streams.image_hidden}
    if set(hf.InterBertForPreTraining.heads) <= set(heads):
        pretraining = run("InterBertForPreTraining", ids)
        outputs |= {"msm_logits": pretraining.msm_logits, "mrm_logits": pretraining.mrm_logits}

    flat = {name: value.flatten(0, 1) for name, value in outputs.items()}
    if "itm" in heads:
        flat["itm_logits"] = run("InterBertForImageTextRetrieval", ids).itm_logits
    if "choice" in heads:
        flat["choice_logit"] = run("InterBertForMultipleChoice", ids[:, None]).logits

    return flat


def _against_bert(
    ours: InterBert, source: WeightSource, folder: Path, random: np.random.Generator
) -> dict[str, float]:
    from transformers import BertForMaskedLM, BertModel

    length = min(TOKENS, source.config.max_position_embeddings)
    ids = random.integers(0, source.config.vocab_size, (SAMPLES, length))
    empty = np.zeros(length, np.int64)
    examples = [
        Example(token_ids=row, token_types=empty, msm_positions=np.arange(length), msm_labels=row)
        for row in ids
    ]
    has_words = "msm" in heads_of(source)
    theirs = (
        (BertForMaskedLM if has_words else BertModel)
        .from_pretrained(folder, dtype=torch.float32)
        .eval()
    )
    with torch.no_grad():
        output = ours(pack(examples, source.config.feature_dim), everything=True)
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)

    differences = {
        "text_hidden": _difference(output.text_hidden, expected.hidden_states[-1].flatten(0, 1))
    }
    if has_words:
        differences["msm_logits"] = _difference(output.msm_logits, expected.logits.flatten(0, 1))

    return differences


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    columns = min(ours.shape[-1], theirs.shape[-1])  # padded columns of our vocabulary hold -inf
    a = ours[..., :columns].float()
    b = theirs[..., :columns].float()
    return float(torch.where(a == b, 0.0, a - b).abs().max())
