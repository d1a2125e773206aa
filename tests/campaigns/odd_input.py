"""Gives every command odd things in place of each file and folder that it takes.

    python -m tests.campaigns.odd_input --mutations 20

Missing and empty files, folders, garbage, wrong kinds of JSON, links that lead nowhere, and sound
files with one part exchanged. Each attempt must end within its time, in success or in one line with
exit code 2 (1 for work that failed), never in a traceback.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tests.warm_imports  # noqa: F401  # once, for all that are forked
from megatron_interbert.progress import progress
from tests.campaigns.odd_world import ENDS_EARLY, Command, World, commands, sound_files
from tests.launching import ROOT
from tools.studies.world_tasks import tasks_of

SECONDS = 60.0  # that one attempt may take
ODD_TEXTS = {
    "empty": b"",
    "a blank line": b"\n",
    "garbage": bytes(range(256)) * 40,
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "a text": b'"text"\n',
    "no number": b'{"x": NaN}\n',
    "deep": b"[" * 5000,
    "half": b'{"image_id": "im',
    "another object": b'{"hello": {"world": [null]}}\n',
    "another encoding": "image-1\t图\tzh\n".encode("gbk"),
    "a wide row": b"a\t" * 3000 + b"\n",
}
ODD_PARTS = (None, True, -1, 1e308, "", "x" * 400, "../x", [], {}, [[1]], {"a": None}, 10**30)


def odd_things(folder: Path) -> Iterator[tuple[str, str]]:
    """(Name, path) of each odd file or folder, made in `folder`."""
    for name, data in ODD_TEXTS.items():
        path = folder / f"{name.replace(' ', '-')}.json"
        path.write_bytes(data)
        yield name, str(path)

    (folder / "empty-folder").mkdir()
    (folder / "loop").symlink_to("loop")
    yield "a folder", str(folder / "empty-folder")
    yield "missing", str(folder / "missing.json")
    yield "a link to itself", str(folder / "loop")
    yield "beside a file", str(folder / "empty.json" / "below")
    yield "a long name", str(folder / ("x" * 300))
    yield "no name", ""
    yield "/dev/null", "/dev/null"


def exchanged(value: object, chance: random.Random) -> object:
    """A JSON value with one part in it exchanged for an odd one."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: exchanged(value[key], chance)}

    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], exchanged(value[place], chance), *value[place + 1 :]]

    return chance.choice(ODD_PARTS)


def mutated(path: str, chance: random.Random) -> str:
    """The text of a file of JSON, or of lines of it, with one part exchanged."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    place = chance.randrange(len(lines))
    lines[place] = json.dumps(exchanged(json.loads(lines[place]), chance))
    return "\n".join(lines) + "\n"


def end_of(command: Command, changes: dict[str, str], folder: Path) -> tuple[int, str]:
    """(Exit code, minus the signal that ended it, or -1000 where it hung; all that was printed)."""
    log = folder / "log"
    child = os.fork()
    if child == 0:
        run_as_command(command, changes, folder, log)

    deadline = time.monotonic() + SECONDS
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1000, log.read_text(errors="replace")

        time.sleep(0.005)


def run_as_command(command: Command, changes: dict[str, str], folder: Path, log: Path) -> None:
    """Become the command, as a shell starts it in `folder`; never returns."""
    code = 70

    try:
        os.setsid()
        os.chdir(folder)
        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(handle, number)

        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        name, *first = command.name.split()
        sys.argv = [name, *first, *command.line(**changes)]

        if name.endswith(".py"):
            sys.argv[0] = str(ROOT / name)
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            sys.modules.pop(f"megatron_interbert.{name}", None)
            runpy.run_module(f"megatron_interbert.{name}", run_name="__main__", alter_sys=True)

        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fault(command: Command, code: int, printed: str, flag: str, path: str) -> str:
    """What is wrong with how a command has ended; empty where nothing is."""
    if "Traceback" in printed:
        return "a traceback"
    if code == -1000:
        return f"no end within {SECONDS:g} s"
    if code not in (0, 1, 2):
        return f"exit code {code}"

    lines = [line for line in printed.splitlines() if "error:" in line]
    if code == 2 and len(lines) != 1:
        return f"{len(lines)} lines that say why"
    if command.name in ENDS_EARLY:  # whatever the file: for a reason of its own
        return ""

    named = (flag, Path(path).name or flag, Path(path).parent.name)
    if code == 2 and not any(name in printed for name in named):
        return "a line that names neither flag nor file"

    return ""


def attempts(
    world: World, mutations: int, chance: random.Random
) -> list[tuple[Command, str, str, str]]:
    """(Command, flag, what is odd, path) of each attempt."""
    things = world.folder / "odd"
    things.mkdir()
    found = [
        (command, flag, name, path)
        for name, path in odd_things(things)
        for command in commands(world)
        for flag in command.files
    ]
    sound = sound_files(world)

    for command in commands(world):
        for flag in command.files:
            given = command.arguments.get(flag, "")
            original = given if given.endswith((".json", ".jsonl")) else sound.get(flag)
            for number in range(mutations if original else 0):
                name = f"mutation {number}"
                path = things / f"{len(found)}{Path(original).suffix}"
                path.write_text(mutated(original, chance), encoding="utf-8")
                found.append((command, flag, name, str(path)))

    return found


def make_weights(world: World) -> None:
    """Train a step of each model that others load."""
    saved = {
        "pretrain": world.weights,
        "finetune vcr": world.vcr_weights,
        "finetune glue": world.glue_weights,
        **{f"finetune {name}": f"{world.weights}-{name}" for name in tasks_of(world.tasks)},
    }

    for command in commands(world):
        if folder := saved.get(command.name):
            code, printed = end_of(command, {"--save": folder}, world.folder)
            assert code == 0, printed


def hold_sound(world: World) -> None:
    """Run every command as it is: attempts with odd files say nothing if the others are odd as
    well.
    """
    for command in commands(world):
        work = world.folder / "sound"
        work.mkdir()
        code, printed = end_of(command, {}, work)
        assert code == 0 or command.name in ENDS_EARLY, f"{command.name}: {printed}"
        shutil.rmtree(work)


def run(mutations: int, share: float, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Make all attempts, or a random share of them; (exit codes, a text for each fault)."""
    chance = random.Random(seed)
    world = World(folder)
    make_weights(world)
    hold_sound(world)
    chosen = [one for one in attempts(world, mutations, chance) if chance.random() < share]
    codes: Counter = Counter()
    faults = []

    for command, flag, name, path in progress(chosen, desc="odd input", unit="attempt"):
        work = folder / "work"
        work.mkdir()
        code, printed = end_of(command, {flag: path}, work)
        codes[code] += 1
        if wrong := fault(command, code, printed, flag, path):
            faults.append(f"{command.name} {flag} {name} ({path}): {wrong}\n{printed[-3000:]}")

        shutil.rmtree(work)

    return codes, faults


def main() -> int:
    """Parse the command line, run, print the counts and the faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mutations", type=int, default=20, help="of each file (default: %(default)s)"
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of all attempts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        codes, faults = run(options.mutations, options.share, options.seed, Path(folder))

    print(*faults, sep="\n\n")
    print(f"exit codes {dict(codes)}, {len(faults)} faults")

    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
