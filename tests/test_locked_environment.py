"""Test launchers/environment.sh with locks: what fits, what is refused; real pip, a small index on
disk.
"""

from pathlib import Path

import pytest

from tests.small_checkout import (
    ended,
    lock,
    locked,
    make_checkout,
    start,
    write_index,
    write_wheel,
)


@pytest.fixture
def checkout(tmp_path):
    """Make the small checkout; `fast` needs `deep`: 1.0 is locked, the index has 2.0 too."""
    folder = make_checkout(tmp_path)
    index = tmp_path / "index"
    write_index(index, ("deep", "1.0"), ("deep", "2.0"), ("fast", "1.0", "", "deep"))
    lock(folder, "fast==1.0", "deep==1.0", "triton==3.7.1", "setuptools==80.0")

    return folder


def packages(folder: Path) -> set[str]:
    """Return name-version of what is installed from the small index."""
    found = {path.name.removesuffix(".dist-info") for path in folder.glob("lib/*/*/*.dist-info")}
    return {name for name in found if name.startswith(("torch", "fast", "deep", "triton"))}


def test_the_lock_that_fits(checkout, tmp_path):
    """Check that PyPI's torch and a CPU build take locked versions, not the index's newer ones."""
    folder = tmp_path / "venv"
    code, said, complaints = ended(start(checkout, folder))
    assert (code, complaints, len(said)) == (0, [], 3)
    assert packages(folder) == {"torch-2.13.0", "fast-1.0", "deep-1.0", "triton-3.7.1"}

    # A changed lock is installed again. It has no hash for a CPU build, and that of PyPI's torch
    # does not matter. All else comes from pip's index, not from torch's.
    (checkout / "requirements/cuda.lock").write_text(f"torch==2.13.0 --hash=sha256:{'0' * 64}\n")
    cpu = write_index(tmp_path / "cpu", ("torch", "2.13.0+cpu"), ("deep", "3.0"))
    code, said, complaints = ended(start(checkout, folder, TORCH_INDEX=cpu))
    assert (code, complaints, len(said)) == (0, [], 4)
    assert said[1].startswith(
        "note: the index has torch's CPU build, which has no hash in the locks"
    )
    assert packages(folder) == {"torch-2.13.0+cpu", "fast-1.0", "deep-1.0", "triton-3.7.1"}


def test_a_lock_of_other_versions(checkout, tmp_path):
    """Check that older locks are ignored, with a note, in favour of requirements.txt."""
    write_index(tmp_path / "index", ("fast", "2.0"))
    (checkout / "requirements.txt").write_text("torch==2.13.0\nFast==2.0  # newer\ntriton==3.7.1\n")

    code, said, complaints = ended(start(checkout, tmp_path / "venv"))

    assert (code, complaints, len(said)) == (0, [], 4)
    assert said[1].startswith("note: installing without hashes, because no lock fits: fast==2.0 ")
    assert "fast-2.0" in packages(tmp_path / "venv")


def test_another_file_than_the_locked_one(checkout, tmp_path):
    """Check a wrong hash in the lock, for torch and for a dependency, and a changed file in the
    index.
    """
    index = tmp_path / "index"
    common = checkout / "requirements/common.lock"
    cuda = checkout / "requirements/cuda.lock"
    good = common.read_text()

    def refused(name: str, file: str) -> None:
        code, said, complaints = ended(start(checkout, tmp_path / "venv"))
        assert (code, len(said), len(complaints)) == (2, 1, 1)
        wanted = f"error: {name} from {(index / file).as_uri()} does not have the hash that"
        assert complaints[0].startswith(wanted)
        assert str(tmp_path / "venv/install.log") in complaints[0]

    right = cuda.read_text()
    cuda.write_text(f"torch==2.13.0 \\\n    --hash=sha256:{'0' * 64}\n")
    refused("torch==2.13.0", "torch/torch-2.13.0-py3-none-any.whl")

    cuda.write_text(right)
    wrong = f"deep==1.0 \\\n    --hash=sha256:{'1' * 64}\n"
    common.write_text(good.replace(locked(checkout, "deep==1.0"), wrong))
    refused("deep==1.0", "deep/deep-1.0-py3-none-any.whl")

    # The original lock, but the index's file was replaced by another of the same version.
    common.write_text(good)
    wheel = write_wheel(index / "fast", "fast", "1.0", "", "deep>=1")
    refused("fast==1.0", f"fast/{wheel.name}")


def test_what_the_lock_lacks(checkout, tmp_path):
    """Check a missing dependency, and a missing hash of a build tool: both are refused."""
    common = checkout / "requirements/common.lock"
    good = common.read_text()

    def refused(text: str, name: str) -> None:
        common.write_text(text)
        code, said, complaints = ended(start(checkout, tmp_path / "venv"))
        assert (code, len(said), len(complaints)) == (2, 1, 1)
        line = f"error: requirements/*.lock lack a version or a hash of {name}: "
        assert complaints[0].startswith(line)

    deep = locked(checkout, "deep==1.0")
    refused(good.replace(deep, ""), "deep")
    refused(
        good.replace(locked(checkout, "setuptools==80.0"), "setuptools==80.0\n"), "setuptools==80.0"
    )
