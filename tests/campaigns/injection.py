"""Lets one system call after another fail while a run saves or resumes, an index is built, a
journal grows.

    python -m tests.campaigns.injection --faults 500

A library (injector.c) is preloaded: the n-th call that opens, reads, writes, flushes, renames or
removes something in the folder at hand fails, once or from then on, or a write stops halfway. Each
life is a fork of this process, which has imported everything. After each: - it has ended by itself,
with no traceback, and with one line where it ended with an error; - what was committed or confirmed
before is there and whole, and a run has not started from nothing; - a life without faults brings
the work to the end that it has without any.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from megatron_interbert import pretrain
from megatron_interbert.errors import run_entry
from megatron_interbert.progress import progress
from megatron_interbert.serving.index import (
    Version,
    prune,
    served_version,
    version_names,
    write_version,
)
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import Journal, NotKept, begin
from megatron_interbert.weights.manifest import complete_checkpoints, verify
from tests.corpus import write_store
from tests.launching import free_ports, losses

STEPS = 6
SAVED_BEFORE = 4
NEVER = 1 << 40
LONGEST = 120  # seconds of a life
ITEMS = [Item(f"i{n}", f"p{n}", f"title {n}") for n in range(30)]


class Failure(AssertionError):
    """What the campaign looks for."""


class Life:
    """A fork of this process that works on a folder while a call fails; its end and what it has
    said.
    """

    def __init__(self, folder, work, nth, seed=0, sticky=False):
        self.said = tempfile.NamedTemporaryFile(prefix="life-", suffix=".log")
        self.confirmed = tempfile.NamedTemporaryFile(prefix="life-", suffix=".confirmed")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            self._live(folder, work, nth, seed, sticky)

        self.sticky = sticky
        self.code = self._wait(child)
        self.text = Path(self.said.name).read_text(errors="replace")
        calls = Path(f"{self.confirmed.name}.calls")
        self.calls = int(calls.read_text()) if calls.exists() else 0
        calls.unlink(missing_ok=True)

    def _live(self, folder, work, nth, seed, sticky):
        for stream in (1, 2):
            os.dup2(self.said.fileno(), stream)

        library = ctypes.CDLL(None)
        ends = os._exit

        def count_and_end(code):
            Path(f"{self.confirmed.name}.calls").write_text(str(library.fault_calls()))
            ends(code)

        os._exit = count_and_end
        library.fault_arm(str(folder).encode(), ctypes.c_long(nth), seed, int(sticky))

        try:
            run_entry(lambda: work(folder, self.confirmed.fileno()))
        except BaseException:
            traceback.print_exc()
            os._exit(3)

        os._exit(0)

    def _wait(self, child):
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)

        os.kill(child, 9)
        os.waitpid(child, 0)

        return "hangs"

    def check(self):
        """It has ended by itself, by success or with one line."""
        if self.code not in (0, 1, 2):
            raise Failure(f"ended with {self.code}: {self.text[-3000:]}")
        if "Traceback" in self.text:
            raise Failure(f"a traceback: {self.text[-3000:]}")

        errors = [line for line in self.text.splitlines() if line.startswith("error")]
        if len(errors) != (self.code != 0):
            raise Failure(
                f"code {self.code} with {len(errors)} lines of errors: {self.text[-3000:]}"
            )


class Training:
    """A run from its start to its end."""

    name = "saving"
    steps = STEPS

    def __init__(self, folder):
        self.folder = folder
        self.store = write_store(folder / "store", images=24)
        self.base = folder / "base"
        self.base.mkdir()
        self.begin()
        whole = folder / "whole"
        shutil.copytree(self.base, whole)
        life = Life(whole, self.work, NEVER)
        if life.code:
            raise Failure(f"the undisturbed run fails: {life.text}")

        self.calls = life.calls
        self.expected = losses(whole / "save")

    def begin(self):
        """What a life starts from: a folder with the store alone."""
        shutil.copytree(self.store, self.base / "store")

    def work(self, folder, confirmed):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports(1)[0]))
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        flags = {
            **{
                "data-path": folder / "store",
                "save": folder / "save",
                "model": "tiny",
                "train-iters": self.steps,
            },
            **{"save-interval": 2, "keep-last": 2, "micro-batch-size": 2, "global-batch-size": 2},
            **{
                "data-partitions": 2,
                "num-workers": 0,
                "log-interval": 1,
                "lr": "1e-3",
                "zero-stage": 0,
            },
        }
        sys.argv = [
            "pretrain",
            *(str(part) for name, value in flags.items() for part in (f"--{name}", value)),
        ]
        pretrain.run()

    def check(self, folder, life):
        """Nothing that was committed is gone but for newer ones; the same command then reaches the
        same end.
        """
        save = folder / "save"
        before = {path.name for path in complete_checkpoints(self.base / "save")}
        said = {
            line.split()[1].rsplit("/", 1)[1]
            for line in life.text.splitlines()
            if line.startswith("saved ")
        }
        now = {path.name: verify(path) for path in complete_checkpoints(save)}
        newest = max((int(name[11:]) for name, damage in now.items() if damage is None), default=0)

        for name in before | said:
            if now.get(name, "gone") is not None and int(name[11:]) >= newest:
                raise Failure(
                    f"{name} was committed and is {now.get(name, 'gone')}: {life.text[-3000:]}"
                )

        if before and "train step 1/" in life.text:
            raise Failure(f"the run has started from nothing: {life.text[-3000:]}")

        again = Life(folder, self.work, NEVER)
        if again.code or verify(save / f"global_step{STEPS}") is not None:
            raise Failure(
                f"does not reach its end any more: {life.text[-2000:]} {again.text[-2000:]}"
            )

        known = losses(save)
        if not known.keys() <= self.expected.keys() or any(
            known[step] != self.expected[step] for step in known
        ):
            raise Failure(f"losses differ from the undisturbed run's: {life.text[-2000:]}")


class Resuming(Training):
    """A run that finds two checkpoints."""

    name = "resuming"

    def begin(self):
        super().begin()
        self.steps = SAVED_BEFORE
        if Life(self.base, self.work, NEVER).code:
            raise Failure("the first part of the run fails")
        self.steps = STEPS
        shutil.rmtree(self.base / "cache")


def vectors(count):
    return np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)


class Building:
    """A new version of an index with changes since the one that is served, and the removal of old
    ones.
    """

    name = "building"

    def __init__(self, folder):
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir()
        mark = begin(self.base)
        for _ in range(3):
            write_version(self.base, ITEMS, vectors(len(ITEMS)), "exact", {}, mark)

        journal = Journal(self.base)
        journal.open()
        journal.write({"remove": "i3"})
        journal.close()
        whole = folder / "whole"
        shutil.copytree(self.base, whole, symlinks=True)
        self.calls = Life(whole, self.work, NEVER).calls

    def work(self, folder, confirmed):
        served = served_version(folder)
        items, mark = served.items_now()
        write_version(folder, items, vectors(len(items)), "exact", {}, mark)
        prune(folder, [served.name])

    def check(self, folder, life):
        """What is served is whole and has all changes.

        So has the version that was served before.
        """
        before = served_version(self.base).name
        expected = {item.item_id for item in ITEMS} - {"i3"}

        for version in (served_version(folder), Version(folder / before)):
            if (
                not version.is_whole()
                or {item.item_id for item in version.items_now()[0]} != expected
            ):
                raise Failure(f"{version.name} is not as it should be: {life.text[-2000:]}")

        if life.code == 0 and served_version(folder).name == before:
            raise Failure(
                f"it says nothing, and the new version is not served: {life.text[-2000:]}"
            )

        self.work(folder, None)
        if len(version_names(folder)) > 5:
            raise Failure("old versions pile up")


class Writing:
    """A service's journal: opened, changes, trimmed."""

    name = "journal"

    def __init__(self, folder):
        self.folder = folder
        self.base = folder / "base"
        self.base.mkdir()
        write_version(self.base, ITEMS, vectors(len(ITEMS)), "exact", {}, begin(self.base))
        whole = folder / "whole"
        shutil.copytree(self.base, whole, symlinks=True)
        self.calls = Life(whole, self.work, NEVER).calls

    def work(self, folder, confirmed):
        journal = Journal(folder)
        journal.open()

        for number in range(12):
            change = (
                {"put": Item(f"n{number}", "p1", f"新{number}").record()}
                if number % 3
                else {"remove": f"i{number}"}
            )

            try:
                journal.write(change)
            except NotKept as error:
                print(f"not kept: {error}")
                continue

            os.write(confirmed, json.dumps(change).encode() + b"\n")
            if number == 5:
                with contextlib.suppress(OSError):  # as the thread does that looks after the index
                    items, mark = served_version(folder).items_now()
                    write_version(folder, items, vectors(len(items)), "exact", {}, mark)

        journal.close()

    def check(self, folder, life):
        """Every confirmed change is there; what was refused is not, unless the disk takes nothing
        back either.
        """
        lines = Path(life.confirmed.name).read_bytes().splitlines()
        expected = {item.item_id for item in ITEMS}

        for change in map(json.loads, lines):
            expected = (
                expected | {change["put"]["item_id"]}
                if "put" in change
                else expected - {change["remove"]}
            )

        found = {item.item_id for item in served_version(folder).items_now()[0]}
        refused = {f"n{number}" for number in range(12)} | {f"i{number}" for number in range(12)}
        refused -= {
            change.get("remove") or change["put"]["item_id"] for change in map(json.loads, lines)
        }
        if (found ^ expected) - (refused if life.sticky else set()):
            raise Failure(
                f"lost {expected - found}, unconfirmed {found - expected}: {life.text[-2000:]}"
            )

        journal = Journal(folder)
        journal.open()
        journal.write({"remove": "i29"})
        journal.close()


SCENARIOS = {kind.name: kind for kind in (Training, Resuming, Building, Writing)}


def disturb(scenario, nth, seed, sticky):
    """One fault in one life, and what must hold afterwards; whether the fault was met."""
    folder = scenario.folder / "life"
    shutil.copytree(scenario.base, folder, symlinks=True)

    try:
        life = Life(folder, scenario.work, nth, seed, sticky)
        life.check()
        scenario.check(folder, life)
        return life.calls >= nth, life.code
    except Failure as error:
        raise Failure(
            f"{scenario.name}, call {nth} of {scenario.calls}, seed {seed}, sticky {sticky}:"
            f" {error}"
        ) from None
    finally:
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args()

    preload()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        draw = random.Random(options.seed)
        counts = Counter()
        scenarios = []

        for name in options.scenarios:
            place = Path(folder) / name
            place.mkdir()
            scenarios.append(SCENARIOS[name](place))
            counts[f"calls of {name}"] = scenarios[-1].calls

        for number in progress(
            range(options.faults), unit="fault", desc="faults", shown=not options.quiet
        ):
            scenario = scenarios[number % len(scenarios)]
            met, code = disturb(
                scenario, draw.randint(1, scenario.calls), draw.randrange(8), draw.random() < 0.3
            )
            counts[f"{scenario.name}: code {code}"] += met
            counts["faults"] += met

        print(json.dumps(counts))


def preload():
    """Start this process again with the library, made by the system's C compiler."""
    loaded = os.environ.pop("LD_PRELOAD", "")
    if "libinjector" in loaded:
        shutil.rmtree(Path(loaded).parent)  # it stays in memory
        return

    library = Path(tempfile.mkdtemp(prefix="injector-")) / "libinjector.so"
    source = Path(__file__).with_name("injector.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.campaigns.injection", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "LD_PRELOAD": str(library)})


if __name__ == "__main__":
    main()
