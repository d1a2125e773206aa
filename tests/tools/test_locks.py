"""Test locks against pins and installed packages, and licences and advisories, with real files and
a real server.
"""

import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_interbert.errors import UsageError
from tests.launching import ROOT
from tools.locks import licences
from tools.locks.audit import audit
from tools.locks.check_lock import check
from tools.locks.lock import split
from tools.locks.locked import read_lock, read_locks

GOOD = "sha256:" + "a" * 64
PINS = "torch==2.13.0\nPyYAML==6.0.3\nprometheus_client==0.26.0\n"
COMMON = f"""# made
prometheus-client==0.26.0 \\
    --hash={GOOD} \\
    --hash={GOOD}
    # via -r requirements.txt
pyyaml==6.0.3 --hash={GOOD}
networkx==3.6.1 ; python_full_version < '3.12' --hash={GOOD}
networkx==3.7 ; python_full_version >= '3.12' --hash={GOOD}
"""
CUDA = f"-r common.lock\ntorch==2.13.0 --hash={GOOD}\n"


@pytest.fixture
def folder(tmp_path):
    """Write a checkout's pins and locks, which agree."""
    (tmp_path / "requirements.txt").write_text(PINS)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/common.lock").write_text(COMMON)
    (tmp_path / "requirements/cuda.lock").write_text(CUDA)

    return tmp_path


def complaints(folder, packages=None, **texts):
    """Return what the check reports after replacing the text of locks."""
    for name, text in texts.items():
        (folder / f"requirements/{name}.lock").write_text(text)
    said = check(folder / "requirements.txt", folder / "requirements", packages or {})
    return [line.replace(f"{folder}/", "") for line in said]


def command(tool, *arguments, cwd=ROOT):
    """Run a tool; return (exit code, lines of stdout, lines of stderr)."""
    ended = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended.returncode, ended.stdout.splitlines(), ended.stderr.splitlines()


def test_the_locks_of_this_checkout():
    """Check that they contain every pin, parsed here by str.split, and fit this environment."""
    code, said, wrong = command("check_lock.py")
    assert (code, len(said)) == (0, 1), wrong

    hashes = {}
    for name in ("common.lock", "cuda.lock"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if "==" in line and not line.startswith((" ", "#")):
                last = line.split()[0]
                hashes[last] = 0

            if line.startswith("    --hash=sha256:"):
                hashes[last] += 1

    pins = (ROOT / "requirements.txt").read_text().splitlines()
    for pin in (line.split()[0] for line in pins if not line.startswith("#")):
        assert pin.lower().replace("_", "-") in hashes

    assert min(hashes.values()) > 0
    names = {locked.split("==")[0] for locked in hashes}
    assert names >= {"starlette", "h11", "pydantic", "nvidia-nccl-cu13"}


def test_pins_and_locks_that_disagree(folder):
    assert complaints(folder) == []

    assert complaints(folder, common=COMMON.replace("6.0.3", "6.0.2")) == [
        "PyYAML==6.0.3 (line 2 of requirements.txt): locked is "
        "pyyaml==6.0.2 (requirements/common.lock:6)"
    ]
    without = COMMON.replace(f"pyyaml==6.0.3 --hash={GOOD}\n", "")
    assert complaints(folder, common=without) == [
        "PyYAML==6.0.3 (line 2 of requirements.txt): locked is nothing of that name"
    ]
    # For some machines only.
    arm = COMMON.replace("pyyaml==6.0.3", "pyyaml==6.0.3 ; platform_machine == 'aarch64'")
    assert complaints(folder, common=arm) == [
        "PyYAML==6.0.3 (line 2 of requirements.txt): locked is nothing of that name"
    ]
    both = COMMON + f"pyyaml==6.0.2 --hash={GOOD}\n"
    assert complaints(folder, common=both) == [
        "pyyaml==6.0.3 (requirements/common.lock:6) and pyyaml==6.0.2 (requirements/common.lock:9)"
        " are both for Python 3.11 on x86_64"
    ]


def test_hashes(folder):
    none = COMMON.replace(f"pyyaml==6.0.3 --hash={GOOD}", "pyyaml==6.0.3")
    assert complaints(folder, common=none) == [
        "pyyaml==6.0.3 (requirements/common.lock:6) has no hash"
    ]
    for bad in ("md5:" + "a" * 32, GOOD[:-1], GOOD[:-1] + "g"):
        said = complaints(folder, common=COMMON, cuda=f"torch==2.13.0 --hash={bad}\n")
        assert said == [f"torch==2.13.0 (requirements/cuda.lock:1): {bad!r} is not a sha256 hash"]


def test_what_is_installed(folder):
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    networkx = "3.6.1" if python == "3.11" else "3.7"
    assert complaints(folder, {"torch": "2.13.0+cpu", "networkx": networkx}) == []

    assert complaints(folder, {"h11": "0.16.0", "pyyaml": "6.0.2", "torch": "2.14.0+cpu"}) == [
        "h11==0.16.0 is installed here; locked is nothing of that name",
        "pyyaml==6.0.2 is installed here; locked is pyyaml==6.0.3 (requirements/common.lock:6)",
        "torch==2.14.0+cpu is installed here; locked is torch==2.13.0 (requirements/cuda.lock:2)",
    ]


@pytest.mark.parametrize(
    "line", ["pyyaml", "pyyaml>=6", "pyyaml==6,<7", "-r other.txt", "--index-url x", "<<<<<<< ours"]
)
def test_a_line_that_locks_nothing(folder, line):
    path = folder / "requirements/common.lock"
    path.write_text(COMMON + line + "\n")
    with pytest.raises(UsageError, match=r"common.lock:9: .* is not NAME==VERSION; regenerate"):
        read_lock(path)


def test_locks_that_cannot_be_read(folder):
    cuda = folder / "requirements/cuda.lock"
    cuda.write_bytes(b"\xff\xfe" + CUDA.encode("utf-16"))
    code, said, wrong = command("check_lock.py", cwd=folder)
    assert (code, said, len(wrong)) == (2, [], 1)
    assert "requirements/cuda.lock: not text" in wrong[0]

    cuda.unlink()
    code, said, wrong = command("audit.py", cwd=folder)
    assert (code, said, len(wrong)) == (2, [], 1)
    assert "requirements/cuda.lock: no such file" in wrong[0]


def test_making_them(folder):
    """Split uv's output by build, without what Linux never installs; without uv, one line."""
    text = COMMON.partition("\n")[2] + CUDA.partition("\n")[2]
    text += f"nvidia-nccl-cu13==2.29.7 ; sys_platform == 'linux' --hash={GOOD}\n"
    text += f"colorama==0.4.6 ; sys_platform == 'win32' --hash={GOOD}\n"
    text = text.replace("\\\n   ", "").replace(" --hash", " \\\n    --hash")
    for name, content in split(text).items():
        (folder / "requirements" / name).write_text(content)

    assert complaints(folder) == []
    found = {entry.name: entry.path.name for entry in read_locks(folder / "requirements")}
    assert found["nvidia-nccl-cu13"] == found["torch"] == "cuda.lock"
    assert found["pyyaml"] == "common.lock"
    assert "colorama" not in found

    ended = subprocess.run(
        [sys.executable, ROOT / "tools/lock.py"],
        cwd=folder,
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: uv is not installed; pip install uv"]


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_that_cannot_resolve(folder):
    """Use an index that does not answer: one line, and the locks are unchanged."""
    code, said, wrong = command("lock.py", "--index", "http://127.0.0.1:9/simple", cwd=folder)
    assert (code, said, len(wrong)) == (2, [], 1)
    assert "uv cannot resolve requirements.txt" in wrong[0]
    assert (folder / "requirements/common.lock").read_text() == COMMON


def test_licences(tmp_path):
    """Check this checkout's list; then one package missing, one too many, a GPL, and a licence
    other than the installed package's.
    """
    code, said, wrong = command("licences.py", "--check")
    assert (code, len(said)) == (0, 1), wrong

    good = (ROOT / "docs/licences.md").read_text()
    path = tmp_path / "licences.md"
    locked = read_locks(ROOT / "requirements")
    tqdm = next(line for line in good.splitlines() if line.startswith("| tqdm |"))

    def said_of(text):
        path.write_text(text)
        return licences.check(path, locked)

    (line,) = said_of(good.replace(tqdm + "\n", ""))
    assert line.startswith("tqdm==")
    assert line.endswith(" is not listed")
    assert said_of(good + "| gone | 1.0 | all | MIT |\n") == ["gone 1.0 is listed, not locked"]
    refused, differs = said_of(good.replace(tqdm, tqdm.replace("MPL-2.0", "GPL-3.0-only")))
    assert refused.endswith(": a licence not allowed here: GPL-3.0-only")
    assert (
        "GPL-3.0-only AND MIT is listed, the package installed here says MPL-2.0 AND MIT" in differs
    )
    with pytest.raises(UsageError, match="is not a row of the list"):
        said_of(good + "| broken |\n")


def test_names_of_licences():
    """Check each place that metadata may name it in, the most reliable first; refuse copyleft."""
    osi = "License :: OSI Approved :: "
    assert licences.licence_of({"license_expression": "MIT", "license": "GPL"}) == "MIT"
    assert licences.licence_of({"license": "Apache 2.0"}) == "Apache-2.0"
    assert (
        licences.licence_of({"license": "long\ntext", "classifiers": [osi + "MIT License"]})
        == "MIT"
    )
    assert licences.licence_of({"classifiers": ["Topic :: Games"]}) == "none stated"
    gpl = "GNU General Public License v3 (GPLv3)"
    assert licences.licence_of({"classifiers": [osi + gpl]}) == gpl

    assert licences.refused("MIT AND (Apache-2.0 WITH LLVM-exception OR BSD-3-Clause)") == []
    for name in (
        "GPL-3.0-or-later",
        "AGPL-3.0-only",
        "LGPL-2.1",
        gpl,
        "none stated",
        "MIT AND SSPL-1.0",
    ):
        assert licences.refused(name) != []


@pytest.fixture
def api():
    """Serve a JSON API like PyPI's; yield ({path: page}, address)."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.end_headers()
            self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield pages, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_advisories(folder, api):
    """Check a known and a withdrawn advisory, and pages of other versions or without JSON."""
    pages, address = api
    known = {
        "id": "PYSEC-1",
        "aliases": ["CVE-2026-1"],
        "fixed_in": ["6.0.4"],
        "summary": "Runs\ncode",
        "withdrawn": None,
    }
    gone = {**known, "id": "PYSEC-2", "withdrawn": "2026-01-01T00:00:00Z"}
    pages["/pyyaml/6.0.3/json"] = {"info": {"version": "6.0.3"}, "vulnerabilities": [known, gone]}
    pages["/torch/json"] = {"info": {"version": "2.13.0"}, "vulnerabilities": []}
    pages["/networkx/json"] = {"info": {"version": "3.7"}, "vulnerabilities": []}
    pages["/prometheus-client/0.26.0/json"] = b"<html>not JSON"

    found, unknown = audit(address, read_locks(folder / "requirements"))

    line = "PYSEC-1 CVE-2026-1; fixed in 6.0.4; Runs code"
    assert found == [f"pyyaml==6.0.3 ({folder}/requirements/common.lock:6): {line}"]
    assert sorted(unknown) == [
        f"{address}/networkx/3.6.1/json: 404 Not Found",
        f"{address}/prometheus-client/0.26.0/json: the answer is not JSON",
    ]

    code, said, wrong = command("audit.py", "--api", address, cwd=folder)
    assert (code, len(said), wrong) == (1, 2, [])
    assert said[0].endswith(line)
    assert said[1].startswith("1 advisories for 3 of 5 locked versions; 2 were not looked up")


def test_advisories_that_cannot_be_reached(folder, api):
    """Check that no answer, or no known package, is reported but is not a failure."""
    for address in ("http://127.0.0.1:9/pypi", api[1]):
        code, said, wrong = command("audit.py", "--api", address, cwd=folder)
        assert (code, len(said), wrong) == (0, 1, [])
        assert said[0].startswith("not audited: advisories cannot be reached (http://127.0.0.1:")


def test_wrong_folders(tmp_path):
    for tool in ("lock.py", "check_lock.py"):
        code, said, wrong = command(tool, cwd=tmp_path)
        assert (code, said, len(wrong)) == (2, [], 1)
        assert "no such file; run this in the checkout" in wrong[0]

    assert list(Path(tmp_path).iterdir()) == []
