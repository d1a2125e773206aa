"""launchers/environment.sh as users start it, with real pip, on a small checkout; no network."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launching import ROOT

# Says which interpreter came first in PATH, and which torch and triton it has; starts a script.
REPORT = """
set -euo pipefail
. launchers/environment.sh
python -c '
import importlib.metadata as m, demo, sys, triton
print(sys.prefix, m.version("torch"), triton.BRAND, demo.__file__)'
fast-script >/dev/null
"""
SETUP = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
BACKEND = """
import zipfile
from pathlib import Path

def build_editable(folder, *_):
    with zipfile.ZipFile(Path(folder, "demo-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("demo.pth", str(Path.cwd()))
        about = "Metadata-Version: 2.1\\nName: demo\\nVersion: 1\\n"
        wheel.writestr("demo-1.dist-info/METADATA", about)
        wheel.writestr("demo-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n")
        wheel.writestr("demo-1.dist-info/RECORD", "")
    return "demo-1-py3-none-any.whl"
"""


def write_wheel(folder: Path, name: str, version: str, module: str = "", needs: str = "") -> Path:
    """A package of one module with a variable BRAND, and a script that pip copies as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if needs:
        about += f"Requires-Dist: {needs}\n"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{module or name}.py", f"BRAND = '{name} {version}'\n")
        script = zipfile.ZipInfo(f"{stem}.data/scripts/{name}-script")
        script.external_attr = 0o100755 << 16
        wheel.writestr(script, f"#!python\nimport {module or name}\n")
        wheel.writestr(f"{stem}.dist-info/METADATA", about)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


def write_index(folder: Path, *packages: tuple[str, ...]) -> str:
    """A package index on disk; its address."""
    for name, *rest in packages:
        wheel = write_wheel(folder / name, name, *rest)
        (folder / name / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return folder.as_uri()


def write_package(folder: Path) -> None:
    """Our package as far as environment.sh asks it: for the number of GPUs. The small torch has none."""
    package = folder / "megatron_interbert"
    (package / "parallel").mkdir(parents=True)
    (package / "errors.py").write_text("def run_entry(main):\n    main()\n")
    (package / "parallel" / "device.py").write_text("def report_gpus():\n    print(0)\n")


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment takes seconds: three pins, of which `fast` wants any torch."""
    folder = tmp_path / "checkout"
    (folder / "launchers").mkdir(parents=True)
    for name in ("environment.sh", "make_environment.sh"):
        shutil.copy(ROOT / "launchers" / name, folder / "launchers")
    (folder / "requirements.txt").write_text("torch==2.13.0\nfast==1.0\ntriton==3.7.1\n")
    (folder / "setup.py").write_text("")
    (folder / "demo.py").write_text("")
    (folder / "pyproject.toml").write_text(SETUP)
    (folder / "backend.py").write_text(BACKEND)
    write_package(folder)
    write_index(
        tmp_path / "index",
        ("torch", "2.13.0"),
        ("fast", "1.0", "", "torch>=2.0"),
        ("triton", "3.7.1"),
        ("setuptools", "80.0"),
    )
    return folder


def start(checkout: Path, folder: Path, command: str = REPORT, **changes: str) -> subprocess.Popen:
    """A shell in the checkout, with pip on the small index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    for name in ("VENV", "TORCH_INDEX", "PYTHONPATH"):
        environment.pop(name, None)
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": (checkout.parent / "index").as_uri(),
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "1",
        "VENV": str(folder),
        **changes,
    }
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=checkout,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen) -> tuple[int, list[str], list[str]]:
    """(exit code, lines of stdout, lines of stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err.splitlines()


def test_from_half_made_to_another_torch(checkout, tmp_path):
    """One environment through its life, behind a symlink, with a space in its path."""
    folder = tmp_path / "far away" / "venv"
    folder.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(folder)

    # The first start waits for its index, the second for the first, which is killed.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        first = start(checkout, link, PIP_INDEX_URL=f"http://127.0.0.1:{port}/simple")
        silent.settimeout(60)
        connection, _ = silent.accept()
        second = start(checkout, link)
        assert second.stdout.readline() == f"another start is making {folder}: waiting for it\n"
        os.killpg(first.pid, signal.SIGKILL)
        connection.close()
    ended(first)
    code, said, complaints = ended(second)
    assert (code, complaints) == (0, [])
    assert said == [
        f"installing the pinned versions into {folder} (a few minutes, once)",
        "environment ready, with torch==2.13.0",
        f"{folder} 2.13.0 triton 3.7.1 {checkout / 'demo.py'}",
    ]
    assert link.is_symlink()

    # Ready: nothing is touched, no index is needed.
    theirs = folder / "notes.txt"
    theirs.write_text("mine")
    code, said, _ = ended(start(checkout, link, PIP_INDEX_URL="http://127.0.0.1:9/simple"))
    assert (code, len(said)) == (0, 1)
    assert theirs.exists()

    # Another build of torch, which brings a triton of its own: ours stays away.
    rocm = write_index(
        tmp_path / "rocm",
        ("torch", "2.13.0+rocm", "", "triton-rocm==3.7.1"),
        ("triton-rocm", "3.7.1", "triton"),
    )
    code, said, complaints = ended(start(checkout, link, TORCH_INDEX=rocm))
    assert (code, complaints) == (0, [])
    assert said[-1] == f"{folder} 2.13.0+rocm triton-rocm 3.7.1 {checkout / 'demo.py'}"
    assert not theirs.exists()
    assert not list(folder.glob("lib/python*/site-packages/triton-3*"))

    # The choice is remembered.
    code, said, _ = ended(start(checkout, link))
    assert (code, len(said)) == (0, 1)


def test_the_torch_that_is_there_stays(checkout, tmp_path):
    """TORCH_INDEX=none in a container, whose pip constraints contradict our pins."""
    folder = tmp_path / "venv"
    code, said, complaints = ended(start(checkout, folder, TORCH_INDEX="none"))
    assert (code, said, len(complaints)) == (2, [], 1)
    assert complaints[0].startswith("error: TORCH_INDEX=none, but ")
    assert not folder.exists()

    # An image's own packages, as far as they can be put beside an interpreter without touching it.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    image = tmp_path / "image" / "lib" / version / "site-packages"
    for name, module in (("torch", "torch"), ("pytorch-triton", "triton")):
        with zipfile.ZipFile(
            write_wheel(tmp_path / "wheels", name, "2.13.0a0+8145d6.nv26.6", module)
        ) as wheel:
            wheel.extractall(image)
    constraints = tmp_path / "constraint.txt"
    constraints.write_text("fast==0.9\n")
    changes = {"PYTHONUSERBASE": str(tmp_path / "image"), "PIP_CONSTRAINT": str(constraints)}

    code, said, complaints = ended(start(checkout, folder, TORCH_INDEX="none", **changes))

    assert (code, complaints) == (0, [])
    nvidia = "2.13.0a0+8145d6.nv26.6"
    assert said[-1] == f"{folder} {nvidia} pytorch-triton {nvidia} {checkout / 'demo.py'}"
    (packages,) = folder.glob("lib/python*/site-packages")
    assert (packages / "fast-1.0.dist-info").is_dir()
    assert not [path for path in packages.iterdir() if path.name.startswith(("torch", "triton"))]


def test_what_was_not_made_here_is_left_alone(checkout, tmp_path):
    theirs = tmp_path / "theirs"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", theirs], check=True)
    (theirs / "notes.txt").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(theirs)
    file = tmp_path / "file"
    file.write_text("mine")
    before = sorted(theirs.rglob("*"))

    for place, shown in (
        (theirs, theirs),
        (link, theirs),
        (f"{theirs}/", theirs),
        (file, file),
        (checkout, checkout),
    ):
        code, said, complaints = ended(start(checkout, place))
        assert (code, said, len(complaints)) == (2, [], 1)
        assert complaints[0].startswith(f"error: VENV={shown} ")

    assert sorted(theirs.rglob("*")) == before
    assert link.is_symlink()
    assert file.read_text() == "mine"


def test_no_index(checkout, tmp_path):
    folder = tmp_path / "venv"

    code, said, complaints = ended(
        start(checkout, folder, PIP_INDEX_URL="http://127.0.0.1:9/simple")
    )
    assert (code, len(said), len(complaints)) == (1, 1, 1)
    assert complaints[0].startswith("error: the package index cannot be reached ")

    # What is half-made is ours: the next start makes it anew. Here the index lacks a pin.
    (checkout / "requirements.txt").write_text("torch==2.13.0\nfast==2.0\n")
    code, said, complaints = ended(start(checkout, folder))
    assert (code, len(said), len(complaints)) == (1, 1, 1)
    assert "fast==2.0" in complaints[0]
    assert str(folder / "install.log") in complaints[0]


def test_interpreters(checkout, tmp_path):
    """Too old, absent, without venv: pretended ones, for none such is installed here."""
    names = ("python3", "python3.13", "python3.12", "python3.11", "python3.14")

    def pretend(name, answer):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{answer}\n")
        path.chmod(0o755)

    def said_with(**answers):
        for name in names:
            pretend(name, answers.get(name.replace(".", "_"), "echo 'Python 3.9.2'; exit 1"))
        changes = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        code, said, complaints = ended(start(checkout, tmp_path / "venv", **changes))
        assert (code, said, len(complaints)) == (2, [], 1)
        return complaints[0]

    assert said_with() == "error: Python 3.11 to 3.14 is needed; python3 is Python 3.9.2"
    assert said_with(python3="exit 127").startswith("error: Python 3.11 to 3.14 is needed")

    pretend("bare", "exit 1")
    bare = tmp_path / "bin" / "bare"
    line = said_with(python3_12=f"echo {bare}")
    assert line.startswith(
        f"error: {bare} cannot make virtual environments; on Debian and Ubuntu: apt-get install "
    )
    assert not (tmp_path / "venv").exists()
