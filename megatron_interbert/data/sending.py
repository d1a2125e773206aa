"""Send batches to a device without making the host wait: for a GPU, through pinned memory.

A copy from pageable memory makes the host wait until the driver has read it, and so for the work
queued before it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_interbert.data.packing import PackedBatch


def send_batch(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the batch on a device."""
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device)


def send_indexes(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return one-dimensional int64 arrays as tensors on a device, sent in a single copy."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()

    return joined.to(device, non_blocking=True).split([len(array) for array in arrays])
