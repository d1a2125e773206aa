"""Convert the units of a build in several processes, any of which may be killed at any moment."""

import multiprocessing
import multiprocessing.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from megatron_interbert.errors import TrainingStopped, UsageError
from megatron_interbert.preparation.building.conversion import EXPECTED, UnitJob, convert_unit
from megatron_interbert.preparation.building.interrupts import (
    LOOK,
    end_with_parent,
    interrupts_blocked,
    keeping_interrupts,
)
from megatron_interbert.preparation.building.joining import ADVICE
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.base import FeatureSource


def convert_units(
    jobs: Iterable[UnitJob], workers: int, plan: BuildPlan, max_dropped: float, bar: tqdm
) -> None:
    """Convert units, in this process or several, and move the bar on; raise UsageError early if,
    after 10,000 images, more than the share `max_dropped` is dropped.
    """
    counts: Counter[str] = Counter()

    for done in _results(jobs, workers, plan):
        counts.update(read=done["read"], faults=done["faults"])
        bar.update()
        bar.set_postfix(images=counts["read"], dropped=counts["faults"], refresh=False)
        if counts["read"] > 10_000 and counts["faults"] > max_dropped * counts["read"]:
            raise UsageError(
                too_many_dropped(counts["faults"], counts["read"], done["reasons"], max_dropped)
            )


def _results(jobs: Iterable[UnitJob], workers: int, plan: BuildPlan) -> Iterator[dict[str, Any]]:
    if workers <= 1:
        end = plan.start_worker(0)
        try:
            for job in jobs:
                yield convert_unit(job, plan.sources)
        finally:
            end()
        return

    # spawn: no handle, lock or thread of this process is inherited
    context = multiprocessing.get_context("spawn")
    with keeping_interrupts() as check:
        started = context.Value("i", 0)
        pool = ProcessPoolExecutor(
            workers,
            context,
            initializer=_start_process,
            initargs=(plan.sources, plan.start_worker, started),
        )
        waiting = iter(jobs)
        running = set[Future]()

        try:
            while True:
                while len(running) < 2 * workers and (job := next(waiting, None)) is not None:
                    check()
                    with interrupts_blocked():
                        running.add(pool.submit(_convert, job))

                check()
                if not running:
                    return

                done, running = wait(running, LOOK, FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise TrainingStopped(
                "a process of the build has died (killed, or out of memory?); finished shards are"
                " kept: the same command resumes; give fewer --workers if memory ran out"
            ) from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()  # safe at any moment: a unit is either marked as done or redone
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_sources: list[FeatureSource] = []  # in a process of the pool: sent once, not with each job


def _convert(job: UnitJob) -> dict[str, Any]:
    return convert_unit(job, _sources)


def _start_process(
    sources: list[FeatureSource], start: Callable[[int], Callable[[], None]], started: Any
) -> None:
    """Keep the sources, and number this process."""
    _sources[:] = sources
    with started.get_lock():
        number = started.value
        started.value += 1

    multiprocessing.util.Finalize(None, start(number), exitpriority=1)
    end_with_parent()


def too_many_dropped(faults: int, read: int, reasons: dict[str, int], limit: float) -> str:
    reason = max((r for r in reasons if r not in EXPECTED), key=lambda r: reasons[r], default="")
    advice = f"{ADVICE[reason]}. " if reason in ADVICE else ""
    return (
        f"{faults} of {read} images cannot be used, mostly: {reason}; more than --max-dropped"
        f" {limit}. {advice}Fix the input or the flags, or allow more with a higher --max-dropped"
        " (finished shards are kept)"
    )
