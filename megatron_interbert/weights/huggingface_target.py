"""Write weights as a model of our Hugging Face classes, with a tensor for each expert."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.files import write_bytes, write_json, write_text
from megatron_interbert.model.partition import is_expert
from megatron_interbert.weights.expert_tensors import name_of_expert
from megatron_interbert.weights.foreign import EXTRA
from megatron_interbert.weights.foreign_files import HF_FILE
from megatron_interbert.weights.heads import door_of, heads_of
from megatron_interbert.weights.manifest import VOCABULARY
from megatron_interbert.weights.output import Output, Progress
from megatron_interbert.weights.sources import HF_PREFIX
from megatron_interbert.weights.tensor_files import TensorLayout, write_tensors


def write_huggingface(output: Output, work: Path, progress: Progress) -> None:
    """Write what `from_pretrained` reads: model.safetensors, with a tensor for each expert,
    config.json, and, if given, the vocabulary; and the model card as README.md.
    """
    source = output.source
    names = [name for name in source.layouts if not name.startswith(EXTRA)]
    layout = {}
    for name in names:
        layout |= {HF_PREFIX + part: entry for part, entry in layout_by_expert(output, name)}

    tensors = (tensor for name in names for tensor in tensors_by_expert(output, name))
    write_tensors(work / HF_FILE, layout, tensors, {"format": "pt"}, progress)
    config: dict[str, Any] = {
        "architectures": [door_of(heads_of(source))],
        "model_type": "interbert",
        "dtype": str(next(iter(layout.values())).dtype).removeprefix("torch."),
        **dataclasses.asdict(source.config),
    }

    facts = {
        key: value
        for key, value in source.facts.items()
        if key in ("iteration", "consumed_samples", "detector", "vocabulary")
    }
    write_json(work / "config.json", {**config, **({"training_facts": facts} if facts else {})})

    if output.vocabulary:
        write_bytes(work / VOCABULARY, output.vocabulary)
        limits = {"model_max_length": source.config.max_position_embeddings, "do_lower_case": True}
        write_json(work / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **limits})

    if output.card:
        write_text(work / "README.md", output.card)


def layout_by_expert(output: Output, name: str) -> Iterator[tuple[str, TensorLayout]]:
    """Yield name and layout of the tensors that hold a parameter: of experts one for each."""
    entry = output.layout(name)
    if not is_expert(name):
        yield name, entry
        return

    for number in range(entry.shape[0]):
        yield name_of_expert(name, number), TensorLayout(entry.dtype, entry.shape[1:])


def tensors_by_expert(output: Output, name: str) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold a parameter, one expert at a time."""
    if not is_expert(name):
        yield output.get(name)
        return

    experts, *shape = output.layout(name).shape
    size = math.prod(shape)
    for number in range(experts):
        yield output.part(name, number * size, size).view(shape)
