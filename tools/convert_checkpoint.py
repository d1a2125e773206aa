#!/usr/bin/env python3
"""Converts weights between every format: official InterBERT, Hugging Face InterBERT and BERT, our checkpoints of any layout.

    python tools/convert_checkpoint.py RUN --to huggingface --output exported --verify
    python tools/convert_checkpoint.py official/pytorch_model.bin --to sharded --tp 4 --output base-tp4
    python tools/convert_checkpoint.py RUN/global_step2000 --list

--from auto recognises: one of our checkpoints (a run's folder: its newest; any data-parallel, tensor-parallel and ZeRO layout),
an official .bin (pretraining or downstream; config.json beside it, or --model), Hugging Face folders of InterBERT and of BERT.
Tensors pass one at a time. No pickled code is ever run.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.model.partition import partition_kind
from megatron_interbert.model.presets import load_model_config
from megatron_interbert.parser import Parser
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json
from megatron_interbert.weights.manifest import VOCABULARY
from megatron_interbert.weights.sources import KINDS, Source, open_source
from megatron_interbert.weights.targets import TARGETS, Output, describe_source, write_target

TYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="file or folder to read")
    parser.add_argument("--from", dest="source", default="auto", choices=("auto", *KINDS), help="format of the input")
    parser.add_argument("--to", choices=TARGETS, help="format to write")
    parser.add_argument("--output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--tp", type=int, default=1, help="files (tensor-parallel ranks) of --to sharded")
    parser.add_argument("--dtype", default="keep", choices=TYPES, help="type of all tensors written")
    parser.add_argument("--model", help="preset or JSON of sizes, for inputs that do not hold theirs (official, BERT)")
    parser.add_argument("--vocab-file", type=Path, help="vocabulary to put beside the weights; default: the input's")
    parser.add_argument("--verify", action="store_true", help="run a batch through both sides and print the largest difference")
    parser.add_argument(
        "--averaged", action="store_true", help="take the averaged weights (--ema-decay) of a checkpoint that has such"
    )
    parser.add_argument("--results", type=Path, nargs="+", default=[], help="result.json files to show on the model card")
    parser.add_argument("--list", action="store_true", help="print names, shapes and partition, write nothing")
    return parser.parse_args()


def list_tensors(source: Source) -> None:
    """Name, shape, type and partition of every parameter."""
    width = max(map(len, source.layouts))
    for name, entry in source.layouts.items():
        shape = " x ".join(map(str, entry.shape))
        print(f"{name:<{width}}  {shape:<14} {str(entry.dtype).removeprefix('torch.'):<9} {partition_kind(name)}")
    count = sum(torch.Size(entry.shape).numel() for entry in source.layouts.values())
    print(f"{len(source.layouts)} tensors, {count / 1e6:.1f} M values (padding of the vocabulary counted)")


def vocabulary_of(source: Source, given: Path | None) -> bytes | None:
    """The vocabulary that goes with the weights, where there is one."""
    folder = source.path if source.path.is_dir() else source.path.parent
    file = given or folder / VOCABULARY
    if given and not given.is_file():
        raise UsageError(f"--vocab-file {given}: no such file")
    if not file.is_file():
        return None
    content = file.read_bytes()
    entries = content.count(b"\n") + (not content.endswith(b"\n"))
    if entries != source.config.vocab_size:
        raise UsageError(f"{file}: {entries} entries, the model has {source.config.vocab_size}; give its own by --vocab-file")
    return content


def model_card_for(source: Source, results: list[Path]) -> str:
    """README.md of a Hugging Face folder."""
    try:
        from megatron_interbert.hf.model_card import model_card
    except ImportError as error:
        raise UsageError("--to huggingface needs transformers: pip install 'transformers>=5.3,<6'") from error
    return model_card(
        source.config, {**source.facts, "source": source.kind, "results": [read_json(path, "--results") for path in results]}
    )


def main() -> None:
    """Convert, list or verify."""
    arguments = parse_arguments()
    config = load_model_config(arguments.model) if arguments.model else None
    source = open_source(arguments.input, arguments.source, config, arguments.averaged)
    if arguments.averaged and not source.facts.get("averaged"):
        raise UsageError(f"--averaged: {arguments.input} holds no averaged weights; leave it out")
    print(*source.notes, describe_source(source), sep="\n", flush=True)
    if arguments.list:
        list_tensors(source)
        return
    if not arguments.to or not arguments.output:
        raise UsageError(f"give --to {'|'.join(TARGETS)} and --output FOLDER, or --list")
    card = model_card_for(source, arguments.results) if arguments.to == "huggingface" else ""
    vocabulary = vocabulary_of(source, arguments.vocab_file)
    output = Output(source, TYPES[arguments.dtype], arguments.tp, vocabulary, card)
    with progress(total=output.bytes(), unit="B", unit_scale=True, desc="writing") as bar:
        write_target(arguments.to, output, arguments.output, bar.update)
    print(f"wrote {arguments.output} ({arguments.to}, {output.bytes() / 1e6:.1f} MB of tensors)")
    if output.not_finite:
        print(
            f"note: NaN or infinity in {len(output.not_finite)} of {len(source.layouts)} tensors, first in"
            f" {output.not_finite[0]}; written as they are, but no model works with them: take an earlier checkpoint",
            file=sys.stderr,
        )
    if arguments.verify:
        from megatron_interbert.hf.compare import largest_difference

        for name, difference in largest_difference(source, arguments.to, arguments.output).items():
            print(f"verify {name}: largest difference {difference:.3g}")


if __name__ == "__main__":
    run_entry(main)
