"""Check the start of a run: preflight, the micro-batch size by trial, and lack of memory."""

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

LITTLE = 3 << 30  # bytes of GPU memory left to a run that must fail


def check_preflight(place: Place, record: Record) -> None:
    """Check preflight of the base model in bf16."""
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
    """Check `--micro-batch-size auto`, and that one line says what to do if memory is short."""
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
    """Run with too little memory: on a nearly full GPU, or on a CPU under a memory limit."""
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
    """Take all of the GPU's memory except LITTLE, for as long as the result lives."""
    if place.pretended:
        return None
    free = torch.cuda.mem_get_info()[0]
    return torch.empty(max(free - LITTLE, 1), dtype=torch.uint8, device=place.device)


def wide_model(place: Place) -> Path:
    """Write sizes of a model whose state takes 1.4 GB, more than limit_memory() allows."""
    path = place.scratch / "wide.json"
    sizes = dataclasses.replace(PRESETS["tiny"], ffn_hidden_size=200_000)
    path.write_text(json.dumps(dataclasses.asdict(sizes)))
    return path


def limit_memory() -> None:
    """Limit this process to 1 GiB of memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
