"""Compare the machines of a run in a table and name the odd ones.

`compare_nodes` is collective: every rank calls it.
"""

import os
import shutil
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable, file_sha256, nearest_folder
from megatron_interbert.machines.facts import code_fingerprint, library_versions
from megatron_interbert.machines.processes import aligned, heading
from megatron_interbert.parallel.launch import Launch
from megatron_interbert.parallel.state import ParallelState

CLOCK_SECONDS = 2.0  # allowed offset; reading the clocks after a barrier takes less
SHARED_MEMORY_GIB = 1.0  # needed by NCCL for the ranks of one machine
# more memory in use means that a GPU is busy; a process that has just started takes about 0.5 GiB
BUSY_GIB = 2.0


@dataclass
class Column:
    """Hold one fact of all machines: cells by node, and by node what is wrong with odd ones."""

    name: str
    cells: dict[str, str]
    wrong: dict[str, str]


def device_in_use(device: torch.device) -> tuple[str, float]:
    """Return (name, GiB in use by others); call it before this process uses the device itself."""
    if device.type == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores", 0.0
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.get_device_name(device), (total - free) / 2**30


def compare_nodes(
    config: RunConfig, launch: Launch, state: ParallelState, device: tuple[str, float]
) -> tuple[str, list[str]]:
    """Return (heading and table with a line for each node, list of what is wrong).

    `device` is the result of `device_in_use` before the ranks met: nccl takes memory of its own.
    """
    state.barrier()
    clock = time.time()
    probe = _probe(config, state)
    gathered = state.gather(
        {"node": state.node, "clock": clock, "device": device, **_facts(config, probe)}
    )
    if probe and state.is_main:
        probe.unlink(missing_ok=True)

    ranks: dict[str, list[int]] = {}
    for rank, facts in enumerate(gathered):
        ranks.setdefault(facts["node"], []).append(rank)

    columns = [
        Column("ranks", {node: ", ".join(map(str, of_node)) for node, of_node in ranks.items()}, {})
    ]
    first = {node: gathered[of_node[0]] for node, of_node in ranks.items()}
    for name in first[gathered[0]["node"]]["same"]:
        columns.append(_same(name, {node: facts["same"][name] for node, facts in first.items()}))

    columns.append(
        _devices(
            {
                node: [gathered[rank]["device"] for rank in of_node]
                for node, of_node in ranks.items()
            }
        )
    )
    columns.append(_clock({node: facts["clock"] for node, facts in first.items()}))
    columns.append(
        _at_least(
            "/dev/shm",
            {node: facts["shared_memory"] for node, facts in first.items()},
            SHARED_MEMORY_GIB,
        )
    )
    if config.save:
        columns.append(_save_folder(config.save, first))

    wrong = [f"{node}: {text}" for column in columns for node, text in column.wrong.items()]

    return "\n".join([heading(launch, len(ranks)), *_table(list(ranks), columns)]), wrong


def _probe(config: RunConfig, state: ParallelState) -> Path | None:
    """Create a file on rank 0 where the checkpoints will be, and return its path on all ranks.

    The disk is shared if the others see it. None without --save, or if it cannot be written.
    """
    name = None

    if config.save and state.is_main:
        name = nearest_folder(Path(config.save)) / f".shared-{uuid.uuid4().hex}"
        try:
            name.touch()
        except OSError:  # `_save_problem` reports it
            name = None

    return state.gather(name)[0]


def _facts(config: RunConfig, probe: Path | None) -> dict[str, Any]:
    manifests = [Path(store) / MANIFEST for store in config.stores()]
    return {
        "same": {
            **library_versions(),
            "code": code_fingerprint()[:8],
            "data": ", ".join(
                file_sha256(path)[:8] if path.is_file() else "missing" for path in manifests
            ),
        },
        "shared_memory": (
            shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
        ),
        "sees_save": probe is None or probe.exists(),
        "save_problem": _save_problem(config),
    }


def _save_problem(config: RunConfig) -> str:
    """Return why this machine cannot write to --save; empty if it can."""
    try:
        check_writable(Path(config.save), "--save")
    except UsageError as error:
        return str(error)

    return ""


def _same(name: str, values: dict[str, str]) -> Column:
    usual = Counter(values.values()).most_common(1)[0][0]
    wrong = {
        node: f"{name} is {value}, elsewhere {usual}"
        for node, value in values.items()
        if value != usual
    }

    wrong |= {
        node: "no region store at --data-path"
        for node, value in values.items()
        if "missing" in value
    }

    return Column(name, values, wrong)


def _devices(of_nodes: dict[str, list[tuple[str, float]]]) -> Column:
    cells = {}
    wrong = {}
    usual = Counter(len(devices) for devices in of_nodes.values()).most_common(1)[0][0]

    for node, devices in of_nodes.items():
        cells[node] = f"{len(devices)} x {devices[0][0]}"
        busy = [
            f"device {number} has {used:.0f} GiB in use"
            for number, (_, used) in enumerate(devices)
            if used > BUSY_GIB
        ]
        if busy:
            wrong[node] = ", ".join(busy)
        elif len(devices) != usual:
            wrong[node] = f"{len(devices)} ranks, elsewhere {usual}"
        elif len({name for name, _ in devices}) > 1:
            wrong[node] = f"different devices: {', '.join(sorted({name for name, _ in devices}))}"

    return Column("devices", cells, wrong)


def _save_folder(save: str, nodes: dict[str, dict[str, Any]]) -> Column:
    cells = {}
    wrong = {}

    for node, facts in nodes.items():
        if facts["save_problem"]:
            cells[node] = "cannot be written"
            wrong[node] = facts["save_problem"]
        elif not facts["sees_save"]:
            cells[node] = "not shared"
            wrong[node] = f"--save {save} is not the folder that rank 0 sees"
        else:
            cells[node] = "shared"

    return Column("--save", cells, wrong)


def _clock(values: dict[str, float]) -> Column:
    middle = sorted(values.values())[len(values) // 2]
    offsets = {node: value - middle for node, value in values.items()}
    wrong = {
        n: f"the clock is {d:+.1f} s off (set it by NTP)"
        for n, d in offsets.items()
        if abs(d) > CLOCK_SECONDS
    }

    return Column("clock", {node: f"{offset:+.2f} s" for node, offset in offsets.items()}, wrong)


def _at_least(name: str, values: dict[str, float], least: float) -> Column:
    wrong = {
        n: f"{name} has {v:.1f} GiB free, expected {least:g}"
        for n, v in values.items()
        if v < least
    }
    return Column(name, {node: f"{value:.1f} GiB" for node, value in values.items()}, wrong)


def _table(nodes: list[str], columns: list[Column]) -> list[str]:
    head = ["node", *(column.name for column in columns)]
    lines = aligned(
        [head, *([node, *(column.cells[node] for column in columns)] for node in nodes)]
    )
    for number, node in enumerate(nodes, 1):
        if odd := [column.name for column in columns if node in column.wrong]:
            lines[number] += f"   <- {', '.join(odd)}"

    return lines
