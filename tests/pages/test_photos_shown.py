"""Test photos on pages and in the service: no id or link shows anything from outside the folder."""

import base64
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.serving.routes import picture_of
from tests.corpus import write_store
from tests.launching import launch
from tests.pages.secret_photos import LONG, SECRET
from tests.preparation.hostile import renew


def renamed(path, names):
    """Write a store whose first images have these ids."""
    write_store(path, images=16, images_per_shard=16)

    with h5py.File(path / "shard-00000.h5", "r+") as file:
        ids = [*names, *file["image_ids"].asstr()[:][len(names) :]]
        del file["image_ids"]
        file.create_dataset("image_ids", data=ids, dtype=h5py.string_dtype())

    renew(path)

    return path


def answer(store, image, folder):
    """Return what the service sends as the picture of an image of a store."""
    shop = SimpleNamespace(items=SimpleNamespace(corpus=Corpus([str(store)])))
    return picture_of(shop, image, str(folder))


def test_the_service_stays_in_its_folder(photos, tmp_path):
    (photos / "link.jpg").symlink_to("/etc/passwd")
    (photos / "other.png").symlink_to("../secret/private.jpg")
    names = ["plain", "link", "other", "../secret/private", LONG, "sub/inner", "missing"]
    store = renamed(tmp_path / "store", names)

    for image, name in enumerate(names):
        sent = answer(store, image, photos)
        body = Path(sent.path).read_bytes() if hasattr(sent, "path") else sent.body
        assert SECRET not in body, name
        assert b"root:" not in body, name
        photo = {"plain": b"jpeg", "sub/inner": b"inner"}.get(name)
        assert (body == photo) if photo else body.startswith(b"<svg"), name
        assert sent.media_type == ("image/jpeg" if photo else "image/svg+xml")


@pytest.mark.parametrize("name", ["../secret/private", "sub/../../secret/private", LONG])
def test_the_page_of_an_inspection_stays_in_its_folder(photos, tmp_path, name):
    store = renamed(tmp_path / "store", [name, "plain"])
    flags = (store, "--photos", photos, "--output", tmp_path / "look", "--examples", 16)
    code, out, err = launch(sys.executable, "tools/inspect_features.py", *flags)
    assert code in (0, 1), out + err
    page = (tmp_path / "look" / "inspection.html").read_text()
    assert base64.b64encode(b"jpeg").decode() in page
    assert base64.b64encode(SECRET).decode() not in page
