"""Test that file names in a manifest stay in its folder, and that a file that cannot be read is not
reported as missing.
"""

import json
import shutil

import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import is_plain_name
from megatron_interbert.weights.manifest import read_manifest, verify, write_manifest
from tests.corpus import write_store

FOREIGN = [
    "../outside.h5",
    "sub/../../outside.h5",
    "sub/inner.h5",
    "",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "back\\slash",
    "x" * 256,
    "\ud800",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("original") / "store")


@pytest.mark.parametrize("name", [*FOREIGN, "ABSOLUTE"])
@pytest.mark.parametrize("entry", ["shard", "captions_file", "tokens_file"])
def test_stores_name_no_file_outside(original, tmp_path, entry, name):
    store = shutil.copytree(original, tmp_path / "store")
    name = name.replace("ABSOLUTE", str(tmp_path / "outside.h5"))
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    chosen = manifest["shards"][1] if entry == "shard" else manifest[entry]
    (store / "sub").mkdir()

    for copy in (
        tmp_path / "outside.h5",
        store / "outside.h5",
        store / "sub" / "inner.h5",
        store / "inner.h5",
    ):
        # the same file, inside and outside: only the name is wrong
        shutil.copy(store / chosen["file"], copy)

    chosen["file"] = name
    path.write_text(json.dumps(manifest))

    with pytest.raises(
        UsageError, match=r"manifest.json: file .*, expected a name without folders"
    ) as refusal:
        RegionStore(str(store)).read(20)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", FOREIGN[:-1])  # the last one cannot be sealed
def test_checkpoints_name_no_file_outside(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "outside.h5").write_bytes(b"abc")
    write_manifest(folder, {"topology": {}, "files": {name: {"bytes": 3, "sha256": "0"}}})

    with pytest.raises(
        UsageError, match=r"manifest.json: file .*, expected a name without folders"
    ):
        read_manifest(folder)

    assert "expected a name without folders" in verify(folder)


def test_plain_names_pass():
    for name in (
        "shard-00000.h5",
        "weights-tp-00-of-02-dp-00-of-04.safetensors",
        "vocab.txt",
        "图片.h5",
        "a b",
        "..a",
        "x" * 255,
    ):
        assert is_plain_name(name), name

    for name in (None, 3, b"a", ["a"]):
        assert not is_plain_name(name)


def test_a_link_to_a_shard_on_another_disk_is_allowed(original, tmp_path):
    """Check this because shards may be put where there is room; what a link leads to is checked
    like any shard.
    """
    store = shutil.copytree(original, tmp_path / "store")
    elsewhere = shutil.move(store / "shard-00001.h5", tmp_path / "elsewhere.h5")
    (store / "shard-00001.h5").symlink_to(elsewhere)
    assert RegionStore(str(store)).read(20).image_id == "image-20"
    (store / "shard-00001.h5").unlink()
    (store / "shard-00001.h5").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"shard-00001.h5: not a regular file"):
        RegionStore(str(store))
