"""All pairs of a store's images and captions, tile by tile: shared out over ranks, kept on disk,
resumed after a stop.

A tile is a run of captions (sorted by length) times a run of images. Memory holds one tile; disk
holds the scores, 4 bytes a pair, and a sum behind them. Data-parallel ranks take tiles in turn, the
ranks of a tensor-parallel group work on the same one.
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

PLAN = "plan.json"  # its hash is in the name of the folder, which is how we know ours again
FOLDER = re.compile("tiles-[0-9a-f]{16}")
OWN_FILE = re.compile(r"plan\.json(\.partial)?|scores-[0-9]{8,}-[0-9]{8,}\.(npy|[0-9]+\.new)")
SUM_BYTES = hashlib.sha256().digest_size


class ScoreTiles:
    """Tiles of [captions, images] in a folder of their own inside `parent`; a tile that is there is
    not scored again.

    `identity` says of what they are: other weights, data or settings have another folder. One
    evaluation at a time works in it; tiles that stopped evaluations have left and nobody works with
    are removed.
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
        """Give the folder back; the tiles stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _file(self, place: tuple[int, int]) -> Path:
        return self.folder / f"scores-{place[0]:08d}-{place[1]:08d}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """Give places (first caption, first image) of tiles that are not there yet, or not as they
        were written.
        """
        missing = together(self.state, lambda: self._look() if self.state.is_main else None)
        # what the first rank sees: all must agree on who does what
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
        """Give those that this rank scores."""
        return places[self.state.data_rank :: self.state.data_size]

    def write(self, place: tuple[int, int], scores: np.ndarray) -> None:
        """Write one finished tile; it appears whole."""
        if self.state.tensor_rank:
            return

        beside = self._file(place).with_suffix(f".{os.getpid()}.new")
        data = io.BytesIO()
        np.save(data, scores)
        with whole_file(self._file(place), beside) as handle:
            handle.write(self._with_sum(place, data.getvalue()))

    def extent(self, place: tuple[int, int]) -> tuple[slice, slice]:
        """Give captions and images of a tile."""
        return tuple(
            slice(p, min(p + t, s)) for p, t, s in zip(place, self.tile, self.shape, strict=True)
        )

    def pairs(self, place: tuple[int, int]) -> int:
        """Give pairs of a tile."""
        rows, columns = self.extent(place)
        return (rows.stop - rows.start) * (columns.stop - columns.start)

    def read(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Read all tiles: captions, images, scores."""
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
        """Give one tile; None where it is not there, or not as it was written."""
        file = self._file(place)

        try:
            with reading(file):
                content = file.read_bytes()
        except OSError:  # what `reading` lets through
            return None

        data = content[:-SUM_BYTES]
        if content != self._with_sum(place, data):
            return None

        return np.load(io.BytesIO(data), allow_pickle=False)

    def _with_sum(self, place: tuple[int, int], data: bytes) -> bytes:
        """Give a file's content; the sum also stands for the plan and the place, so that no tile
        passes for another.
        """
        return data + hashlib.sha256(b"%b %d %d " % (self.plan, *place) + data).digest()

    def remove(self) -> None:
        """Give all tiles, and the folder unless somebody else has put something there."""
        remove_own_files(self.folder)
        self.release()


def folder_name(plan: bytes) -> str:
    """Give the name of the folder for the tiles of a plan."""
    return f"tiles-{hashlib.sha256(plan).hexdigest()[:16]}"


def remove_left(folder: Path) -> None:
    """Remove what a stopped evaluation has left, unless somebody works with it.

    A link, or a folder that holds neither a plan of ours nor, as earlier versions left it, nothing
    but tiles, is somebody else's and is left alone.
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
    """Remove the files of our names, the plan last, and the folder where nothing else is in it."""
    with contextlib.suppress(OSError):
        for name in reversed(list_folder(folder)):
            if OWN_FILE.fullmatch(name):
                (folder / name).unlink()

        folder.rmdir()


def _locked(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed; None when somebody has it.

    OSError for a link, for what is no folder, and on a disk without locks.
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
    """Score some tiles.

    Rows and columns of the tiles are in the order of `by_length` and `by_regions`.
    """
    captions = pairs.by_length()
    images = pairs.by_regions()
    ready: tuple[int, Side] | None = None

    for top, left in places:
        rows, columns = tiles.extent((top, left))
        with local_errors():
            if ready is None or ready[0] != top:  # tiles of the same captions follow each other
                ready = top, pairs.caption_side(scorer, captions[rows], device)
            side = pairs.image_side(scorer, images[columns], device)

        scores = score_block(scorer, side, ready[1], pairs_per_batch)
        tiles.write((top, left), scores.cpu().numpy())
        progress(scores.numel())
