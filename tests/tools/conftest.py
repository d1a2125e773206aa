import pytest

from tests.data.formats import made_up_images


@pytest.fixture
def images():
    return made_up_images(12)
