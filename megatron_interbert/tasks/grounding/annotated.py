"""Notice a region store that is given as the annotated boxes and is not."""

import numpy as np

from megatron_interbert.tasks.grounding.boxes import overlaps
from megatron_interbert.tasks.placing import Records
from megatron_interbert.tasks.two_stores import TwoStores

TRIED = 200  # samples whose right boxes are looked up
SAME = 0.9  # IoU from which two boxes are one, conventions and rounding aside


def note_on_annotated(records: Records, stores: TwoStores) -> str:
    """Return a note if the annotated store lacks most of the right boxes, else an empty text.

    Looks at the samples whose right boxes are known, at most TRIED of them.
    """
    known = records.known()
    rows = known[:: -(-len(known) // TRIED)] if known else []
    if not rows or stores.annotated is None:
        return ""

    alone = stores.apart()["_gt"]
    regions = alone.read(alone.columns_of(records.images[rows], stores))
    found = 0

    for row, boxes in zip(rows, np.split(regions.boxes, regions.offsets[1:-1]), strict=True):
        record = records.items[row]
        pixels = boxes * np.tile(record.size, 2)
        found += bool((overlaps(pixels, record.targets) >= SAME).any())

    if 2 * found >= len(rows):
        return ""

    return (
        f"note: {stores.annotated.path}: holds the right boxes of only {found} of {len(rows)}"
        " samples; expected the annotated boxes (is it the detected store, given as"
        " --annotated-path, or --max-regions too small for it?)"
    )
