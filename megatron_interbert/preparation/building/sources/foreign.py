"""Recognise files that hold no features that can be used, and say what they are and what to do."""

from collections.abc import Sequence
from pathlib import Path

PICKLE = "a pickle, whose structure only the program that wrote it knows"
CONVERT = (
    "convert it to one npz for each image (features [R, F], boxes [R, 4] in pixels, image_w,"
    " image_h, and cls_prob or objects_id if known)"
)
UNPACK = "unpack it and give what is inside"
# first bytes, at which place -> what it is, what to do
SIGNS = (
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", 0, "a file of torch.save", CONVERT),
    (b"\xff\xd8\xff", 0, "a photo", "extract its features: interbert extract-features"),
    (b"\x89PNG", 0, "a picture", "extract its features: interbert extract-features"),
    (b"ustar", 257, "a tar archive", UNPACK),
    (b"\x1f\x8b", 0, "compressed by gzip", UNPACK),
    (b"BZh", 0, "compressed by bzip2", UNPACK),
    (b"\xfd7zXZ", 0, "compressed by xz", UNPACK),
    (b"(\xb5/\xfd", 0, "compressed by zstd", UNPACK),
    (b"PAR1", 0, "a Parquet table", CONVERT),
    (b"ARROW1", 0, "an Arrow table", CONVERT),
    (b"\x04\x22\x4d\x18", 0, "text compressed by lz4", "give UNITER's img_db, not its txt_db"),
    (b"SQLite format 3", 0, "an SQLite database", CONVERT),
)
NOT_FEATURES = (".json", ".jsonl", ".csv", ".txt", ".yaml", ".lineidx")


def unusable(start: bytes, path: str = "") -> str:
    """Say what a file is, by its first bytes, that cannot be read, and what to do; "" if it is
    unknown.
    """
    for sign, place, what, mend in SIGNS:
        if start[place : place + len(sign)] == sign:
            return f"{what}, not region features; {mend}"

    suffix = Path(path).suffix.lower()
    if start[:2] == b"PK":
        if b"data.pkl" in start or suffix in (".pt", ".pth", ".bin"):
            return f"a file of torch.save, not region features; {CONVERT}"
        return f"a zip archive, not region features; {UNPACK}"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"{PICKLE}; {CONVERT}"
    if suffix in (".pkl", ".pickle", ".p"):
        return f"{PICKLE}; {CONVERT}"
    if suffix in NOT_FEATURES:
        return f"a {suffix} file, which holds no region features here; give the features themselves"

    return ""


def arrays_without_boxes(path: str, shape: Sequence[int]) -> str:
    """Say why an array of features alone, such as SCAN's train_ims.npy, is refused."""
    return (
        f"{path}: an array {list(shape)} of features alone, without boxes, names and sizes of the"
        " images; InterBERT needs the box of each region: give the features that it was made from"
        " (the bottom-up-attention TSV, or npz or LMDB with boxes), or extract them again"
    )


def folder_without_features(path: str, names: Sequence[str]) -> str:
    """Say what a folder holds instead of the features of a known format."""
    endings = sorted({Path(name).suffix for name in names if Path(name).suffix})
    named = [name for name in names if Path(name).suffix in (".tsv", ".h5", ".hdf5", ".lmdb")]
    pictures = {".jpg", ".jpeg", ".png", ".webp"} & {ending.lower() for ending in endings}
    what = f"holds {', '.join(endings[:8]) or 'no'} files"

    if named:
        mend = f"give its files one by one: {', '.join(sorted(named)[:8])}"
    elif pictures:
        mend = "photos have no features yet: interbert extract-features makes them"
    elif {".pt", ".pth", ".pkl", ".p"} & set(endings):
        mend = f"pickles of each image: {CONVERT}"
    else:
        mend = "give the path of features in one of these formats"

    return (
        f"{path}: a folder with neither manifest.json (region store), data.mdb (LMDB), .npz nor"
        f" .npy files ({what}); {mend}"
    )
