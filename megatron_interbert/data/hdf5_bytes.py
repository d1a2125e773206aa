"""An open file as the HDF5 library sees it: every byte that reaches the library passes through
here.

So the file that was looked at is the file that is read, what the system says of a failed read is
known exactly, and a heap of strings that would keep the library busy for ever never gets to it.
"""

import os
import stat
import struct

HEAP = b"GCOL"  # begins each collection of strings
HEAP_HEADER = struct.Struct("<4sB3xQ")  # magic, version, bytes of the collection
HEAP_OBJECT = struct.Struct("<HH4xQ")  # index (0: free space), references, bytes
HEAP_VERSION = 1
WORD = 1 << 64


class FileBytes:
    """A regular file, open for reading, with the methods that h5py asks of a file object.

    OSError when it cannot be opened.

    failure: what the last read that went wrong met, or None. quiet: give zeros where a read goes
    wrong instead of raising. HDF5 crashes later where an exception ends the opening of a file, so
    who opens one is quiet and looks at `failure` afterwards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # a pipe must not make us wait
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.failure: OSError | ValueError | None = None
        self.quiet = False
        self._place = 0

        try:
            facts = os.fstat(self.descriptor)

            if not stat.S_ISREG(facts.st_mode):
                kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
                raise ValueError(f"it is {kind}")
        except BaseException:
            self.close()
            raise

        self.size = facts.st_size
        self.identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)

    def close(self) -> None:
        """Give the descriptor back; a second time does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Remember where the next read begins; nothing is shared with the processes that a fork
        makes.
        """
        self._place = place + (self.size if whence == os.SEEK_END else 0)
        return self._place

    def tell(self) -> int:
        """Give the place of the next read."""
        return self._place

    def read(self, length: int) -> bytes:
        """Read some bytes at the place."""
        buffer = bytearray(length)
        self.readinto(memoryview(buffer))
        return bytes(buffer)

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; what lies behind the end of the file is zero, as in HDF5's own
        drivers.
        """
        length = len(buffer)
        done = 0
        within = min(length, max(self.size - self._place, 0))  # a damaged file may name any place

        try:
            while done < within:
                count = os.preadv(self.descriptor, (buffer[done:within],), self._place + done)
                if count == 0:
                    break  # cut short since it was opened
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
        """Refuse the bytes just read when a heap that begins among them would never end.

        ValueError.
        """
        first = max(place - len(HEAP) + 1, 0)  # it may begin in one read and end in the next
        data = os.pread(self.descriptor, place + length + len(HEAP) - 1 - first, first)
        at = data.find(HEAP)

        while at >= 0:
            self._check_heap(first + at)
            at = data.find(HEAP, at + 1)

    def _check_heap(self, address: int) -> None:
        """Walk over the objects of a collection as the library does: a step of no bytes is a loop
        without end.
        """
        header = os.pread(self.descriptor, HEAP_HEADER.size, address)
        if len(header) < HEAP_HEADER.size:
            return  # the library sees that itself

        _, version, size = HEAP_HEADER.unpack(header)
        if version != HEAP_VERSION or size > self.size - address:
            return  # this too

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
    """Give the same error, holding nothing alive of the place where it was met."""
    return type(error)(*error.args)
