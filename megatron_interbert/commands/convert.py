"""Convert weights between formats: official InterBERT, Hugging Face, BERT, our checkpoints.

    interbert convert RUN --to huggingface --output exported --verify
    interbert convert official/pytorch_model.bin --to sharded --tensor-model-parallel-size 4 \\
        --output base-tp4
    interbert convert RUN/global_step2000 --list

--from auto recognises our checkpoints (in a run's folder: the newest; with any data-parallel,
tensor-parallel and ZeRO layout), an official .bin (pretraining or downstream; with config.json
beside it, or --model), and Hugging Face folders of InterBERT and of BERT. Tensors are converted one
at a time. No pickled code is ever run.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from megatron_interbert.command_line import run_command
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.errors import UsageError
from megatron_interbert.model.partition import partition_kind
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json
from megatron_interbert.weights.heads import heads_of
from megatron_interbert.weights.manifest import VOCABULARY
from megatron_interbert.weights.output import Output
from megatron_interbert.weights.sources import KINDS, WeightSource, open_weights
from megatron_interbert.weights.targets import TARGETS, write_target
from megatron_interbert.weights.views import divided_into_experts, untied, without_own_heads

TYPES = {
    "keep": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Options(Flags):
    """Hold the flags of convert."""

    GROUP: ClassVar[str] = "data"

    input: str = argument("file or folder to read")
    source: str = option("auto", "format of the input", ("auto", *KINDS), flag="--from")
    to: str = option("", "format to write", tuple(TARGETS))
    output: str = option("", "folder to write; must not exist")
    list_only: bool = option(
        False, "print names, shapes and partition; write nothing", flag="--list"
    )
    verify: bool = option(
        False, "run a batch through the model read and the one written; print how far they differ"
    )

    model: str = option(
        "",
        "preset or JSON file of sizes, for inputs without their own (official, BERT)",
        group="model",
    )
    vocab_file: str = option(
        "", "vocabulary to put beside the weights; default: the input's", group="model"
    )
    averaged: bool = option(
        False,
        "take a checkpoint's averaged weights (--ema-decay)",
        group="model",
    )
    dtype: str = option("keep", "dtype of all tensors written", tuple(TYPES), group="model")
    tensor_model_parallel_size: int = option(
        1,
        "tensor-parallel ranks, and so files, of --to sharded",
        least=1,
        group="parallelism",
        old_names=("--tp",),
    )
    experts: int = option(
        0,
        "turn each MLP of a dense model into this many experts, with the same loss to 1e-3; 0: no",
        least=0,
        group="model",
    )
    prototypes: int = option(
        1, "groups of these experts, in each of which a token goes to one", least=1, group="model"
    )
    expert_stacks: str = option(
        ",".join(ModelConfig.STACKS), "stacks that get experts, comma-separated", group="model"
    )
    untie_layers: bool = option(
        False,
        "give each layer of a model trained with --share-layers parameters of its own",
        group="model",
    )
    results: list[str] = option(
        (), "result.json files to show on the model card", several=True, group="more"
    )


def describe_source(source: WeightSource) -> str:
    """Describe in one line what was opened."""
    heads = ", ".join(heads_of(source)) or "none"
    return f"{source.path}: {source.kind}, {len(source.layouts)} tensors, heads {heads}" + (
        f"; left out: {', '.join(source.left_out[:8])}" if source.left_out else ""
    )


def list_tensors(source: WeightSource) -> None:
    """Print name, shape, dtype and partition of every parameter."""
    width = max(map(len, source.layouts))

    for name, entry in source.layouts.items():
        shape = " x ".join(map(str, entry.shape))
        dtype = str(entry.dtype).removeprefix("torch.")
        print(f"{name:<{width}}  {shape:<14} {dtype:<9} {partition_kind(name)}")

    count = sum(torch.Size(entry.shape).numel() for entry in source.layouts.values())
    print(
        f"{len(source.layouts)} tensors, {count / 1e6:.1f} M parameters (with the padding of the"
        " vocabulary)"
    )


def vocabulary_of(source: WeightSource, given: str) -> bytes | None:
    """Return the content of the vocabulary that belongs to the weights; None if there is none.

    Raises UsageError if its size is not that of the model.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    file = Path(given) if given else folder / VOCABULARY
    if given and not file.is_file():
        raise UsageError(f"--vocab-file {given}: no such file")
    if not file.is_file():
        return None

    content = file.read_bytes()
    entries = content.count(b"\n") + (not content.endswith(b"\n"))
    if entries != source.config.vocab_size:
        raise UsageError(
            f"{file}: {entries} entries, the model has {source.config.vocab_size}; give its own"
            " with --vocab-file"
        )

    return content


def model_card_for(source: WeightSource, results: list[str]) -> str:
    """Return the text of the README.md of a Hugging Face folder."""
    try:
        from megatron_interbert.hf.model_card import model_card
    except ImportError as error:
        raise UsageError(
            "--to huggingface needs transformers: pip install 'transformers>=5.3,<6'"
        ) from error

    read = [read_json(path, "--results") for path in results]

    facts = {"source": source.kind, "heads": heads_of(source), "results": read}

    return model_card(source.config, {**source.facts, **facts})


def run(options: Options) -> None:
    """List the tensors, or convert and verify."""
    config = load_model_config(options.model) if options.model else None
    source = open_weights(options.input, options.source, config, options.averaged)
    if options.averaged and not source.facts.get("averaged"):
        raise UsageError(f"--averaged: {options.input} holds no averaged weights; leave it out")

    if options.prototypes > 1 and not options.experts:
        raise UsageError("--prototypes divides the experts that --experts makes; give both")
    if not options.is_default("expert_stacks") and not options.experts:
        raise UsageError("--expert-stacks chooses where --experts puts experts; give both")

    if options.to and options.to != "sharded":
        source = without_own_heads(source)

    print(*source.notes, describe_source(source), sep="\n", flush=True)
    original = source
    if options.untie_layers:
        source = untied(source)
    if options.experts:
        source = divided_into_experts(
            source, options.experts, options.prototypes, options.expert_stacks
        )
    if options.list_only:
        list_tensors(source)
        return

    if not options.to or not options.output:
        raise UsageError(f"give --to {'|'.join(TARGETS)} and --output FOLDER, or --list")

    card = model_card_for(source, options.results) if options.to == "huggingface" else ""
    output = Output(
        source,
        TYPES[options.dtype],
        options.tensor_model_parallel_size,
        vocabulary_of(source, options.vocab_file),
        card,
    )
    folder = Path(options.output)
    with progress(total=output.bytes(), unit="B", unit_scale=True, desc="writing") as bar:
        write_target(options.to, output, folder, bar.update)

    print(f"wrote {folder} ({options.to}, {output.bytes() / 1e6:.1f} MB of tensors)")
    say_not_finite(output)
    if options.verify:
        verify(original, options.to, folder)


def say_not_finite(output: Output) -> None:
    """Warn about tensors that hold NaN or infinity."""
    if output.not_finite:
        print(
            f"note: NaN or infinity in {len(output.not_finite)} of {len(output.source.layouts)}"
            f" tensors, first in {output.not_finite[0]}; written unchanged, but no model works"
            " with them: convert an earlier checkpoint",
            file=sys.stderr,
        )


def verify(source: WeightSource, to: str, folder: Path) -> None:
    """Print how far the outputs of source and target differ."""
    from megatron_interbert.hf.compare import largest_difference

    for name, difference in largest_difference(source, to, folder).items():
        print(f"verify {name}: largest difference {difference:.3g}")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
