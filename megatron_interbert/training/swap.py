"""Prepare offload to NVMe disks (ZeRO-Infinity): DeepSpeed's I/O library, a folder of this process
for its swap files, and room for them.

DeepSpeed does not look at the results of its reads and writes: on a full disk weights would be lost
without a word. So the room is checked before a run starts, and the files' sizes after every step.
"""

import contextlib
import fcntl
import functools
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.utils.cpp_extension
from deepspeed.ops.op_builder import AsyncIOBuilder

from megatron_interbert.errors import TrainingStopped, UsageError, at_end, end_at_once
from megatron_interbert.files import check_writable, open_folder, readable_size, take_lock
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.signals import STOPPING, handling
from megatron_interbert.training.deepspeed_config import blocks_on_disk

PREFIX = "interbert-swap-"  # of the folder of one process, which it keeps locked
OPTIMIZER_BYTES = 16  # per parameter: fp32 weight, two moments and gradient
PARAMETER_BYTES = 2
SWAP_ROOM = 1.05  # files are padded, and a file system needs some of its own


def prepare_swap(settings: dict[str, Any], parameters: int, ranks: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration with folders of this process's own for what it offloads to
    NVMe disks; the same configuration if it offloads nothing there.

    `parameters` is their number in the model that `ranks` share. Raises UsageError if the I/O
    library cannot be built, or a disk lacks room.
    """
    blocks = blocks_on_disk(settings)
    if not blocks:
        return settings

    needed: dict[str, int] = {}
    for name, block in blocks.items():
        each = OPTIMIZER_BYTES if name == "offload_optimizer" else PARAMETER_BYTES
        path = block["nvme_path"]
        check_folder(path)
        needed[path] = needed.get(path, 0) + each * parameters // ranks

    load_library()

    for path, count in needed.items():
        with alone_in(Path(path)):
            check_room(Path(path), math.ceil(count * SWAP_ROOM) * read_launch().local_size)
            own_folder(path)

    return swap_in_folder(settings, lambda path: str(own_folder(path)))


def swap_in_folder(settings: dict[str, Any], folder: Callable[[str], str]) -> dict[str, Any]:
    """Return DeepSpeed's configuration with the folder of each nvme_path in its place."""
    zero = dict(settings["zero_optimization"])
    for name, block in blocks_on_disk(settings).items():
        zero[name] = {**block, "nvme_path": folder(block["nvme_path"])}

    return {**settings, "zero_optimization": zero}


def check_folder(path: str) -> None:
    """Raise UsageError if a folder for swap files does not exist or cannot be written to."""
    if not os.path.isdir(path):
        raise UsageError(
            f"nvme_path {path}: no such folder; give --nvme-path a folder on a disk of this machine"
        )

    check_writable(Path(path), "nvme_path")


def check_room(path: Path, needed: int) -> None:
    """Raise UsageError if a disk has fewer than `needed` bytes for the processes of this machine,
    not counting what runs that were killed have left there.
    """
    remove_leftovers(path)
    free = shutil.disk_usage(path).free

    if free < needed:
        raise UsageError(
            f"nvme_path {path}: {readable_size(free)} free, the optimizer's state and the"
            f" parameters that are offloaded there need {readable_size(needed)} on this machine;"
            " make room, or use more machines"
        )


@functools.cache
def own_folder(path: str) -> Path:
    """Make this process's folder in `path`; it is removed when the process ends, or, if that is
    killed, by the next run.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=path))
    except OSError as error:
        raise UsageError(f"nvme_path {path}: cannot be written ({error.strerror})") from error

    take_lock(open_folder(folder))
    at_end(lambda: shutil.rmtree(folder, ignore_errors=True))

    return folder


def remove_leftovers(path: Path) -> None:
    """Remove the swap folders of processes that were killed: nobody holds their locks."""
    for folder in path.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = open_folder(folder)
            try:
                if take_lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def load_library() -> None:
    """Build and load DeepSpeed's asynchronous I/O; processes of a machine build one at a time.

    A build that was killed leaves a lock of torch's on which the next one would wait for ever, so
    that is removed. A signal during the build ends this process, which has nothing to save. Raises
    UsageError if libaio or a compiler is missing, or if the build fails.
    """
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UsageError(
            "offload to nvme needs libaio and a C++ compiler to build DeepSpeed's I/O library"
            " (Debian, Ubuntu: apt-get install libaio-dev g++); install them, or offload to 'cpu'"
        )

    root = Path(torch.utils.cpp_extension._get_build_directory("async_io", verbose=False)).parent
    with handling((*STOPPING, signal.SIGINT), end_at_once), alone_in(root):
        for name in ("async_io", "pin_memory"):
            (root / name / "lock").unlink(missing_ok=True)

        if not (root / "async_io" / "async_io.so").exists():
            print(
                f"building DeepSpeed's I/O library in {root}, once, which takes some minutes",
                flush=True,
            )

        try:
            AsyncIOBuilder().load(verbose=False)
        except (RuntimeError, ImportError) as error:
            raise UsageError(
                f"DeepSpeed's I/O library in {root}: {first_problem(str(error))}; mend that, or"
                " offload to 'cpu'"
            ) from error


def first_problem(text: str) -> str:
    """Return the line of a build's output that says first what went wrong, else its last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), (lines or [""])[-1])


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, after waiting for the process that has it: of several that start
    at once, none takes what another has just made for what a killed one has left.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def swap_files(optimizer: Any) -> Iterator[tuple[Path, int]]:
    """Yield each swap file that DeepSpeed's stage-3 optimizer has written, and its full size."""
    if optimizer.params_in_nvme_and_cpu:
        of_parameters = optimizer.fp16_groups[0][0].nvme_swapper
        for number, path in of_parameters.id_to_path.items():
            count = of_parameters.param_id_to_numel[number]
            yield Path(path), of_parameters._io_aligned_numel(count) * PARAMETER_BYTES

    if not optimizer.swap_optimizer:
        return

    swapper = optimizer.optimizer_swapper
    element = swapper.swap_element_size
    for info in swapper.swap_params_info.values():
        whole = swapper._io_aligned_numel(info.numel()) * element
        for path in info.get_swap_paths():
            yield Path(path), whole
        for gradient in info.swapped_gradients.values():
            yield Path(gradient.path), gradient.length * element


def check_swap_files(optimizer: Any) -> None:
    """Wait until gradients are written, and raise TrainingStopped if a swap file is shorter than
    what was written to it: the disk was full, and the state on it is lost.
    """
    if optimizer.swap_optimizer:
        optimizer.optimizer_swapper.flush_gradients()

    for path, size in swap_files(optimizer):
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            folder = path.parents[3].parent
            free = readable_size(shutil.disk_usage(folder).free)
            error = TrainingStopped(
                f"{folder}: a swap file has {found} of {size} bytes, {free} free: the disk is full."
                " The state of this step is lost; make room and run the same command"
                " again to resume from the newest checkpoint"
            )
            error.local = True
            raise error
