"""What many test files share."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # on GPU machines too; tests/gpu take theirs from torch

import pytest

from tests.corpus import write_store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A small region store that nobody changes; a file that needs another one has a fixture of this name itself."""
    return write_store(tmp_path_factory.mktemp("data") / "store")
