"""Test weights that data-parallel ranks share: every reading gives the whole parameter, however
different the ranks' work, and no rank gathers more than it may.
"""

import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_interbert.model.construction import on_meta
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel import shared_weights
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


class Observed:
    """Note each unit that is gathered, and check what else is in memory then."""

    def __init__(self, shared: SharedWeights, largest: int) -> None:
        self.units: list[str] = []
        self.gather = shared._gather
        self.shared = shared
        self.most = max(shared.most, largest)
        self.whole: list[weakref.ref] = []
        shared._gather = self

    def __call__(self, unit: str) -> dict[str, torch.Tensor]:
        assert self.shared.gathered <= self.most
        kept = {id(t) for unit in self.shared._gathered.values() for t in unit.values()}
        others = [t for ref in self.whole if (t := ref()) is not None and id(t) not in kept]
        assert not others, "a unit for another rank is gone before the next is gathered"

        self.units.append(unit)
        found = self.gather(unit)
        self.whole += map(weakref.ref, found.values())

        return found


@torch.no_grad()
def work_differently(store: Path, tensor: int, most: int) -> None:
    """Let the ranks do a different amount of different work between what they do together."""
    state = ParallelState(tensor)
    pairs = open_pairs(store)
    whole = make(sizes(), state)
    model, shared = share(whole, state, most)
    meeting = MeetingState.of(state, shared)
    units = Counter()
    for name, parameter in whole.named_parameters():
        units[unit_of(name)] += parameter.numel()
    seen = Observed(shared, max(units.values()))

    for turn in range(3):
        times = (state.data_rank + turn) % state.data_size * 2  # one rank has nothing to do
        one, other = (np.random.default_rng((turn, state.data_rank)) for _ in range(2))
        found = works(pairs, PairScorer(model), one, times)
        for ours, theirs in zip(found, works(pairs, PairScorer(whole), other, times), strict=True):
            assert torch.equal(ours, theirs)

        assert meeting.gather(state.rank) == list(range(state.world_size))
        ones = torch.ones(1)
        assert float(meeting.sum_over_data(ones)) == state.data_size
        meeting.barrier()
        shared.drop()

    parts = sum(part.numel() for part in model.parameters())
    elements = sum(units.values())
    assert elements <= parts * state.data_size < elements + state.data_size * len(shared.parts)

    expected = score_matrix(PairScorer(whole), pairs, CPU, 40, state)
    before = len(seen.units)
    assert np.array_equal(score_matrix(PairScorer(model), pairs, CPU, 40, meeting), expected)
    again = seen.units[before:]
    if most > elements:
        assert len(again) == len(set(again)), "what fits stays gathered"
    else:
        assert len(again) > len(set(again))


def with_every_limit(store: Path, tensor: int) -> None:
    for most in (1, 15_000, 1_000_000):
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


def test_what_is_needed_again_last_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read ten layers in turn with room for nine: two are gathered again each time, not all."""
    monkeypatch.setattr(shared_weights, "start_gather", lambda part, group: (part, Done()))
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3, device="meta") for _ in range(10))
    model = torch.nn.ModuleDict({"stack": model})
    shared = SharedWeights(model, ParallelState(), CPU, most=9 * 12, kept_on=CPU)
    seen = Observed(shared, 12)

    for _ in range(5):
        for layer in model["stack"].layers:
            assert layer.weight.shape == (3, 3)
            assert layer.bias.shape == (3,)

    assert len(seen.units) == 10 + 4 * 2


class Done:
    """Stand in for work of a collective that is done."""

    def wait(self) -> None:
        pass


def test_models_that_cannot_be_shared() -> None:
    tied = torch.nn.Sequential(*(torch.nn.Linear(3, 3, device="meta") for _ in range(2)))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="belongs to two modules"):
        SharedWeights(tied, ParallelState(), CPU, 1, CPU)

    without = torch.nn.Linear(3, 3, bias=False, device="meta")
    assert list(SharedWeights(without, ParallelState(), CPU, 1, CPU).parts) == ["weight"]
    assert without.bias is None
