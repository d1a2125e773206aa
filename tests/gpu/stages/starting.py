"""What is said before a long run: preflight, the micro-batch by trial, and a lack of memory."""

import dataclasses
import json
import re
import resource
from pathlib import Path

import torch

from megatron_interbert.model.presets import PRESETS
from tests.gpu.stages.data import base_store
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import module

LITTLE = 3 << 30  # bytes of the GPU that are left to a run that must fail


def check_preflight(place: Place, record: Record) -> None:
    """Preflight of the base model in bf16."""
    batch = place.choose(256, 8)
    ended = module(
        "preflight",
        *("--model", place.model, "--data-path", base_store(place), "--bf16"),
        *("--micro-batch-size", batch),
    ).wait()
    lines = [line for line in ended.text.splitlines() if re.match(r"(ok|FAILED|-) ", line)]
    record.note(code=ended.code, lines=lines)
    record.expect(ended.code == 0, f"code {ended.code}: {ended.last}")
    for line in lines:
        record.expect(line.startswith("ok "), line)

    record.say(f"{len(lines)} checks, micro-batch {batch}: {ended.last}")


def check_memory(place: Place, record: Record) -> None:
    """`--micro-batch-size auto` trains; where memory lacks one line says what to do."""
    together = place.choose(512, 16)
    flags = (
        *("--model", place.model, "--data-path", base_store(place), "--bf16"),
        *("--global-batch-size", together, "--train-iters", 2, "--log-interval", 1),
    )
    ended = module("pretrain", *flags, "--micro-batch-size", "auto").wait()
    chosen = re.search(r"micro-batch size (\d+) of .*", ended.text)
    record.note(auto_code=ended.code, auto_said=chosen and chosen[0])
    record.expect(ended.code == 0 and chosen is not None, f"auto: code {ended.code}: {ended.last}")
    if chosen:
        record.say(chosen[0][:150])

    check_lack(place, record, flags, together)


def check_lack(place: Place, record: Record, flags: tuple, together: int) -> None:
    """A run with too little memory: on a nearly full GPU; pretended by a limit of its own."""
    options = {}
    if place.pretended:
        flags = (*flags, "--model", wide_model(place))
        options["prepare"] = limit_memory

    taken = leave_little(place)
    ended = module("pretrain", *flags, "--micro-batch-size", together, **options).wait()
    del taken
    record.note(lack_code=ended.code, lack_said=ended.errors)
    one_line = len(ended.errors) == 1 and "Traceback" not in ended.text
    record.expect(
        ended.code in (1, 2) and one_line and "--micro-batch-size" in ended.errors[0],
        f"lack of memory: code {ended.code}, expected one line that names --micro-batch-size:"
        f" {ended.last}",
    )
    if ended.errors:
        record.say(f"lack of memory: code {ended.code}, {ended.errors[0][:80]}")


def leave_little(place: Place) -> torch.Tensor | None:
    """Take the GPU's memory but LITTLE, for as long as the result lives."""
    if place.pretended:
        return None
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(free - LITTLE, 1), dtype=torch.uint8, device=place.device)


def wide_model(place: Place) -> Path:
    """Sizes of a model whose weights and moments take 1.4 GB; limit_memory() allows less."""
    path = place.scratch / "wide.json"
    sizes = dataclasses.replace(PRESETS["tiny"], ffn_hidden_size=200_000)
    path.write_text(json.dumps(dataclasses.asdict(sizes)))
    return path


def limit_memory() -> None:
    """Let this process have little memory beside its libraries."""
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
