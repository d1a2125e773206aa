"""Write weights in every known format, from any source, one tensor at a time, so that models larger
than memory can be converted.

An output folder is written under a temporary name and renamed, so it is complete or absent.
"""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.files import (
    file_entry,
    flush_file,
    publish_folder,
    write_bytes,
    write_json,
    write_text,
)
from megatron_interbert.model.partition import is_expert, partition_dimension, shard
from megatron_interbert.weights.expert_tensors import name_of_expert
from megatron_interbert.weights.foreign import (
    DECODER,
    EXTRA,
    Link,
    bert_links,
    config_to_official,
    official_links,
)
from megatron_interbert.weights.foreign_files import HF_FILE, TORCH_FILE
from megatron_interbert.weights.manifest import VOCABULARY, versions, weights_name, write_manifest
from megatron_interbert.weights.reader import describe_pieces
from megatron_interbert.weights.sources import HF_PREFIX, WeightSource
from megatron_interbert.weights.tensor_files import TensorLayout, is_finite, write_tensors

TARGETS = ("sharded", "huggingface", "official", "bert")
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
Progress = Callable[[int], None]


@dataclasses.dataclass
class Output:
    """Hold what to write: the source, the dtype of all tensors (None: unchanged), the number of
    tensor-parallel ranks of `sharded`, a vocabulary to include, the model card of `huggingface`.
    """

    source: WeightSource
    dtype: torch.dtype | None = None
    tensor_parallel: int = 1
    vocabulary: bytes | None = None
    card: str = ""
    # names of tensors found to contain NaN or infinity
    not_finite: list[str] = dataclasses.field(default_factory=list)

    def layout(self, name: str, shape: Iterable[int] | None = None) -> TensorLayout:
        """Return the dtype and shape of a tensor as it will be written."""
        found = self.source.layouts[name]
        return TensorLayout(
            self.dtype or found.dtype, tuple(found.shape if shape is None else shape)
        )

    def get(self, name: str) -> torch.Tensor:
        """Return a full tensor in the dtype to be written; UsageError if converting to that dtype
        makes an element infinite.
        """
        return self._checked(name, self.source.get(name))

    def part(self, name: str, start: int, length: int) -> torch.Tensor:
        """Return elements [start, start + length) of a flattened tensor in the same way."""
        return self._checked(name, self.source.read(name, start, length))

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        written = tensor.to(self.dtype) if self.dtype else tensor
        if not is_finite(written):
            if is_finite(tensor):
                raise UsageError(
                    f"{self.source.path}: {name} holds {tensor.abs().max():.3g}, more than"
                    f" {self.dtype} can hold; give --dtype bfloat16 or float32"
                )

            if name not in self.not_finite:  # each rank's file asks for it
                self.not_finite.append(name)

        return written

    def bytes(self) -> int:
        """Return the bytes of all tensors as they will be written; every rank's file holds the
        replicated ones.
        """
        ranks = self.tensor_parallel
        copies = {
            name: ranks if partition_dimension(name) is None else 1 for name in self.source.layouts
        }

        return sum(self.layout(name).bytes * count for name, count in copies.items())


def heads_of(source: WeightSource) -> tuple[str, ...]:
    """Return the names of the heads whose weights a source has."""
    return tuple(head for name, head in HEADS.items() if name in source.layouts)


def door_of(heads: Iterable[str]) -> str:
    """Return the name of the Hugging Face class that makes most of weights with these heads."""
    return next(name for name, needed in DOORS.items() if needed <= set(heads))


def write_target(
    kind: str, output: Output, folder: Path, progress: Progress = lambda count: None
) -> None:
    """Write a folder in one of the formats in TARGETS.

    Raises UsageError, with nothing written, if the folder exists, the format cannot hold these
    weights, or the disk lacks room. `progress` is called with the bytes of each tensor written.
    """
    if folder.exists():
        raise UsageError(f"{folder}: exists already; remove it, or choose another --output")
    if kind != "bert" and output.source.kind == "bert":
        raise UsageError(
            f"{output.source.path}: BERT has no image side to write as '{kind}'; train from it by"
            " --init-from"
        )

    if kind in ("official", "bert"):
        refuse_what_they_lack(kind, output.source)

    if (
        kind in ("huggingface", "official")
        and "image_embedding.feature.weight" not in output.source.layouts
    ):
        raise UsageError(
            f"{output.source.path}: holds the text path alone (GLUE), not a whole '{kind}'"
            " model; write it as BERT: --to bert"
        )

    if kind == "sharded":
        output.source.config.check_tensor_parallel(output.tensor_parallel)
    elif output.tensor_parallel != 1:
        raise UsageError(
            f"--tensor-model-parallel-size {output.tensor_parallel}: only 'sharded' has one file"
            " per tensor-parallel rank; give --to sharded"
        )

    write = {
        "sharded": write_sharded,
        "huggingface": write_huggingface,
        "official": write_official,
        "bert": write_bert,
    }[kind]
    with _new_folder(folder, output.bytes() * (2 if kind == "official" else 1)) as work:
        write(output, work, progress)


def refuse_what_they_lack(kind: str, source: WeightSource) -> None:
    """Raise UsageError for experts and shared layers, which these formats cannot hold."""
    if source.config.experts:
        raise UsageError(
            f"{source.path}: '{kind}' has no experts; give --to huggingface or --to sharded"
        )
    if source.config.share_layers:
        raise UsageError(
            f"{source.path}: '{kind}' has no shared layers; give --untie-layers, which copies them"
        )


@contextmanager
def _new_folder(folder: Path, size: int) -> Iterator[Path]:
    """Make a temporary folder that becomes `folder` at the end and is removed on any error;
    UsageError if `size` bytes do not fit on the disk.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free

    if free < size * 1.02:
        raise UsageError(
            f"{parent}: {free / 1e9:.2f} GB free, {size * 1.02 / 1e9:.2f} GB needed; make room or"
            " give another --output"
        )

    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=parent))
    try:
        os.chmod(work, 0o777 & ~_umask())
        yield work
        publish_folder(work, folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_sharded(output: Output, work: Path, progress: Progress) -> None:
    """Write one safetensors file per tensor-parallel rank and a manifest: a checkpoint without an
    optimizer.
    """
    source = output.source
    ranks = output.tensor_parallel
    files = {}

    for rank in range(ranks):
        layout = {}
        pieces = {}

        for name, entry in source.layouts.items():
            if is_expert(name):
                start, length = share_of_experts(entry.shape, rank, ranks)
                layout[name] = output.layout(name, (length,))
                pieces[name] = (start, entry.shape)
                continue

            cut = partition_dimension(name)
            shape = [n // ranks if axis == cut else n for axis, n in enumerate(entry.shape)]
            layout[name] = output.layout(name, shape)
            pieces[name] = (0, layout[name].shape)

        tensors = (slice_of(output, name, rank, ranks) for name in layout)
        file = weights_name((rank, ranks))
        files[file] = write_tensors(work / file, layout, tensors, describe_pieces(pieces), progress)

    if output.vocabulary:
        write_bytes(work / VOCABULARY, output.vocabulary)
        files[VOCABULARY] = file_entry(work / VOCABULARY)

    data = {
        key: source.facts[key]
        for key in ("detector", "vocabulary", "store", "manifest_sha256")
        if key in source.facts
    }

    write_manifest(
        work,
        {
            "kind": "weights",
            "iteration": source.facts.get("iteration"),
            "consumed_samples": source.facts.get("consumed_samples"),
            "topology": {"data_parallel": 1, "tensor_parallel": ranks, "zero_stage": 0},
            "versions": versions(),
            "configs": {"model": dataclasses.asdict(source.config)},
            "data": data,
            "parameters": {name: list(entry.shape) for name, entry in source.layouts.items()},
            "files": files,
        },
    )


def share_of_experts(shape: Sequence[int], rank: int, ranks: int) -> tuple[int, int]:
    """Return (start, length) of the part of a flattened parameter of experts in a rank's file."""
    start, end = (math.prod(shape) * number // ranks for number in (rank, rank + 1))
    return start, end - start


def slice_of(output: Output, name: str, rank: int, ranks: int) -> torch.Tensor:
    """Return the part of a parameter in the file of one of `ranks` tensor-parallel ranks."""
    if is_expert(name):
        return output.part(name, *share_of_experts(output.layout(name).shape, rank, ranks))
    return shard(output.get(name), name, rank, ranks)


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


def describe_source(source: WeightSource) -> str:
    """Describe in one line what was opened."""
    heads = ", ".join(heads_of(source)) or "none"
    return f"{source.path}: {source.kind}, {len(source.layouts)} tensors, heads {heads}" + (
        f"; left out: {', '.join(source.left_out[:8])}" if source.left_out else ""
    )
