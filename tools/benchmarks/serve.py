"""Measure the service under many clients at once: throughput, latency and memory, with requests
answered together and one by one.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_interbert.config.options import option
from megatron_interbert.errors import UsageError
from megatron_interbert.machines.processes import aligned
from megatron_interbert.progress import progress
from megatron_interbert.tasks.records import read_records
from tools.benchmarks.options import BenchmarkOptions

PATIENCE = 60.0  # seconds for which a client waits for an answer


@dataclass
class Options(BenchmarkOptions):
    """Measure throughput, latency and memory of the service."""

    load: str = option("", "weights, as for `interbert serve`", required=True, group="model")
    data_path: str = option("", "region store of the items", required=True, group="data")
    queries: str = option(
        "", "JSON lines with query_text, what the clients ask", required=True, group="data"
    )
    clients: int = option(
        512, "concurrent clients; each asks again as soon as it has an answer", least=1
    )
    seconds: float = option(60.0, "seconds of each measurement")
    candidates: int = option(50, "items that the model scores per query")


def measure(options: Options) -> dict[str, Any]:
    """Measure both ways, print a table and return the figures."""
    queries = [
        record["query_text"]
        for _, record in read_records(options.queries, "--queries", {"query_text": str})
    ]
    if not queries:
        raise UsageError(f"--queries {options.queries}: holds no queries")

    bodies = [
        json.dumps({"query": query, "candidates": options.candidates}).encode() for query in queries
    ]
    result = {}

    for name, flags in (("one by one", ("--batch-pairs", "1")), ("together", ())):
        with Served(options, flags) as service:
            result[name] = asyncio.run(
                load(service, bodies, options.clients, options.seconds, name)
            )

    head = (
        "",
        "answers/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "together",
        "statuses",
        "memory MiB, before and after",
    )

    lines = [
        (
            name,
            f"{figures['answers_per_second']:.1f}",
            *(f"{figures[p]:.0f}" for p in ("p50_ms", "p95_ms", "p99_ms")),
            f"{figures['together']:.1f}",
            ", ".join(f"{status}: {count}" for status, count in figures["statuses"].items()),
            f"{figures['memory_mib'][0]:.0f}, {figures['memory_mib'][1]:.0f}",
        )
        for name, figures in result.items()
    ]
    print("\n".join(aligned([head, *lines])))
    gain = result["together"]["answers_per_second"] / result["one by one"]["answers_per_second"]
    print(f"answered together: {gain:.2f} times the rate")

    return {"ways": result, "gain": gain}


class Served:
    """Run a service for a measurement in a process of its own."""

    def __init__(self, options: Options, flags: tuple[str, ...]) -> None:
        command = [
            sys.executable,
            "-m",
            "megatron_interbert.serve",
            "--load",
            options.load,
            "--data-path",
            options.data_path,
            "--port",
            "0",
            *flags,
        ]
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def __enter__(self) -> "Served":
        line = self.process.stdout.readline()
        if not line.startswith("serving"):
            raise UsageError(
                "the service did not start; try `interbert serve` with the same --load and"
                " --data-path"
            )

        self.host, port = line.split()[-1].strip("/").removeprefix("http://").split(":")
        self.port = int(port)

        return self

    def memory(self) -> float:
        """Return the resident memory of the service in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


async def load(
    service: Served, bodies: list[bytes], clients: int, seconds: float, name: str
) -> dict[str, Any]:
    """Let `clients` ask for `seconds` and return the figures that they see."""
    for _ in range(3):  # warm-up: the first passes allocate
        await ask(service, bodies[0])

    before = service.memory()
    end = time.monotonic() + seconds
    took: list[float] = []
    together: list[int] = []
    statuses: Counter[int] = Counter()

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            started = time.monotonic()
            status, answer = await ask(service, draw.choice(bodies))
            statuses[status] += 1

            if status == 200:
                took.append(time.monotonic() - started)
                together.append(answer["timings"]["batch_size"])
            else:
                await asyncio.sleep(draw.uniform(0.05, 0.5))  # it was told to try again later

    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    with progress(total=round(seconds), unit="s", desc=name, leave=False) as bar:
        while any(not task.done() for task in tasks):
            await asyncio.sleep(1)
            bar.update()

    for task in tasks:
        task.result()

    cuts = statistics.quantiles(took, n=100)

    return {
        "answers_per_second": len(took) / seconds,
        "p50_ms": 1000 * cuts[49],
        "p95_ms": 1000 * cuts[94],
        "p99_ms": 1000 * cuts[98],
        "together": statistics.mean(together),
        "statuses": dict(sorted(statuses.items())),
        "memory_mib": [before, service.memory()],
    }


async def ask(service: Served, body: bytes) -> tuple[int, Any]:
    """Return (status, answer) of one search on a connection of its own."""
    reader, writer = await asyncio.wait_for(
        asyncio.open_connection(service.host, service.port), PATIENCE
    )

    try:
        head = (
            "POST /search HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type:"
            f" application/json\r\ncontent-length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        text = await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()

    head_, _, rest = text.partition(b"\r\n\r\n")

    return int(head_.split(b" ", 2)[1]), json.loads(rest) if rest.startswith(b"{") else None
