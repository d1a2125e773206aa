"""Test weights that data-parallel ranks share: every reading gives the whole parameter, however
different the ranks' work, and no rank gathers more than it may.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_interbert.model.construction import on_meta
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.shared_weights import MeetingState, SharedWeights, unit_of
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.retrieval.job import score_matrix
from megatron_interbert.tasks.retrieval.pairs import Pairs, score_block
from tests.corpus import write_store
from tests.dist import run_on_ranks
from tests.tasks.test_retrieval import CPU, make, open_pairs, sizes


def share(whole: InterBert, state: ParallelState, most: int) -> tuple[InterBert, SharedWeights]:
    """Return a model with the weights of a whole one, shared by the data-parallel ranks."""
    model = on_meta(lambda: InterBert(sizes(), ("itm",), state=state)).eval()
    shared = SharedWeights(model, state, CPU, most, CPU)

    for name, parameter in whole.named_parameters():
        part = shared.parts[name]
        own = parameter.detach().reshape(-1)[len(part) * state.data_rank :][: len(part)]
        part[: len(own)] = own

    return model, shared


def works(pairs: Pairs, scorer: PairScorer, random: np.random.Generator, times: int) -> list:
    """Score some captions on some images, `times` times; return the scores."""
    found = []

    for _ in range(times):
        images = random.permutation(len(pairs.images))[: random.integers(1, 6)]
        captions = random.permutation(len(pairs.captions))[: random.integers(1, 6)]
        side = pairs.image_side(scorer, images, CPU)
        if random.random() < 0.5:
            found.append(scorer.encode_side(side, images=True))
        found.append(score_block(scorer, side, pairs.caption_side(scorer, captions, CPU), 7))

    return found


@torch.no_grad()
def work_differently(store: Path, tensor: int, most: int) -> None:
    """Let the ranks do a different amount of different work between what they do together."""
    state = ParallelState(tensor)
    pairs = open_pairs(store)
    whole = make(sizes(), state)
    model, shared = share(whole, state, most)
    meeting = MeetingState(state, shared)
    elements = [len(part) * state.data_size for part in shared.parts.values()]
    layer = max(
        sum(p.numel() for name, p in whole.named_parameters() if unit_of(name) == unit)
        for unit in {unit_of(name) for name, _ in whole.named_parameters()}
    )
    seen = []
    gather = shared._gather
    shared._gather = lambda unit: seen.append((unit, shared.gathered)) or gather(unit)

    for turn in range(3):
        times = (state.data_rank + turn) % state.data_size * 3  # one rank has nothing to do
        one, other = (np.random.default_rng((turn, state.data_rank)) for _ in range(2))
        found = works(pairs, PairScorer(model), one, times)
        for ours, theirs in zip(found, works(pairs, PairScorer(whole), other, times), strict=True):
            assert torch.equal(ours, theirs)

        assert meeting.gather(state.rank) == list(range(state.world_size))
        assert shared.gathered == 0
        ones = torch.ones(1)
        assert float(meeting.sum_over_data(ones)) == state.data_size
        meeting.barrier()

    assert max(gathered for _, gathered in seen) <= max(most, layer)
    assert sum(part.numel() for part in model.parameters()) * state.data_size == sum(elements)

    expected = score_matrix(PairScorer(whole), pairs, CPU, 40, state)
    count = len(seen)
    assert np.array_equal(score_matrix(PairScorer(model), pairs, CPU, 40, meeting), expected)
    again = [unit for unit, _ in seen[count:]]
    if most > sum(elements):
        assert len(again) == len(set(again)), "what fits stays gathered"
    elif most == 1:
        assert len(again) > len(set(again))


def with_every_limit(store: Path, tensor: int) -> None:
    for most in (1, 12_000, 1_000_000):
        work_differently(store, tensor, most)


@pytest.mark.parametrize(("ranks", "tensor"), [(3, 1), (4, 2)])
def test_ranks_with_different_work(store: Path, ranks: int, tensor: int) -> None:
    run_on_ranks(ranks, with_every_limit, store, tensor)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s", images=14)


def test_units_are_layers_and_parts_outside_of_the_stacks() -> None:
    found = {
        "interaction.layers.10.attention.qkv.weight": "interaction.layers.10",
        "text_stream.layers.0.norm.bias": "text_stream.layers.0",
        "text_embedding.word.weight": "text_embedding",
        "itm_head.bias": "itm_head",
    }
    assert {name: unit_of(name) for name in found} == found
