"""Build a model split among data-parallel ranks (ZeRO stage 3): module by module, each parameter
split as soon as it exists, so that no rank ever holds the whole.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch

from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState


def sharded_model(
    make: Callable[[], InterBert],
    device: torch.device,
    state: ParallelState,
    settings: dict[str, Any],
) -> InterBert:
    """Build a model whose parameters, not filled, are where `settings`, DeepSpeed's configuration,
    places them: on the device, the host or an NVMe disk.

    Their dtype is that of `settings` too. It is not passed to DeepSpeed, which takes bfloat16 in
    its place on processors that cannot compute in float16.
    """
    with (
        local_rank(device.index or 0),
        torch.random.fork_rng(devices=[]),
        deepspeed.zero.Init(
            data_parallel_group=state.data_group,
            config_dict_or_path=settings,
            mpu=state,
        ),
    ):
        return make()


@contextlib.contextmanager
def local_rank(number: int) -> Iterator[None]:
    """Set LOCAL_RANK, which zero.Init takes for the number of the GPU: it is not where a process
    sees only its own.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(number)

    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
