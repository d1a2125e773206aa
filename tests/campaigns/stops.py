"""Stops training runs with default flags by SIGINT, SIGTERM and SIGKILL at random times.

    python -m tests.campaigns.stops --rounds 60

Checks after each stop that what the run said is true (the checkpoint that it names is whole, the
next start resumes from it), that no more than the interval between checkpoints is lost, and at the
end that all losses are those of a run that nobody has disturbed.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from megatron_interbert.progress import progress
from megatron_interbert.weights.manifest import STEP_FOLDER, complete_checkpoints
from tests.corpus import write_store
from tests.launching import ends, losses, start_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
INTERVAL = 3.0  # seconds between checkpoints
SLACK = 5.0  # seconds that a step and a save may take on a machine that does other things as well
LAST = re.compile(r"stopped after step (\d+) \((\w+)\)(?:; the same command resumes from (\S+))?")
RESUMED = re.compile(r"^resumed from (\S+)$", re.MULTILINE)


def flags(store, save):
    """Those that name the run, and an interval of seconds; all others are defaults."""
    interval = ("--save-interval-in-mins", INTERVAL / 60)
    run = ("--data-path", store, "--model", "tiny", "--save", save, "--train-iters", 1_000_000)
    return (*run, *interval, "--log-interval", 1)


def step_of(path):
    """The step of a checkpoint's folder."""
    return int(Path(path).name.removeprefix(STEP_FOLDER))


def check_words(out, err, codes, number, save):
    """Hold what a stopped run has said against what lies on disk; gives the checkpoint it named."""
    newest = next(iter(complete_checkpoints(save)), None)

    for path in re.findall(r"^saved (\S+) ", out, re.MULTILINE):
        assert newest is not None, f"{path} was saved and is gone"
        assert Path(path).is_dir() or step_of(path) < step_of(newest), (
            f"{path} was saved and is gone"
        )

    if number == signal.SIGKILL:
        return newest

    name = signal.Signals(number).name
    last = LAST.search(out)
    if last is None:  # before the run has taken its signals over
        assert "train step" not in out, out + err
        return newest

    step, reason, path = last.groups()
    assert reason == name, last.group()
    assert Path(path) == newest, last.group()
    assert step_of(path) == int(step), last.group()
    assert set(codes) == {130 if number == signal.SIGINT else 75}, codes

    return newest


def one_life(store, save, ranks, number, seconds):
    """Start the run, stop it after so many seconds; (output of rank 0, its newest checkpoint)."""
    processes = start_ranks(*[flags(store, save)] * ranks)
    time.sleep(seconds)
    before = next(iter(complete_checkpoints(save)), None)
    age = time.time() - before.stat().st_mtime if before else 0.0
    trained = (save / "metrics.jsonl").exists()
    for process in processes if number == signal.SIGINT else processes[-1:]:  # Ctrl-C reaches all
        process.send_signal(number)

    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    out = "".join(result[0] for result in results)
    err = "".join(result[1] for result in results)
    codes = [result[2] for result in results]
    assert "Traceback" not in err, err
    if number == signal.SIGKILL and before and trained:
        assert age <= INTERVAL + SLACK, f"the newest checkpoint was {age:.1f} s old"

    return out, check_words(out, err, codes, number, save)


def run(rounds, seed, ranks, folder):
    """All rounds and the comparison; gives counts of what was seen."""
    draw = random.Random(seed)
    store = write_store(folder / "store")
    save = folder / "run"
    counts = Counter()
    expected = None

    for turn in progress(range(rounds), desc="stops", unit="stop"):
        number = SIGNALS[turn % len(SIGNALS)]
        least = 9.0 if number == signal.SIGKILL else 1.0  # a killed run must have had time to save
        out, newest = one_life(store, save, ranks, number, draw.uniform(least, least + 5.0))
        resumed = RESUMED.search(out)

        if resumed and expected:
            assert Path(resumed.group(1)) == expected, (
                f"resumed from {resumed.group(1)}, not {expected}"
            )
            counts["resumed"] += 1

        expected = newest
        counts[number.name] += 1

    disturbed = losses(save)
    whole = folder / "whole"
    undisturbed = [*flags(store, whole), "--exit-interval", max(disturbed)]
    for code, out, err in ends(start_ranks(*[undisturbed] * ranks), timeout=3600):
        assert code == 0, out + err

    expected_losses = losses(whole)
    for step, values in disturbed.items():
        assert values == expected_losses[step], f"step {step}: {values}, {expected_losses[step]}"

    counts["steps compared"] = len(disturbed)

    return counts


def main():
    """Parse the command line, run, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="stops (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(options.rounds, options.seed, options.ranks, Path(folder))

    print(", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
