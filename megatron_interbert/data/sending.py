"""From the host to a device without the host waiting: by way of page-locked memory where that is a
GPU.

A copy out of ordinary memory waits until the driver has read it, and so for the work before it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_interbert.data.packing import PackedBatch


def send_batch(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Give the same batch on a device."""
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device)


def send_indexes(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Give int64 arrays of one dimension as tensors on a device; all travel in one copy."""
    joined = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        joined = joined.pin_memory()

    return joined.to(device, non_blocking=True).split([len(array) for array in arrays])
