"""Test that every field of a store's manifest that any code reads has a checked type and bounds."""

import json
import re
import shutil
import sys

import pytest

from megatron_interbert.data.manifest import NEEDED, OPTIONAL, read_manifest
from megatron_interbert.errors import UsageError
from tests.corpus import write_store
from tests.launching import ROOT, launch

ODD = {
    "feature_dim": ["x", 0, -1, True, 24.0, None, 10**10],
    "num_classes": ["x", 0, 10**10, [11], None],
    "detector": ["x", [], None],
    "shards": [{}, [], "x", [None], [{"file": "shard-00000.h5"}], None],
    "captions_file": ["x", {}, None],
    "tokens_file": ["x", {}, None],
    "label_width": ["x", 0, 10**9, 12, 3.0, None],
    "num_attributes": ["x", -1, 10**9, 3.0, None],
    "clusters": [
        *(None, [], {}, {"count": 5}, {"count": 0, "regions": 1, "centroids": {}, "origin": {}}),
        {"count": 5, "regions": 1, "centroids": {}, "origin": {}},
        {"count": 5, "regions": 1, "centroids": {}, "origin": [], "file": "shard-00000.h5"},
    ],
    "class_names": [[1, {}], "x", {"a": 1}, [None], None],
    "background_class": ["x", -1, 11, 0.5, True],
    "text_normalisation": [5, "klingon", None, []],
    "soft_labels": [5, None, []],
    "box_format": [5, None],
    "generated": ["no", 1, None],
    "repaired_boxes": ["x", -1, 10**400, None],
    "inverted_boxes": ["x", 0.5, 10**400],
    "counts": [5, None],
    "images_read": ["x", None],
    "images_by_label_kind": [[]],
    "dropped": ["x"],
    "captions_left_out": ["x", None],
    "renamed_images": ["x", -1],
    "only_not_found": [0.5, None],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("manifest") / "store")


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "store")


def change(store, field, value, shard=None):
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    (manifest if shard is None else manifest["shards"][shard])[field] = value
    path.write_text(json.dumps(manifest))


def test_odd_values_of_all_fields_are_refused(store, tmp_path):
    assert set(ODD) == {*NEEDED, *OPTIONAL}
    for number, (field, values) in enumerate(ODD.items()):
        for place, value in enumerate(values):
            copy = shutil.copytree(store, tmp_path / f"{number}-{place}")
            change(copy, field, value)
            with pytest.raises(UsageError, match=r"manifest.json: .*expected") as refusal:
                read_manifest(copy)
            assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("field", ["images", "regions", "captions", "bytes", "file", "sha256"])
def test_odd_values_of_shards_are_refused(copy, field):
    for value in ("", "x", -1, 10**12, None, 1.5, []):
        if field != "sha256" or not isinstance(value, str):
            change(copy, field, value, shard=0)
            with pytest.raises(UsageError):
                read_manifest(copy)


def test_older_stores_say_less(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k not in OPTIONAL}))
    read_manifest(copy)


def test_no_code_reads_a_field_that_is_not_checked():
    """Check the fields that the sources read from manifests of stores."""
    pattern = re.compile(r"""(?:store|stores\[0\]|self)\.manifest(?:\.get\(|\[)["'](\w+)["']""")
    named = set()
    folders = [
        ROOT / "megatron_interbert" / room for room in ("data", "pages", "preparation", "tasks")
    ]
    for folder in (*folders, ROOT / "tools"):
        for path in folder.rglob("*.py"):
            named |= set(pattern.findall(path.read_text()))

    assert named - {"schema_version"} <= {*NEEDED, *OPTIONAL}
    assert {"label_width", "class_names", "detector"} <= named


@pytest.mark.parametrize(("field", "value"), [("label_width", "x"), ("num_classes", 10**10)])
def test_commands_say_it_in_one_line(copy, field, value):
    change(copy, field, value)
    code, out, err = launch(sys.executable, "tools/inspect_features.py", copy)
    assert code == 2, out + err
    assert len(err.strip().splitlines()) == 1
    assert f"'{field}' is" in err
