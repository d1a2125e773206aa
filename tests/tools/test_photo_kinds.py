"""Test photos as people have them: in folders with equal names, without endings, as base64, in tar,
Parquet and Arrow files, with the captions that come with them.
"""

import base64
import io
import json
import sys
import tarfile

import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.detectors import DetectorChoice
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.photo_files import image_ids, open_photos
from megatron_interbert.preparation.building.sources.photos import PhotoSource
from tests.launching import launch
from tests.shared import SHARED, needs_shared
from tests.tools.test_extract_features import make_detector

FIELD = SHARED / "data" / "field"
TEXTS = ["a red square", "a green square", "一个蓝色的方块", "two squares"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "detr"
    model, processor = make_detector("detr")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photo(number, kind="JPEG"):
    """Return the bytes of a small photo of its own color and width."""
    from PIL import Image

    handle = io.BytesIO()
    pixels = np.full((40, 60 + number, 3), 50 * number, np.uint8)
    Image.fromarray(pixels).save(handle, kind)

    return handle.getvalue()


def extract(detector, output, *paths, captions=(), max_dropped=0.0):
    """Extract regions in this process; return ({id: (width, captions)}, manifest)."""
    choice = DetectorChoice(str(detector), device="cpu")
    sources = [PhotoSource(files, choice) for path in paths for files in open_photos(path)]
    plan = BuildPlan(
        sources,
        str(output),
        [str(path) for path in captions],
        detector=sources[0].facts().detector,
        images_per_shard=3,
    )
    manifest = build(plan, max_dropped=max_dropped)
    store = RegionStore(str(output))
    found = {store.image_id(n): (int(store.read(n).size[0]), []) for n in range(store.num_images)}
    for number, image in enumerate(store.caption_image):
        found[store.image_id(int(image))][1].append(store.caption(number))

    return found, manifest


def tar_of(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

    return path


def rows_of(**more):
    """Return the columns of four photos as `datasets` has them, with captions."""
    photos = [{"bytes": photo(number), "path": f"p{number}.jpg"} for number in range(4)]
    return {"image": photos, "text": TEXTS, **more}


EXPECTED = {f"p{number}.jpg": (60 + number, [TEXTS[number]]) for number in range(4)}


@needs_shared
def test_folders_of_the_field_keep_all_their_photos(detector, tmp_path):
    folder = FIELD / "photo_folders"
    for number, (name, ids) in enumerate(
        {
            "photos": ["1000/main", "1001/main", "1002/main", "1003/main"],
            "no-ending": ["0000000", "0000001", "0000002", "0000003"],
        }.items()
    ):
        found, manifest = extract(detector, tmp_path / f"s{number}", folder / name)
        assert list(found) == ids
        assert manifest["dropped"] == {}

    found, _ = extract(detector, tmp_path / "muge", FIELD / "muge_photos" / "MR_train_imgs.tsv")
    assert list(found) == ["1000000", "1000001", "1000002"]


def test_ids_are_as_long_as_they_must_be():
    names = ["1/main.jpg", "2/main.jpg", "a.jpg", "b/c.png", "d/e.jpg", "d/e.png", "x.y.webp"]
    assert list(image_ids(names).values()) == [
        *("1/main", "2/main", "a", "c", "d/e.jpg", "d/e.png", "x.y"),
    ]


def test_captions_find_photos_of_one_name_by_their_folders(detector, tmp_path):
    for number in range(3):
        folder = tmp_path / "photos" / f"{number}"
        folder.mkdir(parents=True)
        (folder / "main.jpg").write_bytes(photo(number))
    (tmp_path / "photos" / "notes.txt").write_text("none")
    (tmp_path / "photos" / "data.bin").write_bytes(b"no photo")
    lines = [{"image": f"photos/{n}/main.jpg", "caption": TEXTS[n]} for n in (0, 2)]
    captions = tmp_path / "c.json"
    captions.write_text(json.dumps(lines))
    found, manifest = extract(
        detector, tmp_path / "store", tmp_path / "photos", captions=[captions]
    )
    assert found == {f"{n}/main": (60 + n, [TEXTS[n]]) for n in (0, 2)}
    assert manifest["dropped"] == {"no caption": 1}
    (files,) = open_photos(tmp_path / "photos")
    assert files.others == {".txt": 1, ".bin": 1}


def test_tables_with_photos_in_base64(detector, tmp_path):
    """Check standard and address letters, padding left out, a header, OFA's columns with several
    lines for one photo, and lines of no use.
    """
    plain = [base64.b64encode(photo(n)).decode() for n in range(4)]
    urlsafe = [base64.urlsafe_b64encode(photo(n, "PNG")).decode().rstrip("=") for n in range(4)]
    tables = {
        "muge": "".join(f"{100 + n}\t{plain[n]}\n" for n in range(4)),
        "reversed": "".join(f"{urlsafe[n]}\t{100 + n}\n" for n in range(4)),
        "header": "img_id\tbase64\n" + "".join(f"{100 + n}\t{plain[n]}\r\n" for n in range(4)),
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.tsv").write_text(text)
        found, _ = extract(detector, tmp_path / name, tmp_path / f"{name}.tsv")
        assert found == {str(100 + n): (60 + n, []) for n in range(4)}

    rows = [(n, k, f"{TEXTS[n]} {k}") for n in range(4) for k in range(5)]
    lines = [f"{i}\t{100 + n}\t{text}\tcat&&dog\t{plain[n]}" for i, (n, _, text) in enumerate(rows)]
    (tmp_path / "ofa.tsv").write_text("\n".join(lines) + "\n9\t109\tbroken\t\t***\n9\tshort\n")
    found, manifest = extract(detector, tmp_path / "ofa", tmp_path / "ofa.tsv", max_dropped=0.5)
    assert found == {
        str(100 + n): (60 + n, [f"{TEXTS[n]} {k}" for k in range(5)]) for n in range(4)
    }
    merged = manifest["dropped"].pop(
        "image id seen before in its source, its captions kept with the first"
    )
    assert merged <= 8, "where a unit ends between two lines of a photo"
    assert manifest["dropped"] == {"photo is not base64": 1, "wrong number of columns": 1}


def test_tar_shards_of_webdataset(detector, tmp_path):
    """Check texts beside photos as .txt and as .json, keys in folders, and equal keys in two
    shards.
    """
    first = {}
    for n in range(2):
        first |= {f"00{n}.jpg": photo(n), f"00{n}.txt": TEXTS[n].encode()}
    first["broken.jpg"] = b"\xff\xd8\xffno photo"
    first["alone.txt"] = b"a text without a photo"
    second = {}
    for n in range(2):
        record = json.dumps({"caption": TEXTS[n + 2], "url": "https://x.org/1.jpg"}).encode()
        second |= {f"./00{n}.png": photo(n + 2, "PNG"), f"./00{n}.json": record}
    (tmp_path / "shards").mkdir()
    tar_of(tmp_path / "shards" / "00000.tar", first)
    tar_of(tmp_path / "shards" / "00001.tar", second)

    found, manifest = extract(detector, tmp_path / "s", tmp_path / "shards", max_dropped=0.5)
    assert found == {
        "00000/000": (60, [TEXTS[0]]),
        "00000/001": (61, [TEXTS[1]]),
        "00001/000": (62, [TEXTS[2]]),
        "00001/001": (63, [TEXTS[3]]),
    }
    assert manifest["dropped"] == {"not a picture": 1, "no photo in the record": 1}


def test_names_in_tar_files_may_have_dots_and_other_members(detector, tmp_path):
    names = [f"2.{n}.jpg" for n in range(3)]
    tar_of(tmp_path / "dots.tar", {name: photo(n) for n, name in enumerate(names)})
    found, _ = extract(detector, tmp_path / "dots", tmp_path / "dots.tar")
    assert found == {f"2.{n}": (60 + n, []) for n in range(3)}
    members = {"a.cls": b"7", "a.jpg": photo(1), "a.txt": b"caf\xe9"}
    tar_of(tmp_path / "more.tar", members)
    found, _ = extract(detector, tmp_path / "more", tmp_path / "more.tar")
    assert found == {"a": (61, ["caf?"])}


def test_parquet_and_arrow_of_datasets(detector, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    table = pyarrow.table(rows_of())
    (tmp_path / "data").mkdir()
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    found, _ = extract(detector, tmp_path / "parquet", tmp_path / "data")
    assert found == EXPECTED

    (tmp_path / "saved").mkdir()
    for kind, name in ((pyarrow.ipc.new_stream, "data-0.arrow"), (pyarrow.ipc.new_file, "f.arrow")):
        with kind(tmp_path / "saved" / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        found, _ = extract(detector, tmp_path / name, tmp_path / "saved" / name)
        assert found == EXPECTED

    # bytes alone, named by a column or by the number of the row
    table = pyarrow.table({"jpg": [photo(n) for n in range(4)], "id": [7, 8, 9, 10]})
    parquet.write_table(table, tmp_path / "ids.parquet")
    parquet.write_table(table.select(["jpg"]), tmp_path / "bare.parquet", row_group_size=3)
    assert list(extract(detector, tmp_path / "i", tmp_path / "ids.parquet")[0]) == [
        *("7", "8", "9", "10"),
    ]
    assert list(extract(detector, tmp_path / "b", tmp_path / "bare.parquet")[0]) == list("0123")


def test_different_photos_of_one_name_keep_their_own_captions(detector, tmp_path):
    """Check paths that have lost their folders, as `datasets` writes them, beside better names; and
    a name that comes again late, with another photo or with the same.
    """
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    def found_in(name, paths, numbers=range(4), **columns):
        photos = [{"bytes": photo(n), "path": path} for n, path in zip(numbers, paths, strict=True)]
        texts = [f"text {n}" for n in range(len(paths))]
        table = pyarrow.table({"image": photos, "text": texts, **columns})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        return extract(detector, tmp_path / name, tmp_path / f"{name}.parquet", max_dropped=1.0)

    found, _ = found_in("lost", ["main.jpg"] * 4)
    assert found == {str(n): (60 + n, [f"text {n}"]) for n in range(4)}
    names = [f"{n}/main.jpg" for n in range(4)]
    found, _ = found_in("named", ["main.jpg"] * 4, file_name=names)
    assert found == {names[n]: (60 + n, [f"text {n}"]) for n in range(4)}

    late = [*(f"{n}.jpg" for n in range(64)), "0.jpg", "1.jpg"]
    found, manifest = found_in("late", late, [*(n % 5 for n in range(64)), 3, 1])
    assert found["0.jpg"] == (60, ["text 0"]), "another photo of that name has other captions"
    assert found["1.jpg"] == (61, ["text 1", "text 65"]), "the same photo"
    assert manifest["dropped"] == {
        "image id seen before in its source": 1,
        "image id seen before in its source, its captions kept with the first": 1,
    }


def test_captions_in_json_members_are_read_or_counted(detector, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    members = {"0.json": b'["a", "b"]', "1.json": b"{damaged", "2.json": b'{"caption": "c"}'}
    tar_of(tmp_path / "x.tar", {**{f"{n}.jpg": photo(n) for n in range(3)}, **members})
    found, manifest = extract(detector, tmp_path / "tar", tmp_path / "x.tar", max_dropped=1.0)
    assert found == {"0": (60, ["a", "b"]), "2": (62, ["c"])}
    assert manifest["dropped"] == {"its json is damaged": 1}

    rows = {"jpg": [photo(0), photo(1)], "json": [{"caption": "a"}, {"caption": "b"}]}
    parquet.write_table(pyarrow.table({**rows, "__key__": ["k0", "k1"]}), tmp_path / "y.parquet")
    found, _ = extract(detector, tmp_path / "parquet", tmp_path / "y.parquet")
    assert found == {"k0": (60, ["a"]), "k1": (61, ["b"])}


def test_captions_are_read_from_such_files_alone(detector, tmp_path):
    """Check photos in a folder whose captions are in Parquet or tar files."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    (tmp_path / "photos").mkdir()
    for n in range(4):
        (tmp_path / "photos" / f"p{n}.jpg").write_bytes(photo(n))
    parquet.write_table(pyarrow.table(rows_of()), tmp_path / "c.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "c.arrow", pyarrow.table(rows_of()).schema) as writer:
        writer.write_table(pyarrow.table(rows_of()))
    tar_of(tmp_path / "c.tar", {f"p{n}.txt": TEXTS[n].encode() for n in range(4)})
    for name in ("c.parquet", "c.arrow", "c.tar"):
        found, _ = extract(
            detector, tmp_path / f"s-{name}", tmp_path / "photos", captions=[tmp_path / name]
        )
        assert found == {f"p{n}": (60 + n, [TEXTS[n]]) for n in range(4)}


def test_files_that_hold_no_photos_are_one_line(detector, tmp_path):
    (tmp_path / "texts.tsv").write_text("1\ta cat\n2\ta dog\n")
    (tmp_path / "x.zip").write_bytes(b"PK")
    (tmp_path / "x.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 damaged PAR1")
    (tmp_path / "x.arrow").write_bytes(b"\xff\xff\xff\xff damaged")
    for name, words in (
        ("texts.tsv", "no photos there; expected a folder of photos"),
        ("x.zip", "is compressed; unpack it"),
        ("x.tar", "cannot be read as tar"),
        ("x.parquet", "cannot be read as parquet"),
        ("x.arrow", "cannot be read as arrow"),
    ):
        with pytest.raises(UsageError, match=words) as refusal:
            extract(detector, tmp_path / "store", tmp_path / name)
        assert "\n" not in str(refusal.value)
        assert not list(tmp_path.glob("store*"))


def test_the_command_says_what_are_no_photos(detector, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(photo(1))
    (tmp_path / "photos" / "1.json").write_text("{}")
    code, out, err = launch(
        *(sys.executable, "tools/extract_features.py", tmp_path / "photos"),
        *("--detector", detector, "--output", tmp_path / "store", "--device", "cpu"),
    )
    assert code == 0, err
    assert "files that are no photos: 1 .json (give captions with --captions)" in out
    assert "1 images" in out


def test_a_single_photo_is_refused_in_words(tmp_path):
    for name in ("photo.jpg", "photo"):
        (tmp_path / name).write_bytes(photo(1))
        with pytest.raises(UsageError, match="is a single photo; give the folder that holds it"):
            open_photos(tmp_path / name)
