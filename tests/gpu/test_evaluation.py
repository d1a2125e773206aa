"""Test evaluations on a real GPU: no waits except for the scores, and precisions against float32.

Skipped without a CUDA device.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.precision import choose_precision
from megatron_interbert.tasks.retrieval.pairs import score_block
from tests.corpus import write_store
from tests.tasks.test_retrieval import open_pairs, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@torch.no_grad()
def test_pairs_are_scored_without_a_wait(tmp_path: Path, kernels: str) -> None:
    """Check scores in each precision against float32 on the CPU, and that after a first pass the
    host never waits.
    """
    device = torch.device("cuda")
    pairs = open_pairs(write_store(tmp_path / "s", images=14))
    rows = pairs.by_length()
    columns = pairs.by_regions()

    def block(model: InterBert, where: torch.device) -> torch.Tensor:
        scorer = PairScorer(model)
        return score_block(
            scorer,
            pairs.image_side(scorer, columns, where),
            pairs.caption_side(scorer, rows, where),
            50,
        )

    def make(where: torch.device) -> InterBert:
        model = InterBert(sizes(), ("itm",), kernels=choose_kernels(kernels, where))
        initialise(model, sizes(), 0, ParallelState())
        return model.eval().to(where)

    exact = block(make(torch.device("cpu")), torch.device("cpu")).numpy()
    for name, most in (("fp32", 1e-3), ("tf32", 0.05), ("bf16", 0.1)):
        precision = choose_precision(name, device)
        model = precision.convert(make(device))

        with precision.products():
            block(model, device)  # compiles kernels, allocates memory
            torch.cuda.set_sync_debug_mode("error")
            try:
                scores = block(model, device)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        off = np.sqrt(np.mean((scores.cpu().numpy() - exact) ** 2))
        assert off < most * exact.std(), name
