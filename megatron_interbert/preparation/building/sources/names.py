"""Map the names that published features use to ours: one table for all formats.

A new spelling is one entry here. Names are compared without case; of several spellings of one field
in a record, the first in the table counts. Names that are not here are ignored.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_interbert.preparation.building.sources.fields import BACKGROUND_FIRST

NAMES = {
    "image_id": (
        *("image_id", "img_id", "image_ids", "img_ids", "ids", "id", "product_id"),
        *("image_name", "image_names", "img_name", "img_names", "file_name", "file_names"),
        *("filename", "filenames", "feature_path", "imgid", "imgids", "image_key", "image_keys"),
    ),
    "width": (
        *("width", "image_w", "img_w", "image_width", "img_width", "im_w", "w"),
        *("widths", "image_widths", "img_widths", "image_ws", "img_ws", "im_width"),
    ),
    "height": (
        *("height", "image_h", "img_h", "image_height", "img_height", "im_h", "h"),
        *("heights", "image_heights", "img_heights", "image_hs", "img_hs", "im_height"),
    ),
    "image_sizes": ("image_sizes", "image_wh", "img_wh", "wh"),  # width, height
    "image_hw": ("image_hw", "img_hw", "hw"),  # height, width
    "num_boxes": (
        *("num_boxes", "num_bbox", "num_bboxes", "num_bb", "num_box", "nbox", "n_boxes"),
        *("num_objects", "num_objs", "objectsnum", "num_rois", "num_regions", "image_num_boxes"),
        *("nboxes", "nbb", "n_regions", "box_num", "boxes_num", "bbox_num", "obj_num"),
        *("box_counts", "region_counts"),
    ),
    "pos_boxes": ("pos_boxes",),  # first and last + 1 of an image's rows, over all images
    "boxes": (
        *("boxes", "bbox", "bboxes", "image_bb", "image_bbox", "image_bboxes", "bb", "box"),
        *("rois", "rect", "rects", "pred_boxes", "bounding_boxes", "image_boxes", "img_boxes"),
        *("img_bbox", "img_bboxes", "obj_boxes", "obj_bboxes", "object_boxes", "region_boxes"),
    ),
    "shares": (  # corners as shares of the image, perhaps with width, height and area
        *("norm_bb", "normalized_boxes", "normalized_bbox", "norm_boxes", "norm_bbox"),
        *("spatial_features", "norm_rois", "boxes_norm", "normalised_boxes"),
    ),
    "features": (
        *("features", "x", "feat", "feats", "feature", "image_features", "image_feature"),
        *("image_feat", "img_features", "roi_features", "box_features", "region_features"),
        *("visual_features", "obj_features", "object_features", "pooled_feat", "image_feats"),
        *("img_feat", "img_feats", "roi_feat", "roi_feats", "obj_feats", "region_feats"),
        *("att_feat", "att_feats", "bottom_up_features"),
    ),
    "class_probs": (
        *("class_probs", "cls_prob", "cls_probs", "class_prob", "soft_labels", "cls_scores"),
    ),
    "class_ids": (
        *("cls_id_1601", "class_ids", "objects_id", "objects_ids", "object_ids", "obj_id"),
        *("obj_ids", "objects", "class_labels", "pred_classes", "labels", "object_id"),
        *("cls_id", "cls_ids", "class_id", "classes"),
    ),
    "class_confidence": (
        *("class_confidence", "objects_conf", "object_conf", "cls_conf", "obj_conf", "obj_confs"),
        *("obj_probs", "conf", "confs", "confidence", "scores", "obj_scores", "object_scores"),
        *("pred_scores", "class_conf", "class_scores"),
    ),
    "class_names": ("class", "class_names"),
    "attribute_ids": (
        "attrs_id",
        "attrs_ids",
        "attr_id",
        "attr_ids",
        "attribute_ids",
        "attributes_id",
    ),
    "attribute_confidence": (
        *("attrs_conf", "attrs_confs", "attr_conf", "attr_confs", "attribute_confidence"),
        *("attributes_conf",),
    ),
    "caption": ("caption", "captions", "title"),
}
OF_REGIONS = (
    *("features", "boxes", "shares", "class_probs", "class_ids", "class_confidence"),
    *("class_names", "attribute_ids", "attribute_confidence"),
)
OURS = {theirs: ours for ours, spellings in NAMES.items() for theirs in spellings}
# Spellings of class ids that count background as 0; the others count from the first object.
COUNT_BACKGROUND = dict.fromkeys(("cls_id_1601", "labels", "classes"), BACKGROUND_FIRST)


def ours(name: Any) -> str:
    """Return our name for a field, or "" if it is none that is read."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    text = text.strip()
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", text).lower()  # NumBoxes is num_boxes

    return OURS.get(text.lower(), "") or OURS.get(words, "")


def spellings_of(names: Iterable[Any]) -> dict[str, Any]:
    """Map our names to the given spelling of each field, the first in the table if several are."""
    found: dict[str, Any] = {}

    for theirs in names:
        field = ours(theirs)
        if field and (field not in found or _rank(field, theirs) < _rank(field, found[field])):
            found[field] = theirs

    return found


def renamed(values: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields that are read, by our names, and the spelling of each."""
    spelled = spellings_of(name for name, value in values.items() if value is not None)
    return {field: values[theirs] for field, theirs in spelled.items()}, spelled


def _rank(field: str, theirs: Any) -> int:
    text = theirs.decode("utf-8", "replace") if isinstance(theirs, bytes) else str(theirs)
    return NAMES[field].index(text.strip().lower())
