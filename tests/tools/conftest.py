import pytest

from tests.preparation.formats import made_up_images


@pytest.fixture
def images():
    return made_up_images(12)
