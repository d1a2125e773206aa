"""Kills training runs, spoils their checkpoints and fills their disk, again and again; checks after
each that nothing is lost.

    python -m tests.campaigns.faults --kills 200

Ranks are real processes that train, save and resume as launched ones do. They are forked from this
process, which has imported everything, so that a life costs one second instead of ten. After each
death: - every checkpoint that was committed is still valid, or was pruned after a newer one had
been committed; - what was spoiled (a flipped bit, a truncated or deleted file, a flipped manifest)
is named by the next life, and not used; - every loss in metrics.jsonl is that of the undisturbed
run, bit for bit.
"""

import argparse
import atexit
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"
from megatron_interbert import pretrain
from megatron_interbert.progress import progress
from megatron_interbert.weights.manifest import MANIFEST, complete_checkpoints, verify
from tests.corpus import write_store
from tests.launching import free_ports, losses

STEPS = 90
SAVE_INTERVAL = 3
LAYOUTS = {  # what a run is started with; each has its own undisturbed run
    "DP2 ZeRO-1": ("--zero-stage", 1),
    "TP2 ZeRO-2": ("--zero-stage", 2, "--tensor-model-parallel-size", 2),
    "DP2 ZeRO-3": ("--zero-stage", 3),
    "DP2 ZeRO-0": ("--zero-stage", 0),
    "DP2 host": ("--bf16", "--deepspeed-config", "zero2_offload_optimizer"),
    "DP2 disk": ("--bf16", "--deepspeed-config", "zero3_nvme", "--nvme-path", "SWAP"),
}
SPOIL = ("flip", "truncate", "delete", "manifest")


class Failure(AssertionError):
    """What the campaign looks for."""


class Life:
    """Two ranks of one run, from start to death."""

    def __init__(self, store, save, layout):
        self.save = Path(save)
        self.log = Path(f"{save}.log")
        self.log.unlink(missing_ok=True)
        port = free_ports(1)[0]
        flags = (
            *(
                "--data-path",
                store,
                "--save",
                save,
                "--model",
                "tiny",
                "--train-iters",
                STEPS,
                "--save-interval",
                SAVE_INTERVAL,
            ),
            *(
                "--micro-batch-size",
                2,
                "--global-batch-size",
                4,
                "--data-partitions",
                2,
                "--num-workers",
                0,
                "--log-interval",
                1,
            ),
            *("--lr", "1e-3", "--keep-last", 2, *LAYOUTS[layout]),
        )
        swap = Path(store).parent / "swap"
        swap.mkdir(exist_ok=True)
        words = [str(swap) if flag == "SWAP" else str(flag) for flag in flags]
        self.ranks = [self._fork(rank, port, words) for rank in range(2)]

    def _fork(self, rank, port, flags):
        child = os.fork()
        if child:
            return child

        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["pretrain", *flags]
        atexit._clear()  # of the campaign, whose folder a rank would remove at its end

        try:
            pretrain.main()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)

        os._exit(0)

    def wait(self, seconds):
        """Exit codes of all ranks when they have ended by themselves, else None for those that
        live.
        """
        codes = dict.fromkeys(self.ranks)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and None in codes.values():
            for child, code in codes.items():
                if code is None:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        codes[child] = os.waitstatus_to_exitcode(status)

            time.sleep(0.002)

        self.ranks = [child for child, code in codes.items() if code is None]

        return list(codes.values())

    def kill(self, children):
        """SIGKILL."""
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def text(self):
        """What the ranks have printed."""
        return self.log.read_text() if self.log.exists() else ""


class Campaign:
    """Faults in random order over runs of all layouts."""

    def __init__(self, folder, seed, quiet, layouts=tuple(LAYOUTS), spoil=0.25):
        self.folder = Path(folder)
        self.random = random.Random(seed)
        self.quiet = quiet
        self.layouts = layouts
        self.spoil = spoil
        self.counts = Counter()
        self.store = write_store(self.folder / "store")
        self.expected = {}

        for layout in layouts:
            save = self.folder / "undisturbed" / layout.replace(" ", "-")
            save.parent.mkdir(exist_ok=True)

            if Life(self.store, save, layout).wait(300) != [0, 0]:
                raise Failure(
                    f"the undisturbed run of {layout} fails:"
                    f" {Path(f'{save}.log').read_text()[-2000:]}"
                )

            self.expected[layout] = losses(save)

    def run(self, kills):
        """Runs one after another until so many ranks have been killed and some damage has been met;
        the counts.
        """
        number = 0

        with progress(total=kills, unit="kill", desc="kills", shown=not self.quiet) as bar:
            while self.counts["kills"] < kills or not self.counts["damage named"]:
                kills = max(kills, self.counts["kills"] + 1)
                before = self.counts["kills"]
                layout = self.layouts[number % len(self.layouts)]
                with self._disk(number) as (save, small):
                    self._one_run(save, layout, kills, small)

                number += 1
                if self.quiet:
                    print(f"{self.counts['kills']} kills", file=sys.stderr, flush=True)

                bar.update(self.counts["kills"] - before)

        return self.counts

    @contextlib.contextmanager
    def _disk(self, number):
        """A folder for a run; every fourth is on a disk that is full after two checkpoints and a
        half.
        """
        place = self.folder / f"run-{number}"
        place.mkdir()
        mounted = (
            number % 4 == 1
            and not subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=5400k", "tmpfs", place], capture_output=True
            ).returncode
        )

        try:
            yield place / "save", place if mounted else None
        finally:
            if mounted:
                subprocess.run(["umount", "-l", place], check=True)
            shutil.rmtree(place, ignore_errors=True)

    def _one_run(self, save, layout, kills, small):
        """Lives of one run until it has reached its end or enough ranks are dead."""
        spoiled = []

        while True:
            committed = (
                [p for p in complete_checkpoints(save) if p not in spoiled] if save.exists() else []
            )
            life = Life(self.store, save, layout)
            codes = self._disturb(life, save) if self.counts["kills"] < kills else life.wait(120)
            self._check(life, save, layout, committed, spoiled)
            spoiled = []
            if codes == [0, 0]:
                self.counts["runs that reached their end"] += 1
                return

            if codes == [1, 1]:
                if not (small and "No space left on device" in life.text()):
                    raise Failure(f"{layout}: the run stopped: {life.text()[-2000:]}")
                self.counts["full disks"] += 1
                subprocess.run(["mount", "-o", "remount,size=60m", small], check=True)
            elif codes == [2, 2]:
                if committed or "no usable checkpoint is left there" not in life.text():
                    raise Failure(f"{layout}: the run refuses to start: {life.text()[-2000:]}")
                self.counts["stops, for nothing is left"] += 1
                shutil.rmtree(save)  # as its owner would who begins anew
            elif self.random.random() < self.spoil:
                spoiled = self._spoil(save)

    def _disturb(self, life, save):
        """Let the run live for a while and kill it; its exit codes when it ended before."""
        moment = self.random.choice(("start", "training", "saving", "saving", "publishing"))
        if moment == "start":
            codes = life.wait(self.random.uniform(0.0, 1.2))
        elif moment == "training":
            codes = life.wait(self.random.uniform(1.0, 3.0))
        else:
            codes = self._wait_for_a_save(life, save, moment)

        if None not in codes:
            return codes

        victims = list(life.ranks)
        alone = self.random.random() < 0.08
        if alone:
            victims = [self.random.choice(victims)]
            self.counts["one rank alone"] += 1

        life.kill(victims)
        self.counts["kills"] += len(victims)
        self.counts[f"while {moment}"] += len(victims)

        if None in life.wait(30):
            if "model tiny" in life.text():  # they had met
                raise Failure(
                    "a rank lives on half a minute after the other was killed:"
                    f" {life.text()[-2000:]}"
                )

            # it waits for a rank that never came: launchers end it, as is done here
            life.kill(life.ranks)
            life.wait(10)
            self.counts["ended by the launcher before they had met"] += 1

        return [None, None]

    def _wait_for_a_save(self, life, save, moment):
        """Until a temporary folder stands there (saving), or holds a manifest (publishing), and a
        little longer.
        """
        wanted = self.random.randint(1, 4)
        pattern = ".global_step*.partial" + ("/manifest.json" if moment == "publishing" else "")
        seen = set()
        deadline = time.monotonic() + 30

        while time.monotonic() < deadline:
            seen |= set(save.glob(pattern)) if save.exists() else set()
            if len(seen) >= wanted:
                time.sleep(self.random.uniform(0.0, 0.02))
                break

            codes = life.wait(0.001)
            if None not in codes:
                return codes

        return [None] * len(life.ranks)

    def _spoil(self, save):
        """Damage the newest checkpoint in one of the ways that hardware and people know."""
        found = complete_checkpoints(save)
        if not found:
            return []

        kind = self.random.choice(SPOIL)
        files = [p for p in found[0].iterdir() if p.name != MANIFEST and p.stat().st_size]
        file = found[0] / MANIFEST if kind == "manifest" else self.random.choice(files)

        if kind in ("flip", "manifest"):
            data = bytearray(file.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            file.write_bytes(bytes(data))
        elif kind == "truncate":
            os.truncate(file, self.random.randrange(file.stat().st_size))
        else:
            file.unlink()

        self.counts[f"spoiled: {kind}"] += 1
        self.spoiled_file = file

        return [found[0]]

    def _check(self, life, save, layout, committed, spoiled):
        """What must hold after every life."""
        text = life.text()
        if "Traceback" in text:
            raise Failure(f"{layout}: a traceback instead of a line: {text[-3000:]}")

        now = complete_checkpoints(save) if save.exists() else []
        newest = max((int(p.name[11:]) for p in now if verify(p) is None), default=0)

        for path in committed:
            if path.exists():
                if verify(path):
                    raise Failure(
                        f"{layout}: {path} was committed and is now damaged: {verify(path)}"
                    )
            elif newest <= int(path.name[11:]):
                raise Failure(
                    f"{layout}: {path} was committed and is gone; the newest is of step {newest}"
                )

        for path in spoiled:
            started = "model tiny" in text  # far enough to have looked for checkpoints
            named = f"{path} is damaged" in text and self.spoiled_file.name in text
            if started and not named:
                raise Failure(
                    f"{layout}: {self.spoiled_file} was spoiled, which was not said: {text[-2000:]}"
                )

            if named:
                self.counts["damage named"] += 1
            elif path.exists():  # killed before it looked: the next life is to find it
                shutil.rmtree(path)
                self.counts["damage not looked at"] += 1

        if (save / "metrics.jsonl").exists():
            for step, figures in self._losses(save).items():
                if figures != self.expected[layout][step]:
                    raise Failure(
                        f"{layout}: step {step} gives {figures}, undisturbed"
                        f" {self.expected[layout][step]}"
                    )

                self.counts["steps compared"] += 1

    @staticmethod
    def _losses(save):
        """As `losses`, of a file whose last line may be cut off by the kill."""
        file = save / "metrics.jsonl"
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with tempfile.TemporaryDirectory() as whole:
            (Path(whole) / "metrics.jsonl").write_text("".join(lines))
            return losses(whole)


def main():
    """Command line; exit code 1 and the reason when something was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="ranks to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layouts", type=int, default=len(LAYOUTS), help="so many of the layouts, the first ones"
    )
    parser.add_argument("--only", default="", help="of these, those with this text in their name")
    parser.add_argument(
        "--spoil",
        type=float,
        default=0.25,
        help="share of deaths after which a checkpoint is spoiled",
    )

    parser.add_argument(
        "--folder",
        default="",
        help="where to work; default: a temporary folder, removed at the end",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args()
    started = time.monotonic()

    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        try:
            first = tuple(LAYOUTS)[: arguments.layouts]
            layouts = tuple(name for name in first if arguments.only in name)
            counts = Campaign(
                folder, arguments.seed, arguments.quiet, layouts, arguments.spoil
            ).run(arguments.kills)
        except Failure as failure:
            print(f"FAILED after {time.monotonic() - started:.0f} s: {failure}", file=sys.stderr)
            sys.exit(1)

    for name, count in sorted(counts.items()):
        print(f"{count:6d} {name}")

    print(
        f"nothing lost, {time.monotonic() - started:.0f} s, seed {arguments.seed};"
        f" {json.dumps(counts)}"
    )


if __name__ == "__main__":
    main()
