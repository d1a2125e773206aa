"""Test tools/build_features.py on crafted pickles, msgpack rows and npz headers: the image is
reported by name and dropped, the others are kept.
"""

import json
import pickle
import zipfile

import msgpack
import numpy as np
import pytest

from tests.preparation.crafted import with_pointers
from tests.preparation.formats import (
    adaptive_hdf5,
    tensorpack_lmdb,
    vilbert_lmdb,
    write_lmdb,
    write_npz,
)
from tests.tools.building import build, content, refused


def dropped(store):
    """Return {image id: "reason: details"} from a store's report."""
    lines = [json.loads(line) for line in (store / "dropped.jsonl").read_text().splitlines()]
    return {line["image_id"]: f"{line['reason']}: {line['details']}" for line in lines}


def good_row(image):
    """Make a row of arrays, which pickles may hold."""
    return {
        "image_id": str(image["image_id"]),
        "image_h": 80,
        "image_w": 100,
        "num_boxes": len(image["boxes"]),
        "boxes": image["boxes"],
        "features": image["features"],
    }


@pytest.mark.parametrize(
    "name", ["record of an object", "objects said to be none", "scalar of an object"]
)
def test_crafted_types_cost_one_row_and_not_the_process(tmp_path, images, name):
    """Check types whose data, taken for addresses of objects, once ended the build by SIGSEGV."""
    crafted = {**good_row(images[0]), "image_w": with_pointers()[name]}
    lmdb = vilbert_lmdb(tmp_path / "x.lmdb", images)
    write_lmdb(lmdb, [(b"crafted", pickle.dumps(crafted))])
    store, _ = build(tmp_path / "store", lmdb, "--trust-pickle")
    assert store.num_images == 12
    assert dropped(tmp_path / "store")["crafted"].startswith("pickle with more than data in it: ")


def test_all_crafted_pickles_at_once_and_several_processes(tmp_path, images):
    lmdb = vilbert_lmdb(tmp_path / "x.lmdb", images)
    laughs = (
        b"]q\x00"
        + b"".join(b"](" + b"h" + bytes([n]) + b"2" * 99 + b"eq" + bytes([n + 1]) for n in range(9))
        + b"."
    )
    rows = {
        name: pickle.dumps({**good_row(images[0]), "more": value})
        for name, value in with_pointers().items()
    }
    rows |= {
        "laughs": b"\x80\x02" + laughs,
        "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    }
    rows |= {
        "long": b"\x80\x02I" + b"9" * 1_000_000 + b"\n.",
        "cut": pickle.dumps(good_row(images[0]))[:-9],
    }
    write_lmdb(lmdb, [(name.encode(), data) for name, data in rows.items()])
    flags = (lmdb, "--trust-pickle", "--max-dropped", 0.5, "--images-per-shard", 4)

    for name, workers in (("one", 1), ("two", 2)):
        store, _ = build(tmp_path / name, *flags, "--workers", workers)
        assert store.num_images == 12
        assert dropped(tmp_path / name).keys() == rows.keys()

    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_pickles_of_every_protocol_are_rows(tmp_path, images):
    rows = [
        (f"row-{number}".encode(), pickle.dumps(good_row(image), number % 6))
        for number, image in enumerate(images)
    ]
    lmdb = write_lmdb(tmp_path / "x.lmdb", rows)
    assert "its rows are pickles; give --trust-pickle" in refused(
        lmdb, "--output", tmp_path / "none"
    )
    store, out = build(tmp_path / "store", lmdb, "--trust-pickle")
    by_id = {str(image["image_id"]): image for image in images}
    assert store.num_images == 12, out
    for number in range(12):
        expected = by_id[store.image_id(number)]["features"].astype(np.float16)
        np.testing.assert_array_equal(store.read(number).features, expected)


def test_crafted_pickles_in_npz_and_beside_hdf5(tmp_path, images):
    folder = write_npz(tmp_path / "npz", images)
    for number, value in enumerate(with_pointers().values()):
        header = (
            b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(
                127
            )
            + b"\n"
        )
        fields = {**images[0], "image_id": np.array(f"crafted-{number}")}
        np.savez(folder / f"crafted-{number}.npz", **fields)
        with zipfile.ZipFile(folder / f"crafted-{number}.npz", "a") as archive:
            archive.writestr("info.npy", header + pickle.dumps({"objects": value}))

    store, _ = build(tmp_path / "store", folder, "--trust-pickle", "--max-dropped", 0.5)
    assert store.num_images == 12
    reasons = dropped(tmp_path / "store")
    assert reasons.keys() == {f"crafted-{number}" for number in range(len(with_pointers()))}
    assert all(
        reason.startswith("pickle with more than data in it: ") for reason in reasons.values()
    )

    adaptive_hdf5(tmp_path / "x.hdf5", images)
    for value in with_pointers().values():
        (tmp_path / "ids.pkl").write_bytes(pickle.dumps({"image": value}))
        flags = (tmp_path / "x.hdf5", "--image-ids", tmp_path / "ids.pkl", "--trust-pickle")
        assert f"error: --image-ids {tmp_path / 'ids.pkl'}: " in refused(
            *flags, "--output", tmp_path / "none"
        )


def test_absurd_arrays_in_msgpack_cost_one_row(tmp_path, images):
    lmdb = tensorpack_lmdb(tmp_path / "x.lmdb", images, ["a caption"] * 12)
    array = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": (2, 4), b"data": bytes(32)}
    absurd = {
        "objects": {**array, b"type": "|O8", b"shape": (4,)},
        "records": {**array, b"type": [["a", "<f4"], ["b", "<f4"]], b"shape": (4,)},
        "record": {**array, b"type": "f4,O"},
        "raw": {**array, b"type": "|V16", b"shape": (2,)},
        "a comma": {**array, b"type": "8f4", b"shape": (1,)},
        "negative": {**array, b"shape": (-1, 4)},
        "huge": {**array, b"shape": (1 << 60, 16)},
        "short": {**array, b"data": bytes(31)},
        "text": {**array, b"shape": "24"},
    }
    rest = [array, array, 2, 80, 100, "image", "a caption"]
    rows = [(name.encode(), msgpack.packb([value, *rest])) for name, value in absurd.items()]
    rows.append(
        (
            b"longest",
            msgpack.packb([array] * 3 + [2, 80, ["x" * 100_000] + [""] * 50_000, "image", "a"]),
        )
    )
    rows.append((b"nested", b"\xdd\x00\x0f\xff\xff" * 900 + bytes(1 << 20)))
    write_lmdb(lmdb, rows)
    store, _ = build(tmp_path / "store", lmdb, "--max-dropped", 0.5)
    assert store.num_images == 12
    reasons = dropped(tmp_path / "store")
    assert reasons.keys() == {key.decode() for key, _ in rows}
    for name in ("objects", "records", "record", "raw", "a comma"):
        assert reasons[name].startswith("array of neither numbers nor text: "), reasons[name]

    assert "width is not a single value" in reasons["longest"]


def test_absurd_arrays_in_npz_cost_one_file(tmp_path, images):
    folder = write_npz(tmp_path / "npz", images)
    headers = {
        "record": (
            "{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (4,), }"
        ),
        "raw": "{'descr': '|V8', 'fortran_order': False, 'shape': (4,), }",
        "comma": "{'descr': 'f4,f4', 'fortran_order': False, 'shape': (4,), }",
        "subarray": "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (4,), }",
        "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
        "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-8,), }",
    }
    for name, text in headers.items():
        np.savez(folder / f"{name}.npz", **{**images[0], "image_id": np.array(name)})
        header = b"\x93NUMPY\x01\x00v\x00" + text.encode().ljust(117) + b"\n"
        with zipfile.ZipFile(folder / f"{name}.npz", "a") as archive:
            archive.writestr("more.npy", header + bytes(32))

    bomb = {**images[0], "image_id": np.array("bomb"), "more": np.zeros(300 << 20, np.uint8)}
    np.savez_compressed(folder / "bomb.npz", **bomb)
    with zipfile.ZipFile(folder / "method.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", bytes(100))

    store, _ = build(tmp_path / "store", folder, "--max-dropped", 0.5)
    assert store.num_images == 12
    reasons = dropped(tmp_path / "store")
    assert reasons.keys() == {*headers, "bomb", "method"}
    assert reasons["bomb"].startswith("larger than any image's: 3")
    assert reasons["method"].startswith("compressed as NumPy does not: x.npy")
