"""Test pins against a small package index, served here, whose torch requires what PyPI's does."""

import http.server
import importlib.metadata
import json
import subprocess
import sys
import threading

import pytest

from megatron_interbert.errors import UsageError
from tests.launching import ROOT
from tools.locks.check_pins import check, read_pins

NUMPY = importlib.metadata.version("numpy")


class Index:
    """Serve a package index: {project: {file name: (requires-python, requirements)}}."""

    def __init__(self):
        self.projects = {}
        self.address = ""

    def add(self, project, *names, pythons="", needs=()):
        """Add files of a project, all with the same requirements."""
        self.projects.setdefault(project, {}).update(dict.fromkeys(names, (pythons, needs)))

    def answer(self, path):
        """Return (status, body): a project's page (PEP 691) or a wheel's metadata (PEP 658)."""
        _, kind, name, *rest = path.split("/")
        files = self.projects.get(name, {})
        if kind == "simple" and files:
            entries = [
                {
                    "filename": file,
                    "url": f"{self.address}/files/{name}/{file}",
                    "requires-python": pythons,
                }
                for file, (pythons, _) in files.items()
            ]
            return 200, json.dumps({"files": entries})

        wheel = rest[0].removesuffix(".metadata")
        if kind == "files" and wheel in files and rest[0].endswith(".whl.metadata"):
            _, needs = files[wheel]
            lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1"]
            return 200, "\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]) + "\n"

        return 404, ""


def wheels(name, *pythons, machines=("x86_64", "aarch64")):
    """Return file names of compiled wheels, for each Python and machine."""
    return [
        f"{name}-cp{p}-cp{p}-manylinux_2_28_{machine}.whl" for p in pythons for machine in machines
    ]


@pytest.fixture
def index():
    """Serve an index whose torch 2.13.0 requires triton 3.7.1, or 3.7.2 from Python 3.13 on."""
    content = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = content.answer(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    content.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    content.add(
        "torch",
        *wheels("torch-2.13.0", 311, 312, 313, 314),
        pythons=">=3.10",
        needs=(
            'triton==3.7.1; platform_system == "Linux" and python_version < "3.13"',
            'triton==3.7.2; platform_system == "Linux" and python_version >= "3.13"',
            'triton==1.0; platform_system == "Windows"',
            'numpy<1; extra == "old"',
        ),
    )
    # A local build, to which the pin does not refer.
    content.add("torch", "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl")
    for version in ("3.7.1", "3.7.2", "3.9.0"):
        content.add("triton", *wheels(f"triton-{version}", 311, 312, 313, 314))

    content.add("jieba", "jieba-0.42.1.tar.gz")
    yield content
    server.shutdown()
    server.server_close()


def verdict(tmp_path, index, *lines):
    """Check a requirements file with these lines; return (contradictions, what is unjudged)."""
    path = tmp_path / "requirements.txt"
    path.write_text("\n".join(["# pins", *lines]) + "\n")
    return check(path, f"{index.address}/simple")


def test_contradictions(tmp_path, index):
    torch = f"torch==2.13.0 on {index.address}/simple"

    wrong, _ = verdict(tmp_path, index, "torch==2.13.0", "jieba==0.42.1")
    assert wrong == []

    wrong, _ = verdict(tmp_path, index, "torch==2.13.0", "triton==3.9.0  # newest")
    assert wrong == [
        f"triton==3.9.0 (line 3): {torch} wants triton==3.7.1 on Python 3.11, 3.12",
        f"triton==3.9.0 (line 3): {torch} wants triton==3.7.2 on Python 3.13, 3.14",
    ]

    wrong, _ = verdict(tmp_path, index, "torch==2.13.0", "Triton==3.7.1")
    assert wrong == [f"Triton==3.7.1 (line 3): {torch} wants triton==3.7.2 on Python 3.13, 3.14"]

    # A range of our own (setup.py), and one of a pinned package that is installed here.
    index.add("numpy", "numpy-1.0-py3-none-any.whl")
    h5py = importlib.metadata.version("h5py")
    index.add("h5py", f"h5py-{h5py}-py3-none-any.whl")
    wrong, unjudged = verdict(tmp_path, index, "torch==2.13.0", f"h5py=={h5py}", "numpy==1.0")
    assert len(wrong) == 2
    assert wrong[0].startswith(f"numpy==1.0 (line 4): h5py=={h5py} wants numpy>=")
    assert wrong[1].startswith("numpy==1.0 (line 4): setup.py wants numpy>=2")
    assert wrong[1].endswith("on Python 3.11, 3.12, 3.13, 3.14")
    assert unjudged == [f"what numpy==1.0 needs (installed here: {NUMPY})"]


def test_files(tmp_path, index):
    index.add("old", *wheels("old-1.0", 311, 312), "old-1.0.tar.gz")
    index.add("heavy", *wheels("heavy-1.0", 311, 312, 313, 314, machines=["x86_64"]))
    index.add("young", "young-1.0-py3-none-any.whl", pythons=">=3.12")
    index.add("stable", "stable-1.0-cp39-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl")
    index.add("stable", "stable-1.0-cp39-abi3-manylinux_2_17_aarch64.whl", "stable-0.9-py3.7.egg")
    index.add("newer", "newer-1.0-cp311-abi3-manylinux_2_34_x86_64.whl")
    pins = [f"{name}==1.0" for name in ("old", "heavy", "young", "stable", "newer")]

    wrong, _ = verdict(tmp_path, index, "torch==2.13.0", *pins, "jieba==9")

    assert wrong == [
        "old==1.0 (line 3): no wheel for Python 3.13, 3.14 on Linux x86_64",
        "old==1.0 (line 3): no wheel for Python 3.13, 3.14 on Linux aarch64",
        "heavy==1.0 (line 4): no wheel for Python 3.11, 3.12, 3.13, 3.14 on Linux aarch64",
        "young==1.0 (line 5): no wheel for Python 3.11 on Linux x86_64",
        "young==1.0 (line 5): no wheel for Python 3.11 on Linux aarch64",
        "newer==1.0 (line 7): no wheel for Python 3.11, 3.12, 3.13, 3.14 on Linux x86_64",
        "newer==1.0 (line 7): no wheel for Python 3.11, 3.12, 3.13, 3.14 on Linux aarch64",
        "jieba==9 (line 8): the index has no such release",
    ]


@pytest.mark.parametrize(
    "line", ["numpy", "numpy>=2", "numpy==2.*", "numpy==2,<3", "numpy=2", "-r other.txt"]
)
def test_a_line_that_pins_nothing(tmp_path, line):
    path = tmp_path / "requirements.txt"
    path.write_text(f"torch==2.13.0\n{line}\n")
    with pytest.raises(UsageError, match=r"requirements.txt:2: .* is no pin; write NAME==VERSION"):
        read_pins(path)


def test_the_command(tmp_path, index):
    """Check exit codes and streams: a wrong pin, an index without the project, no index at all."""
    path = tmp_path / "requirements.txt"

    def run(pins, address):
        path.write_text(pins)
        command = [
            sys.executable,
            ROOT / "tools/check_pins.py",
            "--requirements",
            path,
            "--index",
            address,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)

        return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()

    code, said, _ = run("torch==2.13.0\n", f"{index.address}/simple/")
    assert code == 0
    assert len(said) == 1
    assert said[0].startswith(f"the pins agree with {index.address}/simple and with one another")

    code, said, complaints = run("torch==2.13.0\ntriton==3.7.1\n", f"{index.address}/simple")
    assert (code, said) == (1, [])
    assert complaints[0].endswith("triton==3.7.2 on Python 3.13, 3.14")

    code, said, complaints = run("torch==2.13.0\nabsent==1.0\n", f"{index.address}/simple")
    assert (code, said) == (1, [])
    assert complaints == [f"pins not checked: {index.address}/simple/absent/: 404 Not Found"]

    code, said, complaints = run("torch==2.13.0\n", "http://127.0.0.1:9/simple")
    assert (code, said) == (1, [])
    assert len(complaints) == 1
    assert complaints[0].startswith("pins not checked: http://127.0.0.1:9/simple/torch/: ")

    code, said, complaints = run("torch>=2\n", f"{index.address}/simple")
    assert (code, said) == (2, [])
    assert len(complaints) == 1
