"""Read HDF5 files safely, this project's and foreign ones; all of them are opened through here.

An HDF5 file can refer to other files, load code for its filters and declare more than it holds.
None of that is followed, loaded or allocated: a dataset is inspected before any of it is read, and
every problem becomes a one-line UsageError.
"""

import atexit
import ctypes
import errno
import functools
import itertools
import os
import re
import weakref
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5fd, h5g, h5i, h5l, h5o, h5p, h5pl, h5t

from megatron_interbert.data.hdf5_bytes import FileBytes
from megatron_interbert.data.hdf5_safety import (
    KINDS,
    checksum_problem,
    layout_problem,
    type_problem,
)
from megatron_interbert.errors import UsageError

# What h5py raises for damaged files, depending on where the damage is.
HDF5_ERRORS = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    MemoryError,
)
MEND = "restore it or rebuild the store"

LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link into another file"}

# A dataset may be larger than its file, by compression or parts never written: this many times the
# file's size, plus this many bytes.
TIMES_THE_FILE = 64
AND_BYTES = 64 << 20
# Each text may be as long as the file, so this many are read at once, or more if files of their
# number stay below this many bytes.
STRINGS_AT_ONCE = 32
STRING_BYTES_AT_ONCE = 128 << 20
ATTRIBUTE_STRINGS = 256
ATTRIBUTE_BYTES = 4 << 30

OPEN: "weakref.WeakSet[Hdf5File]" = weakref.WeakSet()

# A file must not make HDF5 load a filter plugin, whatever HDF5_PLUGIN_PATH says.
while h5pl.size():
    h5pl.remove(0)


def system_reason(error: BaseException | None) -> str:
    """Return the system's error text if the system refused to read; empty if the bytes of the file
    are wrong.
    """
    if isinstance(error, MemoryError) or "memory allocation failed" in str(error):
        return os.strerror(errno.ENOMEM)

    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"\berrno = (\d+)", str(error))):
        number = int(told[1])

    return os.strerror(number) if number else ""


def reading_problem(
    where: str | Path, error: BaseException, mend: str = MEND, what: str = "as HDF5"
) -> UsageError:
    """Build the one-line error for a file that could not be read, without calling it damaged if
    the system refused to read it.

    `mend` says what to do about damage, `what` how the file was read.
    """
    if reason := system_reason(error):
        return UsageError(
            f"{where}: could not be read ({reason}), which says nothing about its content; fix"
            " permissions, disk or limits and try again"
        )

    return UsageError(f"{where}: cannot be read{' ' if what else ''}{what} ({error}); {mend}")


def _open_through(source: FileBytes) -> h5py.File:
    """Open a file whose bytes HDF5 reads only through `source`.

    The property list is closed here instead of whenever Python collects it: one that outlives
    Python, held by the traceback of some error, makes HDF5 crash.
    """
    properties = h5p.create(h5p.FILE_ACCESS)
    source.quiet = True

    try:
        properties.set_fileobj_driver(h5fd.fileobj_driver, source)
        properties.set_fclose_degree(h5f.CLOSE_STRONG)
        return h5py.File(h5f.open(b"file", h5f.ACC_RDONLY, properties))
    finally:
        source.quiet = False
        h5i.dec_ref(properties)


@atexit.register
def _close_all() -> None:
    """Close all open files before Python ends: HDF5 would call into Python afterwards, and crash.

    If HDF5 has failed to read an object, it keeps parts of the file's properties that only closing
    the library releases.
    """
    for file in list(OPEN):
        file.close()

    if Hdf5File.met_errors:
        with h5py.h5.phil:
            ctypes.CDLL(h5py.h5.__file__).H5close()


class Hdf5File:
    """Represent an HDF5 file, open for reading; only datasets and attributes of its root that are
    safe to read can be reached.

    As a context manager it turns every error of HDF5 into a one-line UsageError, which ends with
    `mend`.
    """

    met_errors = False  # whether HDF5 has failed in this process

    def __init__(self, path: str | Path, mend: str = MEND) -> None:
        self.path = Path(path)
        self.mend = mend
        self._datasets: dict[str, h5py.Dataset] = {}
        try:
            self.bytes = FileBytes(path)
        except (OSError, ValueError) as error:
            raise self.problem(error) from error

    def __enter__(self) -> "Hdf5File":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(error, HDF5_ERRORS) and not isinstance(error, UsageError):
            raise self.problem(error) from error

    def problem(
        self, error: BaseException, where: str | Path = "", mend: str = "", what: str = "as HDF5"
    ) -> UsageError:
        """Build the one-line error for an error of HDF5 in this file; see reading_problem."""
        return reading_problem(where or self.path, self.cause(error), mend or self.mend, what)

    def cause(self, error: BaseException) -> BaseException:
        """Return the failed read behind an error of HDF5, or else the error itself."""
        Hdf5File.met_errors = True
        opened = getattr(self, "bytes", None)
        return (opened.failure if opened else None) or error

    def close(self) -> None:
        """Close the file; its datasets can no longer be read."""
        self._datasets.clear()
        if "_file" in self.__dict__:
            self.__dict__.pop("_file").close()
        self.bytes.close()

    def keep_descriptor(self) -> int:
        """Close the file for HDF5 and return a descriptor of it, which the caller must close."""
        descriptor = os.dup(self.bytes.descriptor)
        self.close()

        return descriptor

    @functools.cached_property
    def _file(self) -> h5py.File:
        """Open the file in HDF5 on first use, at no cost to callers that need only the
        descriptor.
        """
        file = _open_through(self.bytes)
        OPEN.add(self)
        if self.bytes.failure:
            file.close()
            raise self.bytes.failure

        if file.id.get_create_plist().get_sizes() != (8, 8):
            file.close()
            raise self._refusal("the file", "has addresses of an unusual size")

        return file

    def __contains__(self, name: str) -> bool:
        return self._file.id.links.exists(name.encode())

    def names(self, most: int | None = 64, group: str = "") -> list[str]:
        """Return the first `most` names (None: all) in the root or in a group of it, in the file's
        order.
        """
        place = h5py.Group(self._member(group, f"group '{group}'")) if group else self._file
        return list(itertools.islice(place, most))

    def is_group(self, name: str) -> bool:
        """Tell whether a name, or a path of names, is a group in the file itself."""
        try:
            return isinstance(self._member(name, f"'{name}'"), h5g.GroupID)
        except UsageError:
            return False

    def __getitem__(self, name: str) -> h5py.Dataset:
        """Open a dataset of the root, or of a group (group/name); raise UsageError if it is missing
        or not safe to read.
        """
        if "/" in name:
            return self._open(name)  # there may be millions: they are not kept open
        if name not in self._datasets:
            self._datasets[name] = self._open(name)

        return self._datasets[name]

    def strings(self, name: str) -> np.ndarray:
        """Read all texts of a one-dimensional dataset, object [n]."""
        dataset = self[name]
        if dataset.ndim != 1 or dataset.id.get_type().get_class() != h5t.STRING:
            raise self._refusal(
                f"'{name}'", f"is {dataset.dtype} {list(dataset.shape)}, expected a list of texts"
            )

        if not dataset.id.get_type().is_variable_str():
            return dataset.asstr()[:]

        texts = np.empty(len(dataset), object)
        step = max(STRINGS_AT_ONCE, STRING_BYTES_AT_ONCE // max(self.bytes.size, 1))
        total = 0

        for start in range(0, len(dataset), step):
            part = dataset[start : start + step]
            total += sum(map(len, part))
            if total > self.bytes.size:  # texts stored once each cannot exceed the file
                raise self._refusal(
                    f"'{name}'", "repeats texts until they are longer than the file"
                )

            texts[start : start + step] = [text.decode("utf-8") for text in part]

        return texts

    def attribute(self, name: str) -> np.ndarray | None:
        """Return an attribute of the root: a number, a text or an array of these; None if it is
        missing.
        """
        if not h5a.exists(self._file.id, name.encode()):
            return None

        attribute = h5a.open(self._file.id, name.encode())
        kind = attribute.get_type()
        if kind.committed() or kind.get_class() not in KINDS:
            raise self._refusal(f"attribute '{name}'", "is neither numbers nor texts")

        count = int(np.prod(attribute.shape, dtype=object))
        longest = self.bytes.size
        if count > ATTRIBUTE_STRINGS and count * longest > ATTRIBUTE_BYTES:
            raise self._refusal(
                f"attribute '{name}'",
                f"holds {count} values, too many for a file of {longest} bytes",
            )

        return self._file.attrs[name]

    def _open(self, name: str) -> h5py.Dataset:
        shown = f"dataset '{name}'"
        found = self._member(name, shown)
        if not isinstance(found, h5d.DatasetID):
            raise self._refusal(shown, "is a group or a type, expected a dataset")

        problem = (
            layout_problem(found)
            or checksum_problem(found)
            or type_problem(found)
            or self._size_problem(found)
        )
        if problem:
            raise self._refusal(shown, problem)

        return h5py.Dataset(found, readonly=True)

    def _member(self, path: str, shown: str) -> h5g.GroupID | h5d.DatasetID:
        """Follow names from the root, through groups that are in the file itself."""
        found = self._file.id
        for name in path.split("/"):
            inside = found is self._file.id or isinstance(found, h5g.GroupID)
            if not inside or not found.links.exists(name.encode()):
                raise self._refusal(shown, "is missing")

            link = found.links.get_info(name.encode()).type
            if link != h5l.TYPE_HARD:
                kind = LINKS.get(link, "a link of an unknown kind")
                raise self._refusal(shown, f"is {kind}, expected data in the file itself")

            found = h5o.open(found, name.encode())

        return found

    def _refusal(self, what: str, problem: str) -> UsageError:
        return UsageError(f"{self.path}: {what} {problem}; {self.mend}")

    def _size_problem(self, dataset: h5d.DatasetID) -> str:
        """Describe why a dataset cannot be as large as it declares in a file of this size; empty if
        it can.

        Its shape is safe to read by now.
        """
        held = self.bytes.size
        count = int(np.prod(dataset.shape, dtype=object))
        if count == 0:
            return ""

        # a dataset that was never written has no offset and reads as zeros
        declared = count * dataset.get_type().get_size()
        offset = dataset.get_offset()
        if offset is not None:
            last = offset + max(dataset.get_storage_size(), declared)
            return f"ends at byte {last}, but the file has {held}" if last > held else ""

        properties = dataset.get_create_plist()
        if properties.get_layout() == h5d.CHUNKED:
            chunk = (
                int(np.prod(properties.get_chunk(), dtype=object)) * dataset.get_type().get_size()
            )
            declared = max(declared, chunk)

        if declared > TIMES_THE_FILE * held + AND_BYTES:
            return f"declares {declared} bytes, too many for a file of {held}"

        return ""
