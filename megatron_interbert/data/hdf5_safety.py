"""Say why an HDF5 dataset is not safe to read: it needs other files, code or types, or is too short
for its checksums.
"""

from h5py import h5d, h5t, h5z

FILTERS = {
    h5z.FILTER_DEFLATE,
    h5z.FILTER_SHUFFLE,
    h5z.FILTER_FLETCHER32,
    h5z.FILTER_SZIP,
    h5z.FILTER_LZF,
}
CHECKSUM_BYTES = 4  # appended to each chunk by the filter fletcher32
KINDS = {h5t.INTEGER, h5t.FLOAT, h5t.STRING}


def layout_problem(dataset: h5d.DatasetID) -> str:
    """Describe why reading a dataset needs other files or code that is not HDF5's own; empty if it
    does not.
    """
    properties = dataset.get_create_plist()
    if properties.get_layout() == h5d.VIRTUAL:
        return "is virtual (made of other files), expected data in the file itself"
    if properties.get_external_count():
        return (
            "keeps its values in another file (external storage), expected them in the file itself"
        )

    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if code not in FILTERS:
            shown = name.decode("utf-8", "replace")[:40] or code
            return (
                f"is compressed with the filter {shown!r}, expected gzip, lzf, szip or none"
                " (convert it with h5repack -f GZIP=1)"
            )

    return ""


def checksum_problem(dataset: h5d.DatasetID) -> str:
    """Describe why a chunk is too short for its checksum; empty if none is.

    HDF5 2.0.0 subtracts the size of the checksum even from a smaller chunk, and then reads past its
    end. A chunk's length with checksum is known only if the checksum was added last.
    """
    properties = dataset.get_create_plist()
    filters = [properties.get_filter(number)[0] for number in range(properties.get_nfilters())]
    if h5z.FILTER_FLETCHER32 not in filters:
        return ""

    last = len(filters) - 1
    if filters.index(h5z.FILTER_FLETCHER32) != last:
        return (
            "adds its checksums before compression, expected them last (convert it with h5repack"
            " -f GZIP=1)"
        )

    def place_of_short(chunk: h5d.StoreInfo) -> tuple[int, ...] | None:
        checked = not chunk.filter_mask >> last & 1
        return chunk.chunk_offset if checked and chunk.size < CHECKSUM_BYTES else None

    place = dataset.chunk_iter(place_of_short)

    return "" if place is None else f"has a chunk at {place} that is too short for its checksum"


def type_problem(dataset: h5d.DatasetID) -> str:
    """Describe why the values of a dataset are not read; empty if they are."""
    kind = dataset.get_type()
    if kind.committed():
        return "has a type that is stored elsewhere in the file (committed)"
    if kind.get_class() == h5t.VLEN:
        return "holds rows of different lengths, as nocaps' features do, which are not read"
    if kind.get_class() not in KINDS:
        return "holds neither numbers nor texts"
    return ""
