"""Keep the progress of mining beside hard_negatives.npy, so that a killed command can be resumed
and gives the same table.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_interbert.data.manifest import HARD_NEGATIVES, MANIFEST
from megatron_interbert.data.neighbours import NoTable, read_neighbours
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, flush_folder, new_file, whole_file, write_json
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
# All that a work folder holds, in the order of removal: blocks before the plan that they belong to,
# and last the mark that all is done.
UNFINISHED = tuple(
    f"{name}{end}" for name in ("block-*.npy", PLAN, DONE) for end in (".tmp", ".partial")
)
OURS = (*BLOCKS, *UNFINISHED, ASSEMBLED, PLAN, DONE)


class MiningFolder:
    """Manage `hard_negatives.npy.partial` beside the output: the plan, a file for each finished
    block, and the table being assembled.

    One process at a time holds it. After a kill at any point, the same command resumes from it and
    gives the same table.
    """

    def __init__(self, store: RegionStore, options: dict[str, Any]) -> None:
        self.output = store.path / HARD_NEGATIVES
        self.path = store.path / f"{HARD_NEGATIVES}.partial"
        self.block = options["block"]
        self.top = options["top"]
        self.captions = store.num_captions
        self.plan = {
            "format": FORMAT,
            "store_sha256": file_sha256(store.path / MANIFEST),
            "captions": store.num_captions,
            **json.loads(json.dumps(options)),
        }
        self.blocks = -(-self.captions // self.block)

    def __enter__(self) -> "MiningFolder":
        self._lock: int | None = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def open(self, restart: bool) -> None:
        """Make the folder, or take over one with the same plan.

        Raises UsageError if it belongs to another plan or process.
        """
        self._lock = lock_folder(
            self.path, "another command is mining this store; wait until it has ended"
        )
        refuse_strangers(self.path, OURS)
        if restart:
            remove_own(self.path, OURS)

        if not (self.path / PLAN).exists():
            if own_names(self.path, BLOCKS):
                raise UsageError(
                    f"{self.path}: holds finished blocks without their {PLAN}; restore it, or give"
                    " --restart to discard them"
                )

            write_json(self.path / PLAN, self.plan)
            return

        found = read_json(self.path / PLAN, "mining plan")
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

    def rows_of(self, number: int) -> range:
        """Return the numbers of the captions of a block."""
        return range(number * self.block, min((number + 1) * self.block, self.captions))

    def read_block(self, number: int) -> np.ndarray | None:
        """Read the rows of a block; return None if it is missing or, with a note, damaged.

        Raises Unreadable if the system cannot read it.
        """
        path = self._block_path(number)

        try:
            with reading(path):
                rows = read_neighbours(path, len(self.rows_of(number)), self.captions)
            if rows.shape[1] != self.top or rows.dtype != np.int32:
                raise NoTable(
                    f"{rows.dtype} with {rows.shape[1]} columns, expected int32 with {self.top}"
                )
        except FileNotFoundError:
            return None
        except NoTable as error:
            print(f"note: {path}: {error}; it is computed again", file=sys.stderr, flush=True)
            return None

        return rows

    def write_block(self, number: int, rows: np.ndarray) -> None:
        """Write the rows of a finished block, [captions of the block, K]."""
        with whole_file(self._block_path(number)) as handle:
            np.save(handle, rows, allow_pickle=False)

    def _block_path(self, number: int) -> Path:
        return self.path / f"block-{number:06d}.npy"

    def assemble(self) -> np.ndarray:
        """Join all blocks to one file in the work folder; return it as a read-only memory map."""
        header = {
            "descr": np.dtype(np.int32).str,
            "fortran_order": False,
            "shape": (self.captions, self.top),
        }

        with new_file(self.path / ASSEMBLED) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            for number in range(self.blocks):
                block = self.read_block(number)
                if block is None:
                    raise UsageError(
                        f"{self._block_path(number)}: damaged since it was written; run the same"
                        " command again"
                    )

                handle.write(block.tobytes())

        return np.load(self.path / ASSEMBLED, mmap_mode="r", allow_pickle=False)

    def publish(self, summary: dict[str, Any]) -> None:
        """Rename the assembled table to the output, and remove the folder."""
        write_json(self.path / DONE, {"plan": self.plan, "summary": summary})
        os.replace(self.path / ASSEMBLED, self.output)
        flush_folder(self.output.parent)
        remove_folder(self.path, OURS)

    def published(self) -> dict[str, Any] | None:
        """Return the summary of the same command if it was killed after its table was in place, and
        remove the folder; else None.
        """
        refuse_link(self.path)

        if (
            not (self.path / DONE).is_file()
            or (self.path / ASSEMBLED).exists()
            or not self.output.exists()
        ):
            return None

        done = read_json(self.path / DONE, "mining summary")
        if done.get("plan") != self.plan or not isinstance(done.get("summary"), dict):
            return None

        remove_folder(self.path, OURS)

        return done["summary"]
