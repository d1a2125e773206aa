"""Load batches ahead of training in loader processes, in the order of the stream, with features in
shared memory that is reused.

Each process owns a shared mapping of a few slots. It reads the regions of a batch from disk
straight into a slot; the training process sees the same memory as the batch's features, and the
slot is free again when the last tensor on it is gone. So features are copied once, by the kernel,
and memory does not grow. The small fields of a batch travel through a pipe.

A process that dies is noticed at once, an error in one arrives as its message, and a read that
hangs raises an error after `data_timeout` seconds.
"""

import atexit
import contextlib
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.order import MicroBatches
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import RunError, TrainingStopped, UsageError
from megatron_interbert.signals import STOPPING, signal_at_parents_death

SLOTS = 4  # batches of one process that may be ready or in use at a time


class SharedFile:
    """Hold anonymous shared memory by its file descriptor: it has no name, so nothing is left
    behind if a process is killed.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("region features")
        os.ftruncate(self.descriptor, size)

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "descriptor": multiprocessing.reduction.DupFd(self.descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size = state["size"]
        self.descriptor = state["descriptor"].detach()

    def map(self) -> mmap.mmap:
        """Map the memory into this process."""
        return mmap.mmap(self.descriptor, self.size)


class SlotMemory:
    """Represent one use of a slot, as float16 memory of `shape`.

    NumPy keeps it alive as the owner of the memory, so it ends together with the last array on it.
    """

    def __init__(self, mapping: mmap.mmap, start: int, shape: tuple[int, int]) -> None:
        self.mapping = mapping
        address = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0] + start
        self.__array_interface__ = {
            "shape": shape,
            "typestr": "<f2",
            "data": (address, False),
            "version": 3,
        }


def _work(
    dataset: TrainingSet,
    connection: Connection,
    memory: SharedFile,
    slot_bytes: int,
    others: Sequence[Connection],
) -> None:
    """Serve as a loader process: receive (slot, pairs), send the fields of the batch, until the
    training process is gone.
    """
    # these signals are for the training process, which ends this one when it is time
    for number in (signal.SIGINT, *STOPPING):
        signal.signal(number, signal.SIG_IGN)

    signal_at_parents_death(signal.SIGKILL)  # even if this one is stopped or hangs in a read
    for other in others:
        # inherited copies of pipe ends would keep pipes open after their owner has died
        other.close()

    torch.set_num_threads(1)
    mapping = memory.map()
    requests: queue.SimpleQueue[tuple[int | None, list[tuple[int, int]]]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()

    while True:
        slot, pairs = requests.get()
        result: tuple[str, Any]

        try:
            result = "batch", _into_slot(dataset, pairs, mapping, slot, slot_bytes)
        except UsageError as error:
            result = "wrong input", str(error)
        except BaseException:  # whatever it is, the training process must be told
            result = "failure", traceback.format_exc()

        try:
            connection.send_bytes(pickle.dumps(result, protocol=5))
        except OSError:
            os._exit(0)


def _receive(connection: Connection, requests: queue.SimpleQueue) -> None:
    """Move requests from the pipe into a queue at once, because two processes that both wait to
    write into full pipes would block for ever.
    """
    while True:
        try:
            requests.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _into_slot(
    dataset: TrainingSet,
    pairs: list[tuple[int, int]],
    mapping: mmap.mmap,
    slot: int | None,
    slot_bytes: int,
) -> dict[str, Any]:
    """Build the fields of a batch; with a slot, the features stay in it and the field holds only
    their shape.
    """
    if slot is None:
        return dataset.fields(pairs)

    def allocate(shape: tuple[int, int]) -> np.ndarray:
        if 2 * shape[0] * shape[1] > slot_bytes:  # it would overwrite the next slot
            raise ValueError(
                f"{shape[0]} regions in a batch, more than most_rows of {type(dataset).__name__}"
            )

        return np.frombuffer(mapping, np.float16, shape[0] * shape[1], slot * slot_bytes).reshape(
            shape
        )

    fields = dataset.fields(pairs, allocate)
    fields["features"] = fields["features"].shape

    return fields


class LoaderProcess:
    """Represent one loader process in the training process."""

    def __init__(
        self, number: int, dataset: TrainingSet, start: str, others: list[Connection]
    ) -> None:
        self.slot_bytes = (
            -(-max(dataset.most_rows * dataset.feature_dim * 2, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        )
        self.number = number
        self.memory = SharedFile(SLOTS * self.slot_bytes)
        self.mapping = self.memory.map()
        self.free = deque(range(SLOTS))
        self.asked: deque[int | None] = deque()  # slots of the batches under way, in order
        context = multiprocessing.get_context(start)
        self.connection, theirs = context.Pipe()
        inherited = [*others, self.connection] if start == "fork" else []
        self.process = context.Process(
            target=_work,
            args=(dataset, theirs, self.memory, self.slot_bytes, inherited),
            daemon=True,
            name=f"loader {number}",
        )
        self.process.start()
        theirs.close()
        # An error that nobody expected ends the training process by way of multiprocessing, which
        # would wait for ever for processes that ignore SIGTERM.
        atexit.register(self.process.kill)

    def end(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.connection.close()
        atexit.unregister(self.process.kill)

    def ask(self, pairs: list[tuple[int, int]]) -> None:
        """Request a batch of (epoch, sample) pairs.

        Without a free slot its features come through the pipe: slower, but a caller may keep as
        many batches as it likes.
        """
        slot = self.free.popleft() if self.free else None
        self.asked.append(slot)
        with contextlib.suppress(OSError):  # if it has died, `take` reports that
            self.connection.send((slot, pairs))

    def take(self, timeout: float) -> PackedBatch:
        """Return the next batch in the order requested, waiting at most `timeout` seconds.

        Raises UsageError or TrainingStopped, local to this rank, if the process failed or hangs.
        """
        slot = self.asked.popleft()
        if self.connection not in wait([self.connection, self.process.sentinel], timeout):
            raise self._gone(timeout)
        try:
            kind, content = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise self._gone(timeout) from None

        if kind == "batch":
            if slot is not None:
                content["features"] = self._features(slot, content["features"])
            return to_batch(content)

        if kind == "wrong input":
            raise local(UsageError(content))

        raise local(
            TrainingStopped(
                f"loader process {self.number} failed:"
                f" {content.strip().splitlines()[-1]}\n{content}"
            )
        )

    def _features(self, slot: int, shape: tuple[int, int]) -> np.ndarray:
        memory = SlotMemory(self.mapping, slot * self.slot_bytes, shape)
        weakref.finalize(memory, self.free.append, slot)
        return np.asarray(memory)

    def _gone(self, timeout: float) -> RunError:
        self.process.join(0.5)
        code = self.process.exitcode
        if code is None:
            return local(
                TrainingStopped(
                    f"loader process {self.number} (pid {self.process.pid}) has given no batch for"
                    f" {timeout:g} s: the disk of the region store hangs or is far too slow"
                    " (--data-timeout changes the limit)"
                )
            )

        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )

        return local(
            TrainingStopped(
                f"loader process {self.number} (pid {self.process.pid}) {how}; memory may have run"
                " out: lower --num-workers or --micro-batch-size"
            )
        )


def local(error: RunError) -> RunError:
    """Mark an error as known to this rank alone, and return it."""
    error.local = True
    return error


class BatchStream:
    """Iterate over the endless micro-batches of one data-parallel rank after `consumed` samples,
    read ahead by `workers` processes (None: `num_workers` of the config).
    """

    def __init__(
        self,
        dataset: TrainingSet,
        consumed: int,
        global_batch: int,
        rank: int,
        ranks: int,
        pin_memory: bool = False,
        workers: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.pin_memory = pin_memory
        self.workers = dataset.config.num_workers if workers is None else workers
        self.positions = MicroBatches(
            consumed, global_batch, dataset.config.micro_batch_size, rank, ranks
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        started = self._start_processes()
        batches = self._from_processes(started) if started else self._here()

        return pinned_ahead(batches) if self.pin_memory else batches

    def _pairs(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.positions:
            yield self.dataset.order.pairs(positions, self.positions.step_start(positions[0]))

    def _here(self) -> Iterator[PackedBatch]:
        for pairs in self._pairs():
            try:
                yield to_batch(self.dataset.fields(pairs))
            except UsageError as error:
                raise local(error) from None

    def _start_processes(self) -> list[LoaderProcess]:
        """Start the loader processes, if any.

        As forks they keep in memory what this process holds now, even after it has overwritten it:
        start them before a model exists.
        """
        # the processes are the parallelism; the tokeniser would warn of a fork after its threads
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        processes: list[LoaderProcess] = []

        for number in range(self.workers):
            others = [process.connection for process in processes]
            processes.append(
                LoaderProcess(number, self.dataset, self.dataset.config.worker_start, others)
            )

        return processes

    def _from_processes(self, processes: list[LoaderProcess]) -> Iterator[PackedBatch]:
        config = self.dataset.config

        try:
            pairs = self._pairs()
            turn = 0
            for _ in range(SLOTS - 1):
                for process in processes:
                    process.ask(next(pairs))

            while True:
                process = processes[turn % self.workers]
                batch = process.take(config.data_timeout)
                process.ask(next(pairs))
                yield batch
                del batch
                turn += 1
        finally:
            for process in processes:
                process.end()


def most_batches_ahead(workers: int) -> int:
    """Return how many batches may be asked for before the one that is computed now: those of the
    loader processes, the one that a process is asked for as another is taken, and a pinned one.
    """
    return (SLOTS - 1) * workers + 2


def pinned_ahead(batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
    """Yield the same batches in pinned memory; a thread copies one batch ahead while the device
    computes.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lambda: next(batches).pin_memory())
        while True:
            batch = coming.result()
            coming = pool.submit(lambda: next(batches).pin_memory())
            yield batch
