"""Write region features in further forms in which people publish them, from fields in memory."""

import io
import json
import pickle

import h5py
import msgpack
import numpy as np

from tests.preparation.formats import encoded, write_lmdb

# spellings of the datasets that `columns` writes
ALL = ("feats", "bbox", "num_bbox", "widths", "heights", "img_ids")


def name_of(image):
    return str(image["image_id"])


def distribution(image, columns=1601):
    """Make a distribution over the classes whose most likely class is that of the image; without
    background if there is a column fewer than classes.
    """
    ids = image["cls_id_1601"] - (columns == 1600)
    dense = np.full((len(ids), columns), 0.1 / columns, np.float32)
    dense[np.arange(len(ids)), ids] = 0.8
    return dense


def shares(image, columns=4):
    """Return boxes as shares, with width and height (6 columns) and area (7)."""
    box = image["boxes"] / np.array([image["image_w"], image["image_h"]] * 2, np.float32)
    extent = box[:, 2:] - box[:, :2]
    return np.concatenate([box, extent, extent.prod(1, keepdims=True)], 1)[:, :columns]


def padded(array, rows):
    """Add rows of zeros."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def mmf_info(image, background=False):
    """Make mmf's description of an image: with `background`, its classes count it."""
    return {
        "bbox": image["boxes"],
        "num_boxes": len(image["boxes"]),
        "objects": image["cls_id_1601"] - (not background),
        "cls_prob": distribution(image, 1600 + background),
        "image_width": int(image["image_w"]),
        "image_height": int(image["image_h"]),
    }


def mmf_npy(folder, images, rows=0, **more):
    """Write X.npy and X_info.npy; `rows`: pad to so many regions, of which num_boxes count."""
    for image in images:
        info = mmf_info(image, **more)
        features = image["features"]
        if rows:
            features = padded(features, rows)
            info |= {name: padded(info[name], rows) for name in ("bbox", "objects", "cls_prob")}

        place = folder / name_of(image)
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(f"{place}.npy", features)
        np.save(f"{place}_info.npy", info)

    return folder


def mmf_lmdb(path, images, **more):
    rows = [
        {"feature_path": name_of(image), "features": image["features"], **mmf_info(image, **more)}
        for image in images
    ]
    return write_lmdb(path, [(row["feature_path"].encode(), pickle.dumps(row)) for row in rows])


def volta_fields(image):
    """Make the fields of a group for an image, as volta's extraction writes them."""
    return {
        "boxes": image["boxes"],
        "features": image["features"],
        "img_w": int(image["image_w"]),
        "img_h": int(image["image_h"]),
        "num_boxes": len(image["boxes"]),
        "objects_id": image["cls_id_1601"] - 1,
        "objects_conf": image["cls_conf"],
        "attrs_id": np.zeros(len(image["boxes"]), np.int64),
    }


def short_fields(image):
    """Make the fields of LXMERT's TSV in HDF5 (volta's large_tsv_to_h5, VL-T5)."""
    fields = volta_fields(image)
    names = {"objects_id": "obj_id", "objects_conf": "obj_conf", "attrs_id": "attr_id"}
    return {names.get(name, name): value for name, value in fields.items() if name != "num_boxes"}


def by_place(path, images, place, fields):
    """Write an HDF5 with every field at place(image name, field name)."""
    with h5py.File(path, "w") as file:
        for image in images:
            for name, value in fields(image).items():
                file[place(name_of(image), name)] = value

    return path


def detections(image):
    """Make what meshed-memory's file has: no size."""
    return {
        "features": image["features"],
        "boxes": image["boxes"],
        "cls_prob": distribution(image),
    }


def columns(path, images, rows, names, **more):
    """Write one dataset a field over all images, padded to `rows` regions. names: of features,
    boxes, numbers of boxes, width, height, ids (None: left out).
    """
    values = [
        np.stack([padded(image["features"], rows) for image in images]),
        np.stack([padded(image["boxes"], rows) for image in images]),
        np.array([len(image["boxes"]) for image in images]),
        np.array([int(image["image_w"]) for image in images]),
        np.array([int(image["image_h"]) for image in images]),
        [name_of(image) for image in images],
    ]
    with h5py.File(path, "w") as file:
        for name, value in zip(names, values, strict=True):
            if name:
                file[name] = value
        for name, value in more.items():
            file[name] = value

    return path


def coco_sizes(path, images):
    """Write COCO annotations that have only the sizes of images."""
    entries = [
        {"id": number, "file_name": f"{name_of(i)}.jpg", "width": 100, "height": 80}
        for number, i in enumerate(images)
    ]
    path.write_text(json.dumps({"images": entries, "annotations": []}))
    return path


def uniter_fields(image, columns=6):
    return {
        "norm_bb": shares(image, columns).astype(np.float16),
        "features": image["features"].astype(np.float16),
        "conf": image["cls_conf"].astype(np.float16),
        "soft_labels": distribution(image).astype(np.float16),
    }


def uniter_lmdb(path, images, compressed=False, columns=6):
    """Write UNITER's img_db: msgpack, or npz with the odd array that savez makes of a flag."""

    def packed(array):
        data = {"type": array.dtype.str, "kind": b"", "shape": array.shape}
        return {b"nd": True, **{k.encode(): v for k, v in data.items()}, b"data": array.tobytes()}

    rows = []
    for image in images:
        fields = uniter_fields(image, columns)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **fields, flag=np.array(True))
        row = msgpack.packb({k: packed(v) for k, v in fields.items()}, use_bin_type=True)
        rows.append((f"{name_of(image)}.npz".encode(), buffer.getvalue() if compressed else row))

    keys = json.dumps([key.decode() for key, _ in rows]).encode()
    return write_lmdb(path, [*rows, (b"__keys__", keys)])


def oscar_tsv(path, images, as_json=False, quoted=False):
    """Write feature.tsv: features with six box numbers behind them; `quoted` as csv.writer does."""
    lines = []
    for image in images:
        both = np.concatenate([image["features"], shares(image, 6)], 1)
        text = encoded(both, np.float32)
        if as_json:
            text = json.dumps({"num_boxes": len(both), "features": text})
            if quoted:
                text = '"' + text.replace('"', '""') + '"'
        lines.append(f"{name_of(image)}\t{text if as_json else f'{len(both)}	{text}'}\n")

    path.write_text("".join(lines))
    return path


def predictions_tsv(path, images, size=True):
    """Write predictions.tsv: an object for each region."""
    lines = []
    for image in images:
        objects = [
            {"class": "dog", "conf": 0.5, "rect": box.tolist(), "feature": encoded(row, np.float32)}
            for box, row in zip(image["boxes"], image["features"], strict=True)
        ]
        record = {"objects": objects}
        if size:
            record |= {"image_h": int(image["image_h"]), "image_w": int(image["image_w"])}
        lines.append(f"{name_of(image)}\t{json.dumps(record)}\n")

    path.write_text("".join(lines))
    return path


def tsv_of(path, images, names, header=False, text=str, boxes=None, start="", between="\t"):
    """Write a TSV of any columns. text: how a value is written; boxes: instead of pixels."""
    lines = [between.join(names) + "\n"] if header else []
    for image in images:
        zeros = np.zeros(len(image["boxes"]))
        values = {
            "image_id": name_of(image),
            "image_w": int(image["image_w"]),
            "image_h": int(image["image_h"]),
            "num_boxes": len(image["boxes"]),
            "boxes": encoded((boxes or (lambda i: i["boxes"]))(image), np.float32),
            "features": encoded(image["features"], np.float32),
            "objects_id": encoded(image["cls_id_1601"] - 1, np.int64),
            "objects_conf": encoded(image["cls_conf"], np.float32),
            "attrs_id": encoded(zeros, np.int64),
            "attrs_conf": encoded(zeros, np.float32),
            "cls_prob": encoded(distribution(image), np.float32),
        }
        values |= {"img_id": values["image_id"], "img_w": values["image_w"]}
        values |= {"img_h": values["image_h"]}
        lines.append(between.join(text(values.get(name, "x")) for name in names) + "\n")

    path.write_text(start + "".join(lines), encoding="utf-8")
    return path
