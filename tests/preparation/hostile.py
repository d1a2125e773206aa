"""Put features of HDF5 that reach outside the file, load code or declare too much into files, for
tests of reading.
"""

import json

import h5py
import numpy as np

from megatron_interbert.files import file_sha256

UNKNOWN_FILTER = 32015  # zstd, which HDF5 loads from a plug-in
HUGE = 10**10


def renew(store):
    """Update the sizes and hashes in the manifest, as whoever makes a hostile store would."""
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    others = [manifest[name] for name in ("captions_file", "tokens_file") if name in manifest]
    for entry in [*manifest["shards"], *others]:
        entry["bytes"] = (store / entry["file"]).stat().st_size
        entry["sha256"] = file_sha256(store / entry["file"])

    path.write_text(json.dumps(manifest))


def external_storage(file, name, secret):
    """Make the values the bytes of another file."""
    shape, dtype = taken(file, name)
    count = int(np.prod(shape)) * dtype.itemsize
    file.create_dataset(name, shape, dtype, external=[(str(secret), 0, count)])


def external_link(file, name, secret):
    """Make the dataset a link to one in another HDF5 file."""
    taken(file, name)
    file[name] = h5py.ExternalLink(beside(secret, file, name), "/stolen")


def soft_link(file, name, secret):
    """Make the name a path, which leads through a link into another file."""
    taken(file, name)
    file[f"outside {name}"] = h5py.ExternalLink(beside(secret, file, name), "/")
    file[name] = h5py.SoftLink(f"/outside {name}/stolen")


def virtual(file, name, secret):
    """Make the values come from another HDF5 file."""
    shape, dtype = taken(file, name)
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource(beside(secret, file, name), "stolen", shape)
    file.create_virtual_dataset(name, layout)


def plugin_filter(file, name, secret):
    """Pack the values with a filter that HDF5 would have to load."""
    shape, dtype = taken(file, name)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(shape)
    properties.set_filter(UNKNOWN_FILTER, h5py.h5z.FLAG_OPTIONAL, (1,))
    space = h5py.h5s.create_simple(shape)
    made = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, properties)
    made.write_direct_chunk(
        (0,) * len(shape), bytes(int(np.prod(shape)) * dtype.itemsize), filter_mask=0
    )


def sparse(file, name, secret):
    """Declare tens of gigabytes and store nothing."""
    shape, dtype = taken(file, name)
    file.create_dataset(name, (HUGE, *shape[1:]), dtype, chunks=(1000, *shape[1:]))


def huge_chunk(file, name, secret):
    """Declare a chunk larger than any memory for a small dataset."""
    shape, dtype = taken(file, name)
    file.create_dataset(
        name, shape, dtype, chunks=(1 << 28, *shape[1:]), maxshape=(None, *shape[1:])
    )


def never_written(file, name, secret):
    """Declare tens of gigabytes, contiguous, without a place in the file."""
    shape, dtype = taken(file, name)
    file.create_dataset(name, (HUGE, *shape[1:]), dtype)


def committed_type(file, name, secret):
    """Make the type an object of its own."""
    shape, dtype = taken(file, name)
    file[f"type of {name}"] = dtype
    file.create_dataset(name, data=np.zeros(shape, dtype), dtype=file[f"type of {name}"])


def references(file, name, secret):
    """Store references to objects instead of values."""
    shape, _ = taken(file, name)
    file.create_dataset(name, data=np.full(shape, file.ref, h5py.ref_dtype), dtype=h5py.ref_dtype)


def group(file, name, secret):
    """Put a group where a dataset should be."""
    taken(file, name)
    file.create_group(name)


# Each feature and what the error about it says.
HOSTILE = {
    external_storage: "keeps its values in another file",
    external_link: "is a link into another file",
    soft_link: "is a soft link",
    virtual: "is virtual",
    plugin_filter: "is compressed with the filter",
    sparse: r"declares \d+ bytes",
    huge_chunk: r"declares \d+ bytes",
    never_written: r"declares \d+ bytes",
    committed_type: "has a type that is stored elsewhere",
    references: "holds neither numbers nor texts",
    group: "is a group or a type",
}


def taken(file, name):
    """Remove a dataset; return its shape, and its type or int64 if it does not hold numbers."""
    shape = file[name].shape
    dtype = file[name].dtype
    del file[name]
    return shape, dtype if dtype.kind in "iuf" else np.dtype(np.int64)


def beside(secret, file, name):
    """Write an HDF5 file outside that holds the secret in place of the dataset; return its path."""
    path = secret.with_name(f"{secret.name}-{name}.h5")
    with h5py.File(path, "w") as other:
        other["stolen"] = np.frombuffer(secret.read_bytes(), np.uint8)
    return str(path)
