"""Take the images that some task is evaluated on out of training samples."""

from collections.abc import Callable, Collection, Sequence

from megatron_interbert.data.image_names import may_mean
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.task import Job


def image_names(records: Records) -> frozenset[str]:
    """Return the names of all images of records."""
    return frozenset(name for record in records.items for name in record.images)


def rows_without(
    names: Collection[str], images: Sequence[Collection[str]], files: str
) -> list[int]:
    """Return the samples, given the names of the images of each, that have no image with one of
    some names, in any spelling, nor one that might be such an image.

    Raises UsageError if there are none, naming the `files` of the samples.
    """
    gone = may_mean(names, {name for some in images for name in some})
    kept = [row for row, some in enumerate(images) if not gone.intersection(some)]
    if not kept:
        raise UsageError(
            f"{files}: every training sample has an image that is evaluated on or excluded; give"
            " other validation files, or another --exclude-images"
        )

    return kept


def leave_out(
    job: Job, make_set: Callable[[Records], TrainingSet], records: Records, names: Collection[str]
) -> list[str]:
    """Take the samples with images of some names out of a job's training samples, which `make_set`
    makes from records; return their ids.
    """
    kept = rows_without(names, [record.images for record in records.items], records.files)
    if len(kept) < len(records):
        job.samples = make_set(records.take(kept))

    lost = sorted(set(range(len(records))).difference(kept))

    return [records.items[row].id for row in lost]
