"""Mutated inputs: each must end in one clear error or in report lines, never in a crash, a hang or
a half-written shard.

python -m tests.campaigns.fuzzing --cases 2000 --seed 1
"""

import argparse
import base64
import faulthandler
import io
import json
import random
import shutil
import signal
import tarfile
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.base import Dropped
from megatron_interbert.preparation.building.sources.decoding import Photo, decode, look
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from megatron_interbert.preparation.building.sources.photo_files import open_photos
from tests.preparation import published
from tests.preparation.formats import (
    adaptive_hdf5,
    lxmert_line,
    made_up_images,
    tensorpack_lmdb,
    vilbert_lmdb,
    write_lmdb,
    write_npz,
)


def in_bytes(value: object) -> str:
    """Text as `str` of bytes writes it."""
    return str(str(value).encode())


# reasons in the report that are not about an image
OF_CAPTIONS = ("caption record", "captions left out", "ids of no image")
SECONDS = 20  # that one case may take
OPTIONS = ReadOptions(trust_pickle=True)
HEADER = ("img_id", "img_w", "img_h", "num_boxes", "boxes", "features")
PUBLISHED = (
    *("groups.hdf5", "fields.hdf5", "columns.hdf5"),
    *("oscar.tsv", "predictions.tsv", "header.tsv"),
)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A file with a few of the things that happen to files: flips, cuts, doubled and foreign
    pieces, odd numbers.
    """
    result = bytearray(data)

    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        place = chance.randrange(len(result) + 1)
        length = chance.choice((1, 4, 50, 1000))
        kind = chance.randrange(6)
        if kind == 0 and place < len(result):
            result[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del result[place : place + length]
        elif kind == 2:
            result[place:place] = result[place : place + length]
        elif kind == 3:
            result[place:place] = bytes(chance.randrange(256) for _ in range(min(length, 50)))
        elif kind == 4:
            result[place:place] = chance.choice(
                (
                    b"\t",
                    b"\n",
                    b'"',
                    b"{}",
                    b"[" * 2000,
                    b"-1",
                    b"NaN",
                    b"1e999",
                    b"null",
                    b"\xff\xfe",
                    b"\0",
                )
            )
        elif chance.random() < 0.1:
            del result[place:]

    return bytes(result)


def small_photo(number: int) -> bytes:
    """A JPEG of its own color."""
    handle = io.BytesIO()
    Image.new("RGB", (32, 24), (40 * number, 90, 30)).save(handle, "JPEG")

    return handle.getvalue()


class Inputs:
    """Good inputs of every kind, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = made_up_images(6)
        self.names = [str(image["image_id"]) for image in self.images]
        write_npz(folder / "npz", self.images)
        (folder / "good.tsv").write_text("".join(map(lxmert_line, self.images)))
        adaptive_hdf5(folder / "good.hdf5", self.images)
        (folder / "ids.txt").write_text("\n".join(self.names))
        self.make_published(folder)
        (folder / "captions").mkdir()
        for name, text in self.caption_files().items():
            (folder / "captions" / name).write_text(text, encoding="utf-8")
        self.make_photos(folder / "photos", folder / "captions")

        build(
            BuildPlan(
                [open_features(str(folder / "good.tsv"), "auto", OPTIONS)],
                str(folder / "store"),
                detector={"name": "x"},
            )
        )

    def make_photos(self, folder: Path, captions: Path) -> None:
        """One file of each kind that holds photos; those with texts are files of captions too."""
        folder.mkdir()
        data = [small_photo(number) for number in range(len(self.names))]
        (folder / "one.jpg").write_bytes(data[0])
        lines = [
            f"{n}\t{base64.b64encode(d).decode()}\n" for n, d in zip(self.names, data, strict=True)
        ]
        (folder / "base64.tsv").write_text("".join(lines))
        columns = {
            "image": [
                {"bytes": d, "path": f"{n}.jpg"} for n, d in zip(self.names, data, strict=True)
            ],
            "text": [f"a {n}" for n in self.names],
        }
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, folder / "x.parquet", row_group_size=4)
        with pyarrow.ipc.new_stream(folder / "x.arrow", table.schema) as writer:
            writer.write_table(table)
        with tarfile.open(folder / "x.tar", "w") as archive:
            for name, photo in zip(self.names, data, strict=True):
                for ending, content in (("jpg", photo), ("txt", f"a {name}".encode())):
                    entry = tarfile.TarInfo(f"{name}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        for name in ("x.parquet", "x.arrow", "x.tar"):
            shutil.copy(folder / name, captions / name)

    def make_published(self, folder: Path) -> None:
        """Files in further forms in which features are published."""
        images = self.images
        published.mmf_npy(folder / "npy", images)
        published.by_place(
            folder / "groups.hdf5", images, lambda i, f: f"{i}/{f}", published.volta_fields
        )
        published.by_place(
            folder / "fields.hdf5", images, lambda i, f: f"{i}_{f}", published.detections
        )
        published.columns(folder / "columns.hdf5", images, 9, published.ALL)
        published.oscar_tsv(folder / "oscar.tsv", images, as_json=True)
        published.predictions_tsv(folder / "predictions.tsv", images)
        published.tsv_of(folder / "header.tsv", images, HEADER, header=True, text=in_bytes)
        published.coco_sizes(folder / "sizes.json", images)

    def caption_files(self) -> dict[str, str]:
        """One of each format."""
        coco = {
            "images": [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate(self.names)],
            "annotations": [
                {"image_id": i, "id": i, "caption": f"caption {n}"}
                for i, n in enumerate(self.names)
            ],
        }

        karpathy = {
            "images": [
                {"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": f"a {n}"}]}
                for n in self.names
            ]
        }
        lines = [{"image_id": n, "caption": f"一只 {n}", "lang": "zh"} for n in self.names]
        queries = [
            {"query_id": i, "query_text": f"query {n}", "item_ids": [n]}
            for i, n in enumerate(self.names)
        ]

        return {
            "coco.json": json.dumps(coco),
            "karpathy.json": json.dumps(karpathy),
            "sbu.json": json.dumps(
                {"image_urls": [f"http://x/{n}.jpg" for n in self.names], "captions": self.names}
            ),
            "lines.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            "queries.jsonl": "".join(json.dumps(line) + "\n" for line in queries),
            "plain.tsv": "".join(f"{n}\ta caption\ten\n" for n in self.names),
            "conceptual.tsv": "".join(f"a caption\thttp://x/{n}.jpg\n" for n in self.names),
            "tokens.txt": "".join(f"{n}.jpg#0 a caption\n" for n in self.names),
            "array.json": json.dumps([{"image": f"{n}.jpg", "caption": [n]} for n in self.names]),
            "rows.json": json.dumps([[f"{n}.jpg", f"a {n}"] for n in self.names]),
            "regions.json": json.dumps(
                [{"id": n, "regions": [{"phrase": f"a {n}"}]} for n in self.names]
            ),
            "lxmert.json": json.dumps(
                [{"img_id": n, "sentf": {"mscoco": [n], "vqa": ["?"]}} for n in self.names]
            ),
            "quoted.csv": "image,caption\n" + "".join(f'{n}.jpg,"a ""{n}"""\n' for n in self.names),
            "bars.csv": "image_name| comment\n" + "".join(f"{n}.jpg| a dog\n" for n in self.names),
        }


def build_from(path: Path, output: Path, **more: object) -> None:
    """A build with nothing allowed to pass unnoticed; a store that comes of it must be whole."""
    image_ids = str(more.pop("image_ids", ""))
    options = more.pop("options", OPTIONS)
    source = open_features(str(path), str(more.pop("kind", "auto")), options, image_ids=image_ids)
    manifest = build(
        BuildPlan([source], str(output), detector={"name": "x"}, **more), max_dropped=1.0
    )
    store = RegionStore(str(output))
    dropped = (output / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    lines = sum(json.loads(line)["reason"] in OF_CAPTIONS for line in dropped)
    assert manifest["counts"]["images"] + len(dropped) - lines == manifest["images_read"], (
        "an image has gone without a word"
    )
    for index in range(store.num_images):
        store.read(index)
    for caption in range(store.num_captions):
        store.caption(caption)


def decode_photos(path: Path) -> None:
    """Decode all photos at a path as extract-features does before it detects regions."""
    for files in open_photos(path):
        for unit in files.units(2):
            photos = [p for p in files.photos(unit) if isinstance(p, Photo)]
            good = [photo for photo in photos if not isinstance(look(photo), Dropped)]
            decode(list(enumerate(good)))


def one_case(kind: str, inputs: Inputs, work: Path, chance: random.Random) -> None:
    """Mutate one input of a kind and use it."""
    good = inputs.folder

    if kind == "tsv":
        (work / "x.tsv").write_bytes(mutate((good / "good.tsv").read_bytes(), chance))
        build_from(work / "x.tsv", work / "store", kind="tsv")
    elif kind == "json":
        file = chance.choice(sorted((good / "captions").iterdir()))
        (work / file.name).write_bytes(mutate(file.read_bytes(), chance))
        build_from(good / "npz", work / "store", caption_files=[str(work / file.name)])
    elif kind == "npz":
        npz = shutil.copytree(good / "npz", work / "npz")
        file = chance.choice(sorted(npz.iterdir()))
        file.write_bytes(mutate(file.read_bytes(), chance))
        build_from(npz, work / "store")
    elif kind == "hdf5":
        (work / "x.hdf5").write_bytes(mutate((good / "good.hdf5").read_bytes(), chance))
        build_from(work / "x.hdf5", work / "store", kind="hdf5", image_ids=good / "ids.txt")
    elif kind == "lmdb":
        mutated_rows(inputs, work, chance)
        build_from(work / "x.lmdb", work / "store")
    elif kind == "photos":
        file = chance.choice(sorted((good / "photos").iterdir()))
        (work / file.name).write_bytes(mutate(file.read_bytes(), chance))
        decode_photos(work if file.suffix == ".jpg" else work / file.name)
    elif kind == "npy":
        npy = shutil.copytree(good / "npy", work / "npy")
        file = chance.choice(sorted(npy.iterdir()))
        file.write_bytes(mutate(file.read_bytes(), chance))
        build_from(npy, work / "store")
    elif kind == "published":
        name = chance.choice(PUBLISHED)
        (work / name).write_bytes(mutate((good / name).read_bytes(), chance))
        sized = replace(OPTIONS, image_sizes=str(good / "sizes.json"))
        build_from(work / name, work / "store", kind=Path(name).suffix[1:], options=sized)
    elif kind == "sizes":
        damaged = mutate((good / "sizes.json").read_bytes(), chance)
        (work / "sizes.json").write_bytes(damaged)
        sized = replace(OPTIONS, image_sizes=str(work / "sizes.json"))
        build_from(good / "fields.hdf5", work / "store", options=sized)
    else:
        store = shutil.copytree(good / "store", work / "damaged")
        file = store / (
            "manifest.json"
            if kind == "manifest"
            else chance.choice(("shard-00000.h5", "captions.h5"))
        )
        damaged = mutate(file.read_bytes(), chance)
        if kind == "shard":  # of the same size, so that opening it does not refuse at once
            damaged = damaged[: file.stat().st_size].ljust(file.stat().st_size, b"\0")

        file.write_bytes(damaged)
        read_everything(store)


def mutated_rows(inputs: Inputs, work: Path, chance: random.Random) -> None:
    """An LMDB whose rows are damaged, pickles or msgpack."""
    import lmdb

    make = chance.choice(
        (
            vilbert_lmdb,
            lambda path, images: tensorpack_lmdb(path, images, inputs.names),
            published.mmf_lmdb,
            published.uniter_lmdb,
            lambda path, images: published.uniter_lmdb(path, images, compressed=True),
        )
    )
    with (
        lmdb.open(str(make(work / "good.lmdb", inputs.images))) as environment,
        environment.begin() as view,
    ):
        rows = [
            (bytes(key), mutate(bytes(value), chance) if chance.random() < 0.5 else bytes(value))
            for key, value in view.cursor()
        ]

    write_lmdb(work / "x.lmdb", rows)


def read_everything(path: Path) -> None:
    """Every record of a store."""
    store = RegionStore(str(path))
    store.languages()
    store.region_counts()
    for index in range(store.num_images):
        store.read(index)
    for caption in range(store.num_captions):
        store.caption(caption)


KINDS = (
    *("tsv", "json", "npz", "hdf5", "lmdb", "manifest", "shard"),
    *("npy", "published", "sizes", "photos"),
)


def campaign(cases: int, seed: int) -> Counter:
    """`cases` mutated inputs; how each kind ended."""
    outcomes: Counter[tuple[str, str]] = Counter()

    with tempfile.TemporaryDirectory() as name:
        inputs = Inputs(Path(name))
        for number in range(cases):
            kind = KINDS[number % len(KINDS)]
            chance = random.Random(seed * 1_000_003 + number)

            with tempfile.TemporaryDirectory() as work:
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                try:
                    one_case(kind, inputs, Path(work), chance)
                    outcomes[kind, "used"] += 1
                except UsageError as error:
                    outcomes[
                        kind, "refused" if str(error).strip() else "refused without words"
                    ] += 1
                except Exception as error:
                    raise AssertionError(
                        f"case {number} of seed {seed} ({kind}) ended in {type(error).__name__}"
                    ) from error
                finally:
                    faulthandler.cancel_dump_traceback_later()

                left = [path.name for path in Path(work).rglob("*.new")]
                assert not left, f"half-written files: {left}"

    return outcomes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.register(signal.SIGTERM)
    np.seterr(all="ignore")
    for (kind, outcome), count in sorted(campaign(options.cases, options.seed).items()):
        print(f"{kind} {outcome}: {count}")

    print(f"{options.cases} mutated inputs: no crash, no hang, nothing half-written")


if __name__ == "__main__":
    main()
