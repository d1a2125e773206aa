"""Test photos by image id: an id is never used as a path, and a link never leads out of the folder,
not even one swapped in later.
"""

import os
import shutil

import numpy as np
import pytest

from megatron_interbert.pages.photo_folder import PhotoFolder, photos_in
from tests.pages.secret_photos import LONG

ESCAPES = [
    "../secret/private",
    "sub/../../secret/private",
    "/etc/passwd",
    "ABSOLUTE",
    ".",
    "..",
    "",
    "a\0b",
    "sub//inner",
    LONG,
]


def test_photos_are_found_by_their_names(photos):
    folder = PhotoFolder(photos)
    for name, kind, data in (
        ("plain", "jpeg", b"jpeg"),
        ("picture", "png", b"png"),
        ("both", "jpeg", b"first"),
        ("sub/inner", "jpeg", b"inner"),
    ):
        assert folder.has(name)
        assert (folder.read(name).kind, folder.read(name).data) == (kind, data)

    assert not folder.has("missing")
    assert folder.read("missing") is None
    assert photos_in("") is None


@pytest.mark.parametrize("name", ESCAPES)
def test_an_id_is_no_path(photos, name):
    name = name.replace("ABSOLUTE", str(photos.parent / "secret" / "private"))
    assert not PhotoFolder(photos).has(name)
    assert PhotoFolder(photos).read(name) is None


def test_links_show_what_is_inside_and_nothing_else(photos):
    (photos / "out.jpg").symlink_to(photos.parent / "secret" / "private.jpg")
    (photos / "relative.jpg").symlink_to("../secret/private.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "away").symlink_to(photos.parent / "secret")
    (photos / "in.jpg").symlink_to("sub/inner.jpeg")
    (photos / "blob").write_bytes(b"of any name")
    (photos / "of-blob.png").symlink_to(photos / "blob")
    (photos / "sub" / "up.jpg").symlink_to("../plain.jpg")
    os.mkfifo(photos / "pipe.jpg")
    folder = PhotoFolder(photos)
    for name in ("out", "relative", "loop", "away/private", "pipe"):
        assert folder.read(name) is None, name

    assert folder.read("in").data == b"inner"
    assert (folder.read("of-blob").kind, folder.read("of-blob").data) == ("png", b"of any name")
    assert folder.read("sub/up").data == b"jpeg"


@pytest.mark.parametrize("what", ["photo", "folder", "target"])
def test_what_is_swapped_for_a_link_after_the_listing_is_not_followed(photos, what, monkeypatch):
    (photos / "in.jpg").symlink_to("sub/inner.jpeg")
    name = {"photo": "plain", "folder": "sub/inner", "target": "in"}[what]
    folder = PhotoFolder(photos)
    assert folder.read(name) is not None
    # the swap happens right after a listing
    monkeypatch.setattr(PhotoFolder, "_may_differ", lambda self, known: False)
    secret = photos.parent / "secret"
    shutil.copy(secret / "private.jpg", secret / "inner.jpeg")

    if what == "photo":
        (photos / "plain.jpg").unlink()
        (photos / "plain.jpg").symlink_to(secret / "private.jpg")
    else:
        shutil.rmtree(photos / "sub")
        (photos / "sub").symlink_to(secret)

    assert folder.read(name) is None


def test_new_photos_are_found_and_a_listing_is_kept(photos, monkeypatch):
    listings = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(path) or scandir(path))
    os.utime(photos, (1e9, 1e9))
    folder = PhotoFolder(photos)
    for number in range(1000):
        folder.has(f"image-{number}")

    assert len(listings) == 1, "one listing, not one look for each id"
    (photos / "new.jpg").write_bytes(b"new")
    os.utime(photos, (1.1e9, 1.1e9))
    folder._listing.__dict__["next_at"] = 0.0  # do not wait
    assert folder.read("new").data == b"new"
    (photos / "new.jpg").unlink()
    assert folder.read("new") is None, "gone before the listing is renewed"


def test_many_photos_take_one_listing(tmp_path):
    for number in range(2_000):
        (tmp_path / f"image-{number}.jpg").touch()
    os.utime(tmp_path, (1e9, 1e9))
    folder = PhotoFolder(tmp_path)
    assert np.all([folder.has(f"image-{number}") for number in range(2_000)])
    assert not folder.has("image-2000")
