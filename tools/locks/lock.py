"""Regenerate requirements/*.lock from requirements.txt with uv, against PyPI.

    pip install uv && python tools/lock.py

Locked versions stay if they still fit; --upgrade takes the newest. pip's and uv's settings on this
machine are ignored, so the hashes are those of the index given by --index.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from packaging.requirements import Requirement

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from tools.locks.check_pins import PYTHONS, read_pins
from tools.locks.locked import COMMON, CUDA, FOLDER, linux, places, read_lock

HEADS = {
    COMMON: (
        """\
# Made from requirements.txt by tools/lock.py, not by hand: what all builds of torch share (Linux).
# With torch's CPU build:
#   pip install --no-deps --index-url https://download.pytorch.org/whl/cpu TORCH
# where TORCH is the line of requirements.txt, then
#   pip install --require-hashes -r requirements/common.lock
"""
    ),
    CUDA: (
        """\
# Made from requirements.txt by tools/lock.py, not by hand: PyPI's torch and what only it asks for.
#   pip install --require-hashes -r requirements/cuda.lock
-r common.lock
"""
    ),
}


def of_cuda(name: str) -> bool:
    """Check whether a package is installed only with PyPI's torch."""
    return name == "torch" or name.startswith(("nvidia-", "cuda-"))


def blocks(text: str) -> Iterator[str]:
    """Yield the text of each package in uv's output: its line, hashes and comments."""
    block: list[str] = []

    for line in text.splitlines(keepends=True):
        begins = not line.startswith((" ", "#", "-r "))
        if begins and block:
            yield "".join(block)
            block = []

        if begins or block:
            block.append(line)

    if block:
        yield "".join(block)


def remembered(folder: Path) -> str:
    """Return what the locks already hold, as uv writes it; skip a damaged lock with a note."""
    text = ""

    for path in (folder / COMMON, folder / CUDA):
        if not path.exists():
            continue
        try:
            read_lock(path)
        except UsageError as error:
            print(f"note: the versions of this lock are chosen anew: {error}", file=sys.stderr)
        else:
            text += "".join(blocks(path.read_text(encoding="utf-8")))

    return text


def compile_pins(requirements: Path, folder: Path, index: str, upgrade: bool) -> str:
    """Return uv's resolution of the pins for all Pythons and machines; raises UsageError if it
    fails.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise UsageError("uv is not installed; pip install uv")

    with tempfile.TemporaryDirectory() as place:
        shutil.copy(requirements, Path(place, "requirements.txt"))
        output = Path(place, "all.lock")
        output.write_text(remembered(folder))
        command = [uv, "pip", "compile", "requirements.txt", "--output-file", output.name]
        command += ["--quiet", "--no-config", "--no-header", "--generate-hashes", "--universal"]
        command += ["--python", sys.executable, "--python-version", PYTHONS[0]]
        command += ["--default-index", index]
        command += ["--upgrade"] if upgrade else []
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("UV_", "PIP_"))
        }

        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if ended.returncode:
            reason = " ".join(ended.stderr.split())
            raise UsageError(f"uv cannot resolve {requirements} against {index}: {reason[:600]}")

        return output.read_text()


def split(text: str) -> dict[str, str]:
    """Split uv's output into {lock: its text}, without packages for other systems."""
    locks = dict(HEADS)

    for block in blocks(text):
        head = block.splitlines()[0].removesuffix("\\")
        requirement = Requirement(head)
        marker = requirement.marker
        if marker is None or any(marker.evaluate(linux(*place)) for place in places()):
            locks[CUDA if of_cuda(requirement.name) else COMMON] += block

    return locks


@dataclass
class Options(Flags):
    """Hold the flags of lock."""

    GROUP: ClassVar[str] = "data"

    requirements: Path = option(Path("requirements.txt"), "file of the pins", read=Path)
    output: Path = option(FOLDER, "folder of the locks", read=Path)
    index: str = option("https://pypi.org/simple", "package index")
    upgrade: bool = option(False, "take the newest versions of packages that are not pinned")


def run(options: Options) -> None:
    """Write both locks and print how many packages they hold."""
    if not options.requirements.is_file():
        raise UsageError(
            f"--requirements {options.requirements}: no such file; run this in the checkout"
        )

    read_pins(options.requirements)

    text = compile_pins(options.requirements, options.output, options.index, options.upgrade)
    locks = split(text)

    options.output.mkdir(exist_ok=True)
    for name, content in locks.items():
        write_text(options.output / name, content)
        print(f"{options.output / name}: {sum(1 for _ in blocks(content))} packages")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
