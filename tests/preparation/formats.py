"""Write region features in the formats of the field, from fields in memory, as the formats' own
tools do.
"""

import base64
import pickle

import h5py
import lmdb
import msgpack
import numpy as np

from tests.shared import SHARED


def real_images(count=None):
    """Return the fields of the real npz files whose images the LXMERT TSV holds too, in its
    order.
    """
    names = [
        line.split("\t", 1)[0]
        for line in (SHARED / "data/lxmert_tsv/train2014_obj36.tsv").read_text().splitlines()
    ]
    return [
        npz_fields(SHARED / "data/region_features/npz" / f"{name}.npz") for name in names[:count]
    ]


def npz_fields(path):
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def made_up_images(count, features=8, classes=1600, seed=0):
    """Make fields as in the npz files, of `count` small images."""
    random = np.random.default_rng(seed)
    images = []

    for number in range(count):
        rows = int(random.integers(2, 6))
        corner = random.uniform(0, [60, 40], size=(rows, 2))
        images.append(
            {
                "image_id": np.array(f"image-{number}"),
                "image_w": np.array(100),
                "image_h": np.array(80),
                "boxes": (
                    np.concatenate(
                        [corner, corner + random.uniform(5, 40, size=(rows, 2))], 1
                    ).astype(np.float32)
                ),
                "features": random.normal(size=(rows, features)).astype(np.float32),
                "cls_id_1601": random.integers(1, classes + 1, rows),
                "cls_conf": random.uniform(0.2, 1, rows).astype(np.float32),
            }
        )

    return images


def encoded(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array, dtype)).decode()


def bottom_up_line(image, classes=False):
    """Return a TSV line of 6 columns, or of 8 with class ids (not counting background) and
    confidences.
    """
    values = [image["image_id"], image["image_w"], image["image_h"], len(image["boxes"])]
    values += [encoded(image["boxes"], np.float32), encoded(image["features"], np.float32)]

    if classes:
        values += [
            encoded(image["cls_id_1601"] - 1, np.int64),
            encoded(image["cls_conf"], np.float32),
        ]

    return "\t".join(map(str, values)) + "\n"


def lxmert_line(image):
    attributes = [
        encoded(np.zeros(len(image["boxes"])), np.int64),
        encoded(np.zeros(len(image["boxes"])), np.float32),
    ]
    values = [
        image["image_id"],
        image["image_h"],
        image["image_w"],
        encoded(image["cls_id_1601"] - 1, np.int64),
    ]
    values += [encoded(image["cls_conf"], np.float32), *attributes, len(image["boxes"])]

    return (
        "\t".join(
            map(
                str,
                [
                    *values,
                    encoded(image["boxes"], np.float32),
                    encoded(image["features"], np.float32),
                ],
            )
        )
        + "\n"
    )


def write_npz(folder, images):
    folder.mkdir()
    for image in images:
        np.savez(folder / f"{image['image_id']}.npz", **image)
    return folder


def write_lmdb(path, rows):
    """Write an LMDB of (key, value) rows, both bytes; return its path."""
    with (
        lmdb.open(str(path), map_size=1 << 28) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in rows:
            transaction.put(key, value)

    return path


def vilbert_lmdb(path, images, protocol=None):
    """Write pickled dictionaries by image id, and the list of keys, as ViLBERT's conversion from
    TSV does.
    """
    rows = []

    for image in images:
        row = {
            "image_id": str(image["image_id"]),
            "image_h": int(image["image_h"]),
            "image_w": int(image["image_w"]),
            "num_boxes": len(image["boxes"]),
            "boxes": base64.b64encode(image["boxes"].tobytes()),
            "features": base64.b64encode(image["features"].tobytes()),
            "objects_id": base64.b64encode((image["cls_id_1601"] - 1).astype(np.int64).tobytes()),
            "objects_conf": base64.b64encode(image["cls_conf"].tobytes()),
        }
        rows.append((row["image_id"].encode(), pickle.dumps(row, protocol)))

    return write_lmdb(path, [*rows, (b"keys", pickle.dumps([key for key, _ in rows]))])


def tensorpack_lmdb(path, images, captions, classes=True):
    """Write rows of pretraining data as tensorpack does: msgpack, with arrays as in msgpack-numpy;
    those of Product1M have no classes.
    """

    def packed(array):
        array = np.ascontiguousarray(array)
        return {
            b"nd": True,
            b"type": array.dtype.str,
            b"kind": b"",
            b"shape": array.shape,
            b"data": array.tobytes(),
        }

    rows = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        dense = np.zeros((len(image["boxes"]), 1601), np.float32)
        dense[np.arange(len(dense)), image["cls_id_1601"]] = image["cls_conf"]
        row = [packed(image["features"]), *([packed(dense)] if classes else [])]
        row += [packed(image["boxes"]), len(dense)]
        row += [int(image["image_h"]), int(image["image_w"]), str(image["image_id"]), caption]
        rows.append((f"{number:08d}".encode(), msgpack.packb(row, use_bin_type=True)))

    return write_lmdb(path, [*rows, (b"__keys__", msgpack.packb([key for key, _ in rows]))])


def adaptive_hdf5(path, images):
    """Write bottom-up attention features with numbers of regions that vary; return the image ids
    by row.
    """
    ends = np.cumsum([len(image["boxes"]) for image in images])
    boxes = np.concatenate([image["boxes"] for image in images])
    sizes = np.concatenate(
        [
            np.tile([image["image_w"], image["image_h"]] * 2, (len(image["boxes"]), 1))
            for image in images
        ]
    )
    share = boxes / sizes

    with h5py.File(path, "w") as file:
        file["image_features"] = np.concatenate([image["features"] for image in images])
        file["image_bb"] = boxes
        file["spatial_features"] = np.concatenate([share, share[:, 2:] - share[:, :2]], 1).astype(
            np.float32
        )
        file["pos_boxes"] = np.stack([np.r_[0, ends[:-1]], ends], 1)

    return [str(image["image_id"]) for image in images]
