"""Test launchers/environment.sh as users start it: real pip, a small checkout, no network."""

import os
import signal
import socket
import subprocess
import sys
import zipfile

import pytest

from tests.small_checkout import ended, make_checkout, start, write_index, write_wheel


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


def test_from_half_made_to_another_torch(checkout, tmp_path):
    """Follow one environment, behind a symlink, with a space in its path."""
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

    # Once ready, nothing is changed and no index is needed.
    theirs = folder / "notes.txt"
    theirs.write_text("mine")
    code, said, _ = ended(start(checkout, link, PIP_INDEX_URL="http://127.0.0.1:9/simple"))
    assert (code, len(said)) == (0, 1)
    assert theirs.exists()

    # Another build of torch comes with its own triton: ours is not installed.
    rocm = write_index(
        tmp_path / "rocm",
        ("torch", "2.13.0+rocm", "", "triton-rocm==3.7.1"),
        ("triton-rocm", "3.7.1", "triton"),
    )
    code, said, complaints = ended(start(checkout, link, TORCH_INDEX=rocm))
    assert (code, complaints) == (0, [])
    note = "note: installing without hashes, because no lock fits: the index has torch 2.13.0+rocm"
    assert said[1] == note
    assert said[-1] == f"{folder} 2.13.0+rocm triton-rocm 3.7.1 {checkout / 'demo.py'}"
    assert not theirs.exists()
    assert not list(folder.glob("lib/python*/site-packages/triton-3*"))

    # The choice is remembered.
    code, said, _ = ended(start(checkout, link))
    assert (code, len(said)) == (0, 1)


def test_the_torch_that_is_there_stays(checkout, tmp_path):
    """Use TORCH_INDEX=none in a container whose pip constraints contradict our pins."""
    folder = tmp_path / "venv"
    code, said, complaints = ended(start(checkout, folder, TORCH_INDEX="none"))
    assert (code, said, len(complaints)) == (2, [], 1)
    assert complaints[0].startswith("error: TORCH_INDEX=none, but ")
    assert not folder.exists()

    # Simulates an image's own packages, without changing this interpreter.
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
    assert (code, len(said), len(complaints)) == (1, 2, 1)
    assert complaints[0].startswith("error: the package index cannot be reached ")

    # What is unfinished is ours: the next start remakes it. Here the index lacks a pin.
    (checkout / "requirements.txt").write_text("torch==2.13.0\nfast==2.0\n")
    code, said, complaints = ended(start(checkout, folder))
    assert (code, len(said), len(complaints)) == (1, 2, 1)
    assert said[1].startswith("note: installing without hashes, because no lock fits: fast==2.0 ")
    assert "fast==2.0" in complaints[0]
    assert str(folder / "install.log") in complaints[0]


def test_interpreters(checkout, tmp_path):
    """Check interpreters that are too old, absent, or without venv; all are simulated."""
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
