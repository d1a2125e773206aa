"""Lock the work folder of a build, and resume or remove what an earlier one left in it."""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_interbert.data.manifest import MANIFEST, PLAN, REPORT
from megatron_interbert.errors import UsageError
from megatron_interbert.files import take_lock, write_text
from megatron_interbert.preparation.building.store_writer import OURS as OF_STORES
from megatron_interbert.preparation.sharing import OURS as OF_SHARING
from megatron_interbert.preparation.work_folder import (
    lock_folder,
    own_names,
    refuse_strangers,
    remove_folder,
    remove_own,
)
from megatron_interbert.reading import read_json, read_text

# in the work folder: complaints about caption lines; written when images.db is complete
CAPTIONS_DONE = "captions.json"
FAILED = "failed.json"  # the reason why processes that share the build have to end
OF_BUILDS = ("shard-[0-9]*.h5.json", CAPTIONS_DONE, "images.db*", REPORT, FAILED)
# All that a work folder holds, in the order of removal: the plan, which marks it as a build, last.
UNFINISHED = tuple(
    f"{name}{end}" for name in (*OF_BUILDS, PLAN) for end in (".[0-9]*.new", ".partial")
)
RESULTS = (*OF_BUILDS, *UNFINISHED, *OF_STORES, PLAN)
OURS = (*RESULTS, *OF_SHARING)  # in the order of removal: claims hold until all else is gone


class BuildFolder:
    """Hold the locked work folder of a build, new or left behind by the same plan, as a context
    manager.

    A `shared` folder is that of several processes; `prepare` must then be called by one of them.
    """

    def __init__(
        self, work: Path, fingerprint: dict[str, Any], restart: bool, shared: bool = False
    ) -> None:
        self.work = work
        self.fingerprint = fingerprint
        self.restart = restart
        self.shared = shared

    def __enter__(self) -> "BuildFolder":
        if self.shared and self.restart:
            raise UsageError(
                f"--restart: several processes cannot start over together; remove {self.work} first"
            )

        try:
            self.handle = lock_folder(
                self.work,
                "another process is building there; wait for it or choose another --output",
                self.shared,
            )
        except OSError as error:
            raise UsageError(f"--output: cannot make {self.work} ({error})") from error

        if not self.shared:
            try:
                self.prepare()
            except BaseException:
                os.close(self.handle)
                raise

        return self

    def prepare(self) -> None:
        """Resume what the same plan has left, or begin; raise UsageError for another plan."""
        if self.shared and (self.work / PLAN).exists():
            self._refuse_other_plan()  # and touch nothing, for others may be at work
        else:
            self._resume_or_begin()

    def _resume_or_begin(self) -> None:
        """Resume what the same plan has left, or start over; raise UsageError for another plan."""
        refuse_strangers(self.work, OURS)
        remove_own(self.work, [name for name in RESULTS if name.endswith((".new", ".partial"))])
        plan = self.work / PLAN

        if not plan.exists() and own_names(self.work, RESULTS):
            raise UsageError(
                f"{self.work}: exists and is not an unfinished build of this tool; remove it or"
                " choose another --output"
            )

        if self.restart:
            remove_own(self.work, OURS)

        if plan.exists():
            self._refuse_other_plan()

        write_text(plan, json.dumps(self.fingerprint, indent=1))

    def _refuse_other_plan(self) -> None:
        before = read_json(self.work / PLAN, "plan of the build")
        if before != self.fingerprint:
            changed = [
                name for name, value in before.items() if self.fingerprint.get(name) != value
            ]
            raise UsageError(
                f"{self.work}: left by a build with other settings or inputs"
                f" ({', '.join(changed)} differ); give the same ones to resume it, or --restart to"
                " start over"
            )

    def __exit__(self, *failure: Any) -> None:
        useful = list(self.work.glob("shard-*.json")) or (self.work / MANIFEST).exists()
        if any(failure) and self.work.exists() and not useful and self._is_alone():
            remove_folder(self.work, OURS)  # it holds nothing to resume from
        os.close(self.handle)

    def _is_alone(self) -> bool:
        """Check whether no other process holds the folder."""
        try:
            return not self.shared or take_lock(self.handle)
        except OSError:
            return False


@contextlib.contextmanager
def disk_errors_in_one_line(work: Path) -> Iterator[None]:
    """Turn errors of the disk at any stage of a build (shards, captions, tokens, manifest, the last
    rename) into a one-line UsageError.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise UsageError(
            f"{work}: cannot be read or written ({error}); free disk space or fix permissions;"
            " finished shards are kept: the same command resumes"
        ) from error


def read_work_file(path: Path) -> Any:
    text = read_text(path, "unfinished build")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}: damaged ({error}); start the build over with --restart"
        ) from error
