"""Notice a store given as --annotated-path that does not hold the annotated boxes."""

import math

import numpy as np

from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.two_stores import TwoStores

TRIED = 200  # samples whose right boxes are looked up
SAME = 0.9  # least IoU of boxes of 20 pixels or more that differ by conventions and rounding only


def note_on_annotated(records: Records, stores: TwoStores) -> str:
    """Return a note if the annotated store lacks most of the right boxes, else an empty text.

    Looks at TRIED of the samples whose right boxes are known, or somewhat fewer.
    """
    known = records.known()
    rows = known[:: max(1, math.ceil(len(known) / TRIED))]
    if not rows or stores.annotated is None:
        return ""

    alone = TwoStores(stores.annotated, None, stores.max_regions)
    regions = alone.read(alone.columns_of(records.images[rows], stores))
    found = 0

    for row, boxes in zip(rows, np.split(regions.boxes, regions.offsets[1:-1]), strict=True):
        record = records.items[row]
        pixels = boxes * np.tile(record.size, 2)
        found += bool((overlaps(pixels, record.targets) >= SAME).any())

    if 2 * found >= len(rows):
        return ""

    return (
        f"note: {stores.annotated.path}: has a right box for only {found} of {len(rows)} samples"
        " looked at, so these do not look like annotated boxes; check that the stores of annotated"
        " and of detected regions are not swapped, and that --max-regions is large enough"
    )
