"""Test the wheel in an environment of its own, from an empty folder, by commands only."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.launching import ROOT

WORK = "sources/megatron_interbert"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make a fresh environment with the wheel, which shares only libraries with the tests'."""
    place = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q")
    source = copy_of_checkout(place / WORK)
    subprocess.run([*build, "-w", place, source], check=True, capture_output=True, text=True)
    (wheel,) = place.glob("*.whl")

    venv.create(place / "env", with_pip=False)
    python = place / "env/bin/python"
    install = ("install", "--no-deps", "--no-index", "-q", wheel)
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    (folder,) = (place / "env/lib").glob("python*/site-packages")
    libraries = sysconfig.get_paths()["purelib"]
    # After our own package in the path; an editable install in the tests' environment is ignored.
    (folder / "libraries.pth").write_text(f"{libraries}\n")
    return place / "env"


def copy_of_checkout(target):
    """Copy what git tracks, except tests and docs, so that no stray files get into the wheel."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def test_the_wheel_has_all_files_of_the_package(environment):
    listed = subprocess.run(
        ["git", "ls-files", "megatron_interbert", "ds_configs"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    wanted = {
        name.replace("ds_configs/", "megatron_interbert/ds_configs/", 1)
        for name in listed.stdout.split()
    }
    (folder,) = (environment / "lib").glob("python*/site-packages")
    there = {str(path.relative_to(folder)) for path in (folder / "megatron_interbert").rglob("*")}
    assert len(wanted) > 200
    assert wanted <= there, sorted(wanted - there)


def test_from_nothing_to_a_converted_model_by_commands(environment, tmp_path):
    variables = {
        "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }

    def command(*words):
        ended = subprocess.run(
            ["interbert", *map(str, words)],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    python = (environment / "bin/python", "-c", "import megatron_interbert as m; print(m.__file__)")
    where = subprocess.run(python, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(environment)

    command("make-sample", "--output", "corpus", "--train-scenes", 64, "--test-scenes", 8)
    command("build-features", "corpus/train", "--output", "store")
    assert "0 problems" in command("inspect-features", "store")
    run = ("--model", "tiny", "--data-path", "store", "--train-iters", 4, "--save", "run")
    batch = ("--micro-batch-size", 4, "--global-batch-size", 8, "--num-workers", 0)
    out = command(
        *("launch", "--processes", 2, "pretrain"), *run, *batch, "--deepspeed-config", "zero2"
    )
    assert "ZeRO-2" in out
    where = ("--load", "run", "--data-path", "corpus/test", "--language", "en")
    command("evaluate", "retrieval", "--zero-shot", *where)
    result = json.loads((tmp_path / "run/evaluation/retrieval/result.json").read_text())
    assert result["captions"] == 8
    assert "<svg" in (tmp_path / "run/evaluation/retrieval/result.html").read_text()
    out = command("convert", "run", "--to", "huggingface", "--output", "exported", "--verify")
    assert "largest difference" in out
    assert {"config.json", "model.safetensors", "README.md"} <= set(
        os.listdir(tmp_path / "exported")
    )
