"""Write weights in every known format, from any source, one tensor at a time, so that models larger
than memory can be converted.

An output folder is written under a temporary name and renamed, so it is complete or absent.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.files import publish_folder
from megatron_interbert.weights.foreign_targets import write_bert, write_official
from megatron_interbert.weights.huggingface_target import write_huggingface
from megatron_interbert.weights.output import Output, Progress
from megatron_interbert.weights.sharded_target import write_sharded
from megatron_interbert.weights.sources import WeightSource

TARGETS = {
    "sharded": write_sharded,
    "huggingface": write_huggingface,
    "official": write_official,
    "bert": write_bert,
}


def write_target(
    kind: str, output: Output, folder: Path, progress: Progress = lambda count: None
) -> None:
    """Write a folder in one of the formats in TARGETS.

    Raises UsageError, with nothing written, if the folder exists, the format cannot hold these
    weights, or the disk lacks room. `progress` is called with the bytes of each tensor written.
    """
    if folder.exists():
        raise UsageError(f"{folder}: exists already; remove it, or choose another --output")
    if kind != "bert" and output.source.kind == "bert":
        raise UsageError(
            f"{output.source.path}: BERT has no image side to write as '{kind}'; train from it by"
            " --init-from"
        )

    if kind in ("official", "bert"):
        refuse_what_they_lack(kind, output.source)

    if (
        kind in ("huggingface", "official")
        and "image_embedding.feature.weight" not in output.source.layouts
    ):
        raise UsageError(
            f"{output.source.path}: holds the text path alone (GLUE), not a whole '{kind}'"
            " model; write it as BERT: --to bert"
        )

    if kind == "sharded":
        output.source.config.check_tensor_parallel(output.tensor_parallel)
    elif output.tensor_parallel != 1:
        raise UsageError(
            f"--tensor-model-parallel-size {output.tensor_parallel}: only 'sharded' has one file"
            " per tensor-parallel rank; give --to sharded"
        )

    with _new_folder(folder, output.bytes() * (2 if kind == "official" else 1)) as work:
        TARGETS[kind](output, work, progress)


def refuse_what_they_lack(kind: str, source: WeightSource) -> None:
    """Raise UsageError for experts and shared layers, which these formats cannot hold."""
    if source.config.experts:
        raise UsageError(
            f"{source.path}: '{kind}' has no experts; give --to huggingface or --to sharded"
        )
    if source.config.share_layers:
        raise UsageError(
            f"{source.path}: '{kind}' has no shared layers; give --untie-layers, which copies them"
        )


@contextmanager
def _new_folder(folder: Path, size: int) -> Iterator[Path]:
    """Make a temporary folder that becomes `folder` at the end and is removed on any error;
    UsageError if `size` bytes do not fit on the disk.
    """
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free

    if free < size * 1.02:
        raise UsageError(
            f"{parent}: {free / 1e9:.2f} GB free, {size * 1.02 / 1e9:.2f} GB needed; make room or"
            " give another --output"
        )

    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=parent))
    try:
        os.chmod(work, 0o777 & ~_umask())
        yield work
        publish_folder(work, folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be written ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
