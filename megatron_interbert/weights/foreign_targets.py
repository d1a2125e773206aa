"""Write weights as the official model, or their text path as BERT."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_interbert.files import flush_file, write_bytes, write_json
from megatron_interbert.weights.foreign import (
    DECODER,
    EXTRA,
    Link,
    bert_links,
    config_to_official,
    official_links,
)
from megatron_interbert.weights.foreign_files import HF_FILE, TORCH_FILE
from megatron_interbert.weights.manifest import VOCABULARY
from megatron_interbert.weights.output import Output, Progress
from megatron_interbert.weights.tensor_files import TensorLayout, write_tensors


def write_bert(output: Output, work: Path, progress: Progress) -> None:
    """Write the text path as Hugging Face's BertForMaskedLM (without the word head: BertModel)."""
    config = output.source.config
    links = [link for link in bert_links(config) if link.ours in output.source.layouts]
    layout = {name: entry for link in links for name, entry in _their_layout(link, output).items()}
    write_tensors(work / HF_FILE, layout, _their_tensors(links, output), {"format": "pt"}, progress)
    write_json(
        work / "config.json",
        {
            "architectures": ["BertForMaskedLM"],
            "model_type": "bert",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.interaction_layers + config.text_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.ffn_hidden_size,
            "max_position_embeddings": config.max_position_embeddings,
            "type_vocab_size": config.type_vocab_size,
            "layer_norm_eps": config.layer_norm_eps,
            "hidden_act": "gelu",
            "hidden_dropout_prob": config.hidden_dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": True,
        },
    )
    if output.vocabulary:
        write_bytes(work / VOCABULARY, output.vocabulary)


def write_official(output: Output, work: Path, progress: Progress) -> None:
    """Write pytorch_model.bin with the official names, and the official config.json.

    torch.save needs all tensors at once, so they are written to disk first and mapped from there.
    """
    source = output.source
    links = [link for link in official_links(source.config) if link.ours in source.layouts]
    state: dict[str, torch.Tensor] = {}
    scratch = work / "scratch"
    scratch.mkdir()

    for number, (name, tensor) in enumerate(_official_tensors(links, output)):
        file = scratch / str(number)
        file.write_bytes(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        mapped = torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype)
        state[name] = mapped.view(tensor.shape)
        progress(tensor.numel() * tensor.dtype.itemsize)

    if "cls.predictions.bias" in state:
        state[DECODER] = state["bert.embeddings.word_embeddings.weight"]
    try:
        torch.save(state, work / TORCH_FILE)
    except RuntimeError as error:  # torch raises this for a full disk
        raise OSError(None, str(error).splitlines()[0]) from error

    shutil.rmtree(scratch)
    flush_file(work / TORCH_FILE)
    write_json(work / "config.json", config_to_official(source.config))


def _official_tensors(links: list[Link], output: Output) -> Iterator[tuple[str, torch.Tensor]]:
    names = [name for link in links for name in link.theirs]
    yield from zip(names, _their_tensors(links, output), strict=True)
    for name in output.source.layouts:
        if name.startswith(EXTRA):
            yield name.removeprefix(EXTRA), output.get(name)


def _their_tensors(links: list[Link], output: Output) -> Iterator[torch.Tensor]:
    for link in links:
        yield from link.to_theirs(output.get(link.ours), output.source.config)


def _their_layout(link: Link, output: Output) -> dict[str, TensorLayout]:
    """Return the parts' dtypes and shapes without reading the tensor: on the meta device."""
    ours = output.layout(link.ours)
    parts = link.to_theirs(
        torch.empty(ours.shape, dtype=ours.dtype, device="meta"), output.source.config
    )

    return {
        name: TensorLayout(part.dtype, tuple(part.shape))
        for name, part in zip(link.theirs, parts, strict=True)
    }
