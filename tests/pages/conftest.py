"""Provide photos for tests of pages, next to one that must not be shown."""

import pytest

from tests.pages.secret_photos import SECRET


@pytest.fixture
def photos(tmp_path):
    """Make a folder of photos, next to a folder with a secret one."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "private.jpg").write_bytes(SECRET)
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "plain.jpg").write_bytes(b"jpeg")
    (folder / "picture.png").write_bytes(b"png")
    (folder / "both.png").write_bytes(b"second")
    (folder / "both.jpg").write_bytes(b"first")
    (folder / "sub" / "inner.jpeg").write_bytes(b"inner")

    return folder
