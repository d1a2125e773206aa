"""Profile some steps: how long the GPU was busy, and what was launched."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 12  # kernels to list


def profile_steps(work: Callable[[], Any], steps: int, device: torch.device) -> dict[str, Any]:
    """Profile `work`, which runs `steps` steps; return the result of `summarise`."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as found:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]

    return summarise(events, steps)


def summarise(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return, per step: operations dispatched, launches, milliseconds the GPU was busy, in all and
    by kernel.

    `events` are those of a Chrome trace, in microseconds. Overlapping spans are counted once.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    on_gpu = [event for event in complete if event.get("cat") in ON_GPU]
    by_name: Counter[str] = Counter()
    for event in on_gpu:
        by_name[event["name"][:80]] += event["dur"]

    return {
        "operations": sum(event.get("cat") == "cpu_op" for event in complete) / steps,
        "launches": len(on_gpu) / steps,
        "busy_ms": covered([(e["ts"], e["ts"] + e["dur"]) for e in on_gpu]) / 1000 / steps,
        "top_ms": {name: round(us / 1000 / steps, 4) for name, us in by_name.most_common(TOP)},
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of spans (begin, end)."""
    total = 0.0
    last = float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)

    return total
