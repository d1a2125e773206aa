"""Keep the progress of mining beside the table that it makes, so that a killed command can be
resumed, processes on several machines can share the work, and the table is always the same.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.manifest import (
    CLUSTERS,
    HARD_IMAGES,
    HARD_NEGATIVES,
    content_sha256,
)
from megatron_interbert.data.neighbours import NoTable, read_neighbours
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import (
    encoded,
    file_sha256,
    flush_folder,
    json_text,
    new_file,
    own_name,
    whole_file,
)
from megatron_interbert.preparation.sharing import OURS as OF_SHARING
from megatron_interbert.preparation.sharing import PAUSE, Claims, Team, WorkIsOver, in_turn
from megatron_interbert.preparation.work_folder import (
    lock_folder,
    own_names,
    refuse_link,
    refuse_strangers,
    remove_folder,
    remove_own,
)
from megatron_interbert.reading import read_json, reading

FORMAT = 2
PLAN = "plan.json"
ASSEMBLED = "assembled.npy"
DONE = "done.json"
BLOCKS = ("block-" + 6 * "[0-9]" + "*.npy",)
MEANS = ("means-" + 6 * "[0-9]" + "*.npy",)  # of images, from which neighbours are found
# All that a work folder holds, in the order of removal: blocks before the plan that they belong to,
# and last the mark that all is done.
UNFINISHED = tuple(
    f"{name}{end}"
    for name in ("block-*.npy", "means-*.npy", ASSEMBLED, PLAN, DONE)
    for end in (".tmp", ".partial", ".[0-9]*.new")
)
OURS = (*BLOCKS, *MEANS, *UNFINISHED, ASSEMBLED, PLAN, DONE, *OF_SHARING)


class TableFolder:
    """Manage `OUTPUT.partial` beside a table of neighbours, int32 [rows, width] with numbers below
    `below`: the plan, a file for each finished block of rows, and the table being assembled.

    One process at a time holds it, or those of a team. After a kill at any point, the same command
    resumes from it and gives the same table.
    """

    def __init__(
        self, output: Path, plan: dict[str, Any], rows: int, width: int, block: int, below: int
    ) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.block = block
        self.rows = rows
        self.width = width
        self.below = below
        self.plan = {
            "format": FORMAT,
            "store_sha256": content_sha256(output.parent),
            **json.loads(json.dumps(plan)),
        }
        self.blocks = -(-rows // block)
        self._done: set[int] = set()
        self._damaged: set[int] = set()
        self._lock: int | None = None
        self._assembled = own_name(self.path / ASSEMBLED)

    def __enter__(self) -> "TableFolder":
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def open(self, restart: bool, shared: bool = False) -> None:
        """Make the folder, or take over one with the same plan; several processes may hold a
        `shared` one.

        Raises UsageError if it belongs to another plan or process.
        """
        if shared and restart:
            raise UsageError(
                f"--restart: several processes cannot start over together; remove {self.path} first"
            )

        self._lock = lock_folder(
            self.path, "another command is mining this store; wait until it has ended", shared
        )
        refuse_strangers(self.path, OURS)
        if restart:
            remove_own(self.path, OURS)

        plan = self.path / PLAN
        if not plan.exists():
            if own_names(self.path, BLOCKS):
                raise UsageError(
                    f"{self.path}: holds finished blocks without their {PLAN}; restore it, or give"
                    " --restart to discard them"
                )

            with whole_file(plan, own_name(plan)) as handle:
                handle.write(encoded(json_text(self.plan)))
            return

        found = read_json(plan, "mining plan")
        differing = [key for key in self.plan if found.get(key) != self.plan[key]]
        if differing:
            was, now = (
                ", ".join(f"{key} {plan.get(key)}" for key in differing)
                for plan in (found, self.plan)
            )
            raise UsageError(
                f"{self.path}: unfinished work with {was}, now {now}; give the same options again,"
                " or --restart to discard that work"
            )

    def missing(self) -> list[int]:
        """Return the blocks that are still to be made."""
        self._done |= {
            number
            for number in range(self.blocks)
            if number not in self._done and self.read_block(number) is not None
        }

        return [number for number in range(self.blocks) if number not in self._done]

    def complete(self, make: Callable[[range], np.ndarray], claims: Claims | None = None) -> None:
        """Make the rows of all blocks that are missing; those that others have taken by their
        `claims` are waited for.
        """
        names = {number: f"block-{number:06d}" for number in range(self.blocks)}

        def make_block(number: int) -> None:
            self.write_block(number, make(self.rows_of(number)))

        complete(names, self.missing, make_block, claims)

    def rows_of(self, number: int) -> range:
        """Return the numbers of the rows of a block."""
        return range(number * self.block, min((number + 1) * self.block, self.rows))

    def read_block(self, number: int) -> np.ndarray | None:
        """Read the rows of a block; return None if it is missing or, with a note, damaged.

        Raises Unreadable if the system cannot read it.
        """
        path = self._block_path(number)

        try:
            with reading(path):
                rows = read_neighbours(path, len(self.rows_of(number)), self.below)
            if rows.shape[1] != self.width or rows.dtype != np.int32:
                raise NoTable(
                    f"{rows.dtype} with {rows.shape[1]} columns, expected int32 with {self.width}"
                )
        except FileNotFoundError:
            return None
        except NoTable as error:
            if number not in self._damaged:
                print(f"note: {path}: {error}; it is computed again", file=sys.stderr, flush=True)
            self._damaged.add(number)
            return None

        return rows

    def write_block(self, number: int, rows: np.ndarray) -> None:
        """Write the rows of a finished block, [rows of the block, width]."""
        path = self._block_path(number)
        with whole_file(path, own_name(path)) as handle:
            np.save(handle, rows, allow_pickle=False)

    def _block_path(self, number: int) -> Path:
        return self.path / f"block-{number:06d}.npy"

    def assemble(self) -> np.ndarray:
        """Join all blocks to one file in the work folder; return it as a read-only memory map."""
        header = {
            "descr": np.dtype(np.int32).str,
            "fortran_order": False,
            "shape": (self.rows, self.width),
        }

        with new_file(self._assembled) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for number in range(self.blocks):
                block = self.read_block(number)
                if block is None:
                    raise UsageError(
                        f"{self._block_path(number)}: damaged since it was written; run the same"
                        " command again"
                    )

                handle.write(block.tobytes())

        return np.load(self._assembled, mmap_mode="r", allow_pickle=False)

    def publish(self, summary: dict[str, Any]) -> None:
        """Rename the assembled table to the output, and remove the folder."""
        done = {
            "plan": self.plan,
            "summary": summary,
            "sha256": file_sha256(self._assembled),
        }
        path = self.path / DONE
        with whole_file(path, own_name(path)) as handle:
            handle.write(encoded(json_text(done)))

        os.replace(self._assembled, self.output)
        flush_folder(self.output.parent)
        remove_folder(self.path, OURS)

    def published(self) -> dict[str, Any] | None:
        """Return the summary of the same command if it was killed after its table was in place, and
        remove the folder; else None.
        """
        refuse_link(self.path)
        if not (self.path / DONE).is_file() or not self.output.exists():
            return None

        done = read_json(self.path / DONE, "mining summary")
        if done.get("plan") != self.plan or not isinstance(done.get("summary"), dict):
            return None
        if done.get("sha256") != file_sha256(self.output):
            return None  # it was killed before

        remove_folder(self.path, OURS)

        return done["summary"]

    def is_over(self) -> bool:
        """Check whether another process of the team has finished the work."""
        return not (self.path / PLAN).exists()


class MiningFolder(TableFolder):
    """Manage the work on hard_negatives.npy of a store."""

    def __init__(self, store: RegionStore, options: dict[str, Any]) -> None:
        captions = store.num_captions
        super().__init__(
            store.path / HARD_NEGATIVES,
            {"captions": captions, **options},
            captions,
            options["top"],
            options["block"],
            captions,
        )


class NeighbourFolder(TableFolder):
    """Manage the work on hard_images.npy of a store."""

    def __init__(self, store: RegionStore, neighbours: int, block: int) -> None:
        images = store.num_images
        super().__init__(
            store.path / HARD_IMAGES,
            {"images": images, "neighbours": neighbours, "block": block},
            images,
            neighbours,
            block,
            images,
        )


class ClusterFolder(TableFolder):
    """Manage the work on clusters.npy of a store; `centroids` is the sha256 of theirs."""

    def __init__(self, store: RegionStore, centroids: str, count: int, block: int) -> None:
        regions = int(store.region_counts().sum())
        plan = {"regions": regions, "centroids": centroids, "block": block}
        super().__init__(store.path / CLUSTERS, plan, regions, 1, block, count)


def complete(
    names: dict[int, str],
    missing: Callable[[], list[int]],
    make: Callable[[int], None],
    claims: Claims | None,
) -> None:
    """Make the numbered things that are missing, each claimed by its name if others may make it
    too; wait for what others have claimed.
    """
    while left := missing():
        for number in in_turn(left, claims.team) if claims else left:
            if claims is None or (claims.take(names[number]) and number in missing()):
                make(number)

        if claims and missing():
            time.sleep(PAUSE)


def finish_together(
    folder: TableFolder, finish: Callable[[Callable[[], bool]], Any], claims: Claims | None
) -> Any | None:
    """Let one of the processes finish a table; return what `finish` returns, None in the others.

    `finish` is called with a function that checks whether this process may still publish.
    """
    if claims is None:
        return finish(lambda: True)

    while not claims.take("finish"):
        time.sleep(PAUSE)

    return None if folder.is_over() else finish(lambda: claims.take("finish"))


def work_on(
    folder: TableFolder,
    team: Team,
    restart: bool,
    overwrite: bool,
    work: Callable[[Claims | None], dict[str, Any] | None],
) -> dict[str, Any] | None:
    """Do the work on a table, alone or with a team, unless the same command has just done it;
    return its summary, None in processes that have not finished it.

    Raises UsageError if there is a table that must not be replaced, or the disk fails.
    """
    try:
        with folder:
            summary = None if restart else folder.published()
            if summary is not None:
                return summary
            if folder.output.exists() and team.has_made(folder.output):
                return None  # the others were faster
            if folder.output.exists() and not overwrite:
                raise UsageError(f"{folder.output}: already exists; give --overwrite to replace it")

            folder.open(restart, team.is_shared)
            with Claims(folder.path, team) if team.is_shared else nullcontext() as claims:
                return work(claims)
    except WorkIsOver:
        return None
    except OSError as error:
        if team.is_shared and folder.is_over():
            return None
        raise UsageError(
            f"{folder.path}: cannot be written ({error}); free disk space or make the store"
            " writable"
        ) from error
