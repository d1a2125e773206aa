"""Read an LMDB page by page without the LMDB library, checking every offset before it is read.

The library maps the file and trusts its content, so a truncated or altered file can kill the
process with a signal. Here it is a UsageError. The format is that of LMDB 0.9 on 64-bit machines
(MDB_meta, MDB_page and MDB_node in its mdb.c):

    page   number (8 bytes), padding (2), kind (2), begin and end of its free space (2 each),
           offsets of its nodes (2 each)
    meta   on pages 0 and 1, after the page's head; that of the later transaction is valid
    node   length of the value or, in a branch, number of a page (4), flags (2), length of the key
           (2), key, value; a value too long for a page has pages of its own, with one head, and the
           node holds the number of the first
"""

import itertools
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import reading

MAGIC = 0xBEEFC0DE
VERSION = 1
META = struct.Struct("<16x I I 16x I 44x 4x H H 24x Q Q Q Q")
HEAD = struct.Struct("<Q 2x H H H")
NODE = struct.Struct("<I H H")
PAGE_NUMBER = struct.Struct("<Q")
# flags of a page: mask of the bits for its kind, and two kinds
KINDS = 7
BRANCH = 1
LEAF = 2
APART = 1  # flag of a node whose value has pages of its own
PAGE_SIZES = [1 << power for power in range(8, 17)]
DEEPEST = 32
NO_ROOT = (1 << 64) - 1


class Meta(NamedTuple):
    """Hold the header of a file; `rules` to `root` describe its tree of rows (rules: flags)."""

    page_size: int
    rules: int
    depth: int
    rows: int
    root: int
    last_page: int
    transaction: int


class Row(NamedTuple):
    """Hold a key, and offset and length of its value in the file."""

    key: bytes
    offset: int
    length: int


class LmdbFile:
    """Read the rows of an LMDB (a folder with data.mdb or a single file) in the order of keys."""

    def __init__(self, path: str) -> None:
        self.path = Path(path, "data.mdb") if os.path.isdir(path) else Path(path)
        try:
            with reading(self.path):
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
                self.descriptor = os.open(self.path, flags)
        except OSError as error:
            raise self._no_lmdb(error.strerror) from error

        try:
            facts = os.fstat(self.descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise self._no_lmdb("not a regular file")
            self.size = facts.st_size
            self.meta = self._newest_meta()
        except BaseException:
            os.close(self.descriptor)
            raise

    def __enter__(self) -> "LmdbFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def rows(self, start: bytes = b"") -> Iterator[Row]:
        """Yield the rows from a key on, with every offset checked; raise UsageError for damage."""
        if self.meta.root == NO_ROOT:
            return

        before = b""
        count = 0

        for row in self._below(self.meta.root, self.meta.depth, start):
            if count and row.key <= before:
                raise self._damaged(f"key {row.key[:80]!r} is out of order")
            before = row.key
            count += 1
            yield row

        if not start and count != self.meta.rows:
            raise self._damaged(f"{count} rows, expected {self.meta.rows}")

    def value(self, row: Row) -> bytes:
        """Read the value of a row."""
        return self._bytes(row.offset, row.length)

    def _newest_meta(self) -> Meta:
        """Return the header of the last transaction; raise UsageError for another format."""
        first = self._meta_at(0)
        if first.page_size not in PAGE_SIZES:
            raise self._damaged(f"pages of {first.page_size} bytes")

        newest = max(first, self._meta_at(first.page_size), key=lambda meta: meta.transaction)
        if newest.page_size != first.page_size:
            raise self._damaged(f"pages of {first.page_size} and of {newest.page_size} bytes")
        if newest.root != NO_ROOT and not 1 <= newest.depth <= DEEPEST:
            raise self._damaged(f"a tree of {newest.depth} levels")
        if newest.rules:
            raise self._no_lmdb("its keys have a custom order; copy its rows to a plain database")

        return newest

    def _meta_at(self, offset: int) -> Meta:
        magic, version, *values = META.unpack(self._bytes(offset, META.size))
        if (magic, version) != (MAGIC, VERSION):
            raise self._no_lmdb(
                f"it begins with {magic:#x}, version {version}; expected {MAGIC:#x}, version"
                f" {VERSION}, as LMDB 0.9 writes it"
            )

        return Meta(*values)

    def _below(self, number: int, levels: int, start: bytes) -> Iterator[Row]:
        """Yield the rows from a key on, of a page and the pages below it."""
        page = self._bytes(number * self.meta.page_size, self.meta.page_size)
        nodes = self._nodes(number, page, LEAF if levels == 1 else BRANCH)

        if levels == 1:
            for key, place, length, flags in nodes:
                if key >= start:
                    yield self._row(number, page, key, place, length, flags)

            return

        keys = [node[0] for node in nodes]
        for node, next_key in itertools.zip_longest(nodes, keys[1:]):
            if next_key is None or next_key > start:
                child = node[2] | node[3] << 32
                yield from self._below(child, levels - 1, start)

    def _nodes(self, number: int, page: bytes, kind: int) -> list[tuple[bytes, int, int, int]]:
        """List (key, offset of the value in the page, length, flags) of the nodes of a page."""
        found, flags, lower, upper = HEAD.unpack_from(page)
        sound = HEAD.size < lower <= upper <= len(page) and lower % 2 == 0
        if found != number or flags & KINDS != kind or not sound:
            raise self._damaged(f"page {number} is malformed")

        nodes = []
        for place in struct.unpack_from(f"<{(lower - HEAD.size) // 2}H", page, HEAD.size):
            if place + NODE.size > len(page):
                raise self._damaged(f"page {number} has a node beyond its end")

            length, flags, key_length = NODE.unpack_from(page, place)
            begin = place + NODE.size
            end = begin + key_length
            if end > len(page):
                raise self._damaged(f"page {number} has a key beyond its end")

            nodes.append((page[begin:end], end, length, flags))

        return nodes

    def _row(
        self, number: int, page: bytes, key: bytes, place: int, length: int, flags: int
    ) -> Row:
        """Build the row of a node in a leaf page."""
        apart = flags & APART
        if place + (PAGE_NUMBER.size if apart else length) > len(page):
            raise self._damaged(f"page {number} has a value beyond its end")

        offset = number * self.meta.page_size + place
        if apart:
            first = PAGE_NUMBER.unpack_from(page, place)[0]
            offset = first * self.meta.page_size + HEAD.size

        self._check(offset, length)

        return Row(key, offset, length)

    def _bytes(self, offset: int, length: int) -> bytes:
        self._check(offset, length)
        with reading(self.path):
            data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            raise self._damaged(f"it ended at byte {offset + len(data)} while being read")
        return data

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self.size:
            raise UsageError(
                f"{self.path}: {self.size} bytes, but it refers to bytes {offset} to"
                f" {offset + length}; the file was cut or damaged: download or copy it again"
            )

    def _damaged(self, what: str) -> UsageError:
        return UsageError(
            f"{self.path}: damaged LMDB ({what}); download it again, or restore the file"
        )

    def _no_lmdb(self, why: str) -> UsageError:
        return UsageError(f"{self.path}: cannot be read as LMDB ({why})")
