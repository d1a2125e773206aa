"""Feed an open file to the HDF5 library: every byte that the library reads passes through here.

So the file that is read is the one that was inspected, the system's error behind a failed read is
known exactly, and a heap of strings that would keep the library busy for ever never reaches it.
"""

import os
import stat
import struct

HEAP = b"GCOL"  # begins each collection of strings (a "global heap")
HEAP_HEADER = struct.Struct("<4sB3xQ")  # magic, version, bytes of the collection
HEAP_OBJECT = struct.Struct("<HH4xQ")  # index (0: free space), references, bytes
HEAP_VERSION = 1
WORD = 1 << 64


class FileBytes:
    """Represent a regular file, open for reading, with the methods that h5py needs of a file
    object.

    Raises OSError if it cannot be opened, ValueError if it is not a regular file.

    failure: the error of a failed read, or None. quiet: return zeros from a failed read instead of
    raising. HDF5 crashes later if an exception interrupts the opening of a file, so code that opens
    one sets `quiet` and checks `failure` afterwards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # O_NONBLOCK: opening a pipe must not wait for a writer
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.failure: OSError | ValueError | None = None
        self.quiet = False
        self._place = 0

        try:
            facts = os.fstat(self.descriptor)

            if not stat.S_ISREG(facts.st_mode):
                kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "not a regular file"
                raise ValueError(f"it is {kind}")
        except BaseException:
            self.close()
            raise

        self.size = facts.st_size
        self.identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Set where the next read begins, in this object only, so that forked processes do not
        move each other's place.
        """
        self._place = place + (self.size if whence == os.SEEK_END else 0)
        return self._place

    def tell(self) -> int:
        """Return the place of the next read, in bytes."""
        return self._place

    def read(self, length: int) -> bytes:
        """Read `length` bytes at the current place; see readinto."""
        buffer = bytearray(length)
        self.readinto(memoryview(buffer))
        return bytes(buffer)

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer and return its length; bytes past the end of the file are zero, as in
        HDF5's own drivers.
        """
        length = len(buffer)
        done = 0
        within = min(length, max(self.size - self._place, 0))  # a damaged file may name any place

        try:
            while done < within:
                count = os.preadv(self.descriptor, (buffer[done:within],), self._place + done)
                if count == 0:
                    break  # truncated since it was opened
                done += count

            buffer[done:] = bytes(length - done)
            if done:
                self._check_heaps(self._place, done)
        except (OSError, ValueError) as error:
            self.failure = _without_traceback(error)
            if not self.quiet:
                raise
            buffer[:] = bytes(length)
        else:
            self.failure = self.failure if self.quiet else None

        self._place += length

        return length

    def flush(self) -> None:
        """Do nothing: there is nothing to write."""

    def _check_heaps(self, place: int, length: int) -> None:
        """Raise ValueError if a heap that begins in the bytes just read would never end."""
        first = max(place - len(HEAP) + 1, 0)  # its magic may be split between two reads
        data = os.pread(self.descriptor, place + length + len(HEAP) - 1 - first, first)
        at = data.find(HEAP)

        while at >= 0:
            self._check_heap(first + at)
            at = data.find(HEAP, at + 1)

    def _check_heap(self, address: int) -> None:
        """Walk over the objects of a collection as the library does; raise ValueError for a step of
        zero bytes, at which the library would loop for ever.
        """
        header = os.pread(self.descriptor, HEAP_HEADER.size, address)
        if len(header) < HEAP_HEADER.size:
            return  # the library rejects that itself

        _, version, size = HEAP_HEADER.unpack(header)
        if version != HEAP_VERSION or size > self.size - address:
            return  # and that

        heap = os.pread(self.descriptor, size, address)
        place = HEAP_HEADER.size
        while place + HEAP_OBJECT.size <= len(heap):
            index, _, length = HEAP_OBJECT.unpack_from(heap, place)
            step = length
            if index:
                step = (HEAP_OBJECT.size + (length + 7) // 8 * 8) % WORD

            if step == 0:
                raise ValueError(
                    f"the heap of strings at byte {address} holds an object without end"
                )

            place += step


def _without_traceback(error: OSError | ValueError) -> OSError | ValueError:
    """Copy an error without its traceback, which would keep the frames of the read alive."""
    return type(error)(*error.args)
