"""Hold what tests of pretraining objectives share."""

import pytest

from tests.tasks.objective_twins import write_asked


@pytest.fixture(scope="session")
def asked_store(tmp_path_factory):
    """Write a store and questions about some of its images."""
    return write_asked(tmp_path_factory.mktemp("objectives"))
