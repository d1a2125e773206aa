"""Score all pairs of a store's images and captions tile by tile: distributed over ranks, kept on
disk, resumable after a stop.

A tile is a run of captions (sorted by length) times a run of images (sorted by regions). Memory
holds one tile; disk holds the scores, 4 bytes per pair, followed by a checksum. Data-parallel ranks
take tiles in turn; the ranks of a tensor-parallel group work on the same one.
"""

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_interbert.errors import TrainingStopped, UsageError, local_errors
from megatron_interbert.files import open_folder, take_lock, whole_file, write_bytes
from megatron_interbert.model.pair_scorer import PairScorer, Side
from megatron_interbert.parallel.agreement import some, together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import list_folder, reading
from megatron_interbert.tasks.retrieval.pairs import Pairs, score_block

PLAN = "plan.json"  # its hash is in the folder's name, by which we recognise our own folders
FOLDER = re.compile("tiles-[0-9a-f]{16}")
OWN_FILE = re.compile(r"plan\.json(\.partial)?|scores-[0-9]{8,}-[0-9]{8,}\.(npy|[0-9]+\.new)")
SUM_BYTES = hashlib.sha256().digest_size


class ScoreTiles:
    """Hold the tiles of scores [captions, images] in a folder of their own inside `parent`.

    A sound tile on disk is not scored again. `identity` describes what the scores depend on: other
    weights, data or settings get another folder. One evaluation at a time works in a folder; tiles
    in other folders, left by stopped evaluations and not in use, are removed.
    """

    def __init__(
        self,
        parent: Path,
        shape: tuple[int, int],
        tile: tuple[int, int],
        identity: dict,
        state: ParallelState | None = None,
    ) -> None:
        self.shape = shape
        self.tile = tile
        self.state = state or ParallelState()
        plan = {"shape": list(shape), "tile": list(tile), "identity": identity}
        self.plan = json.dumps(plan, sort_keys=True).encode()
        self.folder = parent / folder_name(self.plan)
        self._lock: int | None = None
        together(self.state, lambda: self._claim(parent) if self.state.is_main else None)
        self.places = [
            (top, left)
            for top in range(0, shape[0], tile[0])
            for left in range(0, shape[1], tile[1])
        ]

    def _claim(self, parent: Path) -> None:
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise UsageError(
                f"{self.folder}: expected a folder of tiles, found something else, which is left"
                " alone; remove it, or give another --output"
            )

        self._lock = _locked(self.folder)
        if self._lock is None:
            raise UsageError(
                f"{self.folder}: the same evaluation is running there; wait for it, or give another"
                " --output"
            )

        write_bytes(self.folder / PLAN, self.plan)

        for name in list_folder(parent):
            if FOLDER.fullmatch(name) and name != self.folder.name:
                remove_left(parent / name)

    def release(self) -> None:
        """Release the lock of the folder; the tiles stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _file(self, place: tuple[int, int]) -> Path:
        return self.folder / f"scores-{place[0]:08d}-{place[1]:08d}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """Return the places (first caption, first image) of tiles that are missing or damaged, the
        same on all ranks.
        """
        missing = together(self.state, lambda: self._look() if self.state.is_main else None)
        # as rank 0 sees it: all ranks must agree on who does what
        return self.state.gather(missing)[0]

    def _look(self) -> list[tuple[int, int]]:
        missing = [place for place in self.places if self._scores(place) is None]
        again = [self._file(place).name for place in missing if self._file(place).exists()]
        if again:
            print(
                f"{self.folder}: tiles that are damaged or of an earlier version are scored again:"
                f" {some(again)}",
                flush=True,
            )

        return missing

    def share(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the places that this rank scores."""
        return places[self.state.data_rank :: self.state.data_size]

    def write(self, place: tuple[int, int], scores: np.ndarray) -> None:
        """Write a finished tile, atomically."""
        if self.state.tensor_rank:
            return

        beside = self._file(place).with_suffix(f".{os.getpid()}.new")
        data = io.BytesIO()
        np.save(data, scores)
        with whole_file(self._file(place), beside) as handle:
            handle.write(self._with_sum(place, data.getvalue()))

    def extent(self, place: tuple[int, int]) -> tuple[slice, slice]:
        """Return the captions and the images of a tile, as slices."""
        return tuple(
            slice(p, min(p + t, s)) for p, t, s in zip(place, self.tile, self.shape, strict=True)
        )

    def pairs(self, place: tuple[int, int]) -> int:
        """Return the number of pairs in a tile."""
        rows, columns = self.extent(place)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def read(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Yield (captions, images, scores) of each tile.

        Raises TrainingStopped if a tile has changed since it was written.
        """
        for place in self.places:
            with local_errors():
                scores = self._scores(place)
                if scores is None:
                    raise TrainingStopped(
                        f"{self._file(place)}: has changed since it was written; repeat the command"
                        " to score it again"
                    )

            yield *self.extent(place), scores

    def _scores(self, place: tuple[int, int]) -> np.ndarray | None:
        """Return the scores of one tile; None if it is missing or damaged."""
        file = self._file(place)

        try:
            with reading(file):
                content = file.read_bytes()
        except OSError:  # missing: `reading` turns other errors into UsageError
            return None

        data = content[:-SUM_BYTES]
        if content != self._with_sum(place, data):
            return None

        return np.load(io.BytesIO(data), allow_pickle=False)

    def _with_sum(self, place: tuple[int, int], data: bytes) -> bytes:
        """Return a file's content: the data and a checksum that also covers the plan and the place,
        so that no tile passes for another.
        """
        return data + hashlib.sha256(b"%b %d %d " % (self.plan, *place) + data).digest()

    def remove(self) -> None:
        """Remove all tiles, and the folder unless it holds anything else."""
        remove_own_files(self.folder)
        self.release()


def folder_name(plan: bytes) -> str:
    """Return the name of the folder for the tiles of a plan."""
    return f"tiles-{hashlib.sha256(plan).hexdigest()[:16]}"


def remove_left(folder: Path) -> None:
    """Remove what a stopped evaluation has left, unless another process is using it.

    A folder is ours if it holds its own plan or, from earlier versions, nothing but tiles. Links
    and all other folders are left alone.
    """
    with contextlib.suppress(OSError):
        handle = _locked(folder)
        if handle is None:
            return
        try:
            names = list_folder(folder)
            only_tiles = PLAN not in names and all(map(OWN_FILE.fullmatch, names))
            if only_tiles or folder_name((folder / PLAN).read_bytes()) == folder.name:
                remove_own_files(folder)
        finally:
            os.close(handle)


def remove_own_files(folder: Path) -> None:
    """Remove files with our names, the plan last, and then the folder if it is empty."""
    with contextlib.suppress(OSError):
        for name in reversed(list_folder(folder)):
            if OWN_FILE.fullmatch(name):
                (folder / name).unlink()

        folder.rmdir()


def _locked(folder: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed; None if another process has the lock.

    Raises OSError if the path is a link or not a folder, or the disk has no locks.
    """
    handle = open_folder(folder)

    try:
        taken = take_lock(handle)
    except OSError:
        os.close(handle)
        raise

    if not taken:
        os.close(handle)
        return None

    return handle


def fill(
    tiles: ScoreTiles,
    places: list[tuple[int, int]],
    pairs: Pairs,
    scorer: PairScorer,
    device: torch.device,
    pairs_per_batch: int,
    progress: Callable[[int], None] = lambda pairs: None,
) -> None:
    """Score some tiles and write them.

    Their rows and columns are in the order of `by_length` and `by_regions`.
    """
    captions = pairs.by_length()
    images = pairs.by_regions()
    ready: tuple[int, Side] | None = None

    for top, left in places:
        rows, columns = tiles.extent((top, left))
        with local_errors():
            if ready is None or ready[0] != top:  # tiles with the same captions are consecutive
                ready = top, pairs.caption_side(scorer, captions[rows], device)
            side = pairs.image_side(scorer, images[columns], device)

        scores = score_block(scorer, side, ready[1], pairs_per_batch)
        tiles.write((top, left), scores.cpu().numpy())
        progress(scores.numel())
