"""Make a small checkout and a package index on disk to try environment.sh without a network."""

import hashlib
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

from tests.launching import ROOT

# Prints the first interpreter in PATH and its torch and triton; starts a script.
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
    """Write a wheel with one module, whose BRAND names it, and a script; return its path."""
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
    """Write a package index to disk; return its address."""
    for name, *rest in packages:
        write_wheel(folder / name, name, *rest)
        wheels = sorted(path.name for path in (folder / name).glob("*.whl"))
        page = "".join(f'<a href="{wheel}">{wheel}</a>\n' for wheel in wheels)
        (folder / name / "index.html").write_text(page)

    return folder.as_uri()


def write_package(folder: Path) -> None:
    """Write the part of our package that environment.sh asks for the number of GPUs: here 0."""
    package = folder / "megatron_interbert"
    (package / "parallel").mkdir(parents=True)
    (package / "errors.py").write_text("def run_entry(main):\n    main()\n")
    (package / "parallel" / "device.py").write_text("def report_gpus():\n    print(0)\n")


def lock(checkout: Path, *common: str, cuda: tuple[str, ...] = ("torch==2.13.0",)) -> None:
    """Write locks of versions in the small index, with the hashes of their wheels."""
    folder = checkout / "requirements"
    folder.mkdir(exist_ok=True)
    (folder / "common.lock").write_text("".join(locked(checkout, pin) for pin in common))
    lines = [locked(checkout, pin) for pin in cuda]
    (folder / "cuda.lock").write_text("-r common.lock\n" + "".join(lines))


def locked(checkout: Path, pin: str) -> str:
    """Return the lines that lock one version."""
    name, version = pin.split("==")
    wheel = checkout.parent / "index" / name / f"{name}-{version}-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{pin} \\\n    --hash=sha256:{digest}\n    # via -r requirements.txt\n"


def make_checkout(place: Path) -> Path:
    """Make a checkout whose environment takes seconds: three pins; `fast` needs any torch."""
    folder = place / "checkout"
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
        place / "index",
        ("torch", "2.13.0"),
        ("fast", "1.0", "", "torch>=2.0"),
        ("triton", "3.7.1"),
        ("setuptools", "80.0"),
    )
    lock(folder, "fast==1.0", "triton==3.7.1", "setuptools==80.0")

    return folder


def start(checkout: Path, folder: Path, command: str = REPORT, **changes: str) -> subprocess.Popen:
    """Start a shell in the checkout, with pip on the small index."""
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
    """Wait for the end; return (exit code, lines of stdout, lines of stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out.splitlines(), err.splitlines()
