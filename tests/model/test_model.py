"""Sizes, partition table, first weights, packing invariance, text-only input, recomputation."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_interbert.data.packing import Example, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.kernels.products import PlainProducts, WideProducts
from megatron_interbert.model.embeddings import image_features
from megatron_interbert.model.flops import training_flops
from megatron_interbert.model.initialise import initialise, load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import (
    TABLE,
    is_expert,
    partition_dimension,
    partition_kind,
    shard,
    unshard,
    unshard_state,
)
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.weights.foreign import fuse_qkv, split_qkv
from tests.dist import run_on_ranks
from tests.readings import Readings
from tests.sizes import SMALL

HEADS = ("msm", "mrm", "itm", "choice")


def make(config=SMALL, heads=HEADS, **options):
    model = InterBert(config, heads, **options)
    initialise(model, config, 3, ParallelState())
    return model


def examples(count=4, seed=0):
    random = np.random.default_rng(seed)
    result = []

    for i in range(count):
        tokens = int(random.integers(3, 12))
        regions = int(random.integers(1, 9))
        result.append(
            Example(
                token_ids=random.integers(0, 150, tokens),
                token_types=np.zeros(tokens, np.int64),
                features=random.normal(size=(regions, 20)).astype(np.float16),
                locations=random.random((regions, 5), dtype=np.float32),
                class_ids=random.integers(0, 9, (regions, 1)),
                class_probs=np.ones((regions, 1), np.float32),
                hidden_regions=random.random(regions) < 0.5,
                msm_positions=np.array([1, 2]),
                msm_labels=random.integers(0, 150, 2),
                mismatched=i % 2,
            )
        )

    return result


def test_official_size_is_157_million():
    with torch.device("meta"):
        model = InterBert(PRESETS["base"])
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * (
        model.config.hidden_size + 1
    )
    assert round((sum(p.numel() for p in model.parameters()) - padding) / 1e5) == 1570


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_exactly_one_row_in_the_partition_table(preset):
    config = dataclasses.replace(PRESETS[preset], vocab_size=300, feature_dim=8, num_classes=5)
    with torch.device("meta"):
        model = InterBert(config, HEADS)

    import re

    for name, parameter in model.named_parameters():
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in TABLE) == 1, name
        cut = partition_dimension(name) is not None and not is_expert(name)
        assert hasattr(parameter, "tensor_model_parallel") == cut, name


def test_a_parameter_without_a_row_fails():
    with pytest.raises(KeyError, match=r"no row in model/partition\.py"):
        partition_kind("interaction.layers.0.new.weight")


def check_shapes_follow_the_table():
    state = ParallelState(2)
    whole = make()
    part = InterBert(SMALL, HEADS, state=state)
    initialise(part, SMALL, 3, state)

    for (name, full), (other, local) in zip(
        whole.named_parameters(), part.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(shard(full, name, state.tensor_rank, 2), local), (
            f"{name}: first weights must not depend on the layout"
        )


def test_shards_are_what_the_table_says():
    run_on_ranks(2, check_shapes_follow_the_table)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharding_and_back(ranks):
    full = {name: p.detach() for name, p in make().named_parameters()}
    states = [
        {name: shard(t, name, rank, ranks) for name, t in full.items()} for rank in range(ranks)
    ]
    back = unshard_state(states)
    assert all(torch.equal(back[name], full[name]) for name in full)
    assert unshard([full["itm_head.weight"]] * ranks, "itm_head.weight") is full["itm_head.weight"]


def test_head_major_qkv():
    parts = [torch.randn(12, 5) for _ in range(3)]
    fused = fuse_qkv(parts, 4)
    assert torch.equal(fused[:3], parts[0][:3])  # query of head 0
    assert torch.equal(fused[3:6], parts[1][:3])
    assert torch.equal(fused[9:12], parts[0][3:6])  # query of head 1
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(fused, 4), parts, strict=True))


def test_initialisation():
    model = make()
    weights = dict(model.named_parameters())
    assert weights["text_embedding.word.weight"][150:].abs().sum() == 0
    assert abs(weights["text_embedding.word.weight"][:150].std().item() - 0.02) < 0.001
    assert (weights["interaction.layers.0.mlp_norm.weight"] == 1).all()
    assert (weights["interaction.layers.0.mlp_norm.linear_bias"] == 0).all()
    assert not torch.equal(
        weights["interaction.layers.0.attention.qkv.weight"],
        weights["interaction.layers.1.attention.qkv.weight"],
    )


def test_a_sample_does_not_feel_its_neighbours():
    model = make().eval()
    batch = examples(5)
    together = model(pack(batch, 20), everything=True)
    text = 0
    image = 0

    for i, example in enumerate(batch):
        alone = model(pack([example], 20), everything=True)
        n = len(example.token_ids)
        m = len(example.features) + 1
        torch.testing.assert_close(
            together.text_hidden[text : text + n], alone.text_hidden, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            together.image_hidden[image : image + m], alone.image_hidden, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            together.itm_logits[i : i + 1], alone.itm_logits, rtol=1e-4, atol=1e-5
        )
        text = text + n
        image = image + m


def test_the_last_layer_where_it_is_read_equals_the_whole_one():
    """The fast pass and the one that gives everything: pooled vectors, logits, losses, and the
    gradients of all parameters.
    """
    model = make(heads=("msm", "mrm", "itm")).eval()
    batch = pack(examples(5), 20)
    fast = model(batch)
    whole = model(batch, everything=True)
    words = whole.msm_logits[:, :150]
    assert torch.equal(fast.msm_right, words.argmax(1) == batch.msm_labels)
    losses = F.cross_entropy(words, batch.msm_labels, reduction="none")

    for ours, theirs in (
        (fast.msm_losses, losses),
        (fast.mrm_logits, whole.mrm_logits),
        (fast.itm_logits, whole.itm_logits),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    totals = [
        a.sum() + o.mrm_logits.square().sum() + o.itm_logits.square().sum()
        for a, o in ((fast.msm_losses, fast), (losses, whole))
    ]
    gradients = [torch.autograd.grad(total, list(model.parameters())) for total in totals]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hidden_regions_count_as_zeros_in_the_mean():
    example = examples(1)[0]
    example.hidden_regions = np.arange(len(example.features)) == 0
    features = image_features(pack([example], 20), torch.float32, Kernels())
    shown = example.features.astype(np.float32)
    shown[0] = 0
    torch.testing.assert_close(features[1:], torch.from_numpy(shown))
    torch.testing.assert_close(features[0], torch.from_numpy(shown.mean(axis=0)))


def test_text_only_batches_and_mixtures():
    model = make().eval()
    texts = [Example(token_ids=e.token_ids, token_types=e.token_types) for e in examples(3)]
    alone = model(pack(texts, 20))
    assert alone.pooled_image is None
    assert alone.itm_logits is None
    mixed = InterBert(SMALL, ("msm",))
    mixed.load_state_dict(model.state_dict(), strict=False)
    both = mixed.eval()(pack([texts[0], examples(3)[1], texts[2]], 20))
    torch.testing.assert_close(
        both.pooled_text[[0, 2]], alone.pooled_text[[0, 2]], rtol=1e-4, atol=1e-5
    )


def test_no_target_of_any_kind_gives_zero_and_not_nan():
    batch = pack(
        [
            dataclasses.replace(
                e,
                hidden_regions=np.zeros(len(e.features), bool),
                msm_positions=np.zeros(0, np.int64),
                msm_labels=np.zeros(0, np.int64),
            )
            for e in examples(3)
        ],
        20,
    )
    model = make(heads=("msm", "mrm", "itm"))
    loss, report = PretrainingTask().loss(model(batch), batch, batch.target_counts())
    loss.backward()
    assert torch.isfinite(loss)
    assert report[:2].abs().sum() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_recomputation_changes_nothing():
    batch = pack(examples(4), 20)
    results = []

    for recompute in (False, True):
        streams = RandomStreams(5)
        model = make(heads=("msm", "mrm", "itm"), streams=streams, recompute=recompute)
        streams.start_step(1)
        loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts())
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))

    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_pass_hands_nothing_back_to_the_host():
    batch = pack(examples(4), 20)
    for kernels in (
        Kernels(),
        choose_kernels("auto", torch.device("cpu"), True, dtype=torch.bfloat16),
    ):
        model = make(heads=("msm", "mrm", "itm"), kernels=kernels)
        with Readings() as readings:
            loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts())
            loss.backward()

        assert not readings.found
        with readings:
            loss.item()

        assert readings.found


class RowsOfProducts(TorchDispatchMode):
    """The numbers of rows that products with the layers' weights have."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            x, weight = arguments[-2:]
            of_layer = {*weight.shape} <= {
                SMALL.hidden_size,
                SMALL.ffn_hidden_size,
                3 * SMALL.hidden_size,
            }
            if of_layer and len(x) > SMALL.ffn_hidden_size:
                self.found.add(len(x))

        return operation(*arguments, **(keywords or {}))


def test_rows_are_filled_up_and_change_nothing():
    """16 ragged batches in float64: results and gradients are equal, and there are few numbers of
    rows.
    """
    config = SMALL.without_dropout()
    models = [make(config, kernels=Kernels(row_multiple=multiple)).double() for multiple in (1, 32)]
    numbers = []

    for seed in range(16):
        batch = pack(examples(count=12, seed=seed), 20)
        found = []

        for model in models:
            with RowsOfProducts() as rows:
                output = model(batch)

            loss = sum(
                part.double().sum()
                for part in output
                if part is not None and part.is_floating_point()
            )
            found.append(
                [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]
            )
            numbers.append(rows.found)

        for plain, filled in zip(*found, strict=True):
            torch.testing.assert_close(filled, plain, rtol=1e-9, atol=1e-12)

    by_tokens = set().union(*numbers[::2])
    by_multiples = set().union(*numbers[1::2])
    assert len(by_multiples) <= 6 < len(by_tokens), (by_multiples, by_tokens)


def test_wide_products_are_as_near_to_float32_as_plain_ones():
    """A bf16 model with the products of each kind: the distance of its gradients to those of the
    same weights in float32.
    """
    config = SMALL.without_dropout()
    batch = pack(examples(count=8, seed=1), 20)
    task = PretrainingTask()
    weights = {name: value.bfloat16() for name, value in make(config).state_dict().items()}
    found = {}

    for name, dtype, products in (
        ("whole", torch.float32, PlainProducts),
        ("plain", torch.bfloat16, PlainProducts),
        ("wide", torch.bfloat16, WideProducts),
    ):
        model = make(config, kernels=Kernels(products=products)).to(dtype)
        model.load_state_dict(weights)
        loss, _ = task.loss(model(batch), batch, batch.target_counts())
        loss.backward()
        found[name] = {
            n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None
        }

    assert found["wide"].keys() == found["plain"].keys()
    for name, exact in found["whole"].items():
        plain, wide = ((found[kind][name] - exact).norm() for kind in ("plain", "wide"))
        assert wide <= 1.5 * plain + 2**-7 * exact.norm(), name


def test_flops_are_those_counted_for_the_base_model():
    """38.7 G a padded sample (36 regions, 36 tokens, about 6 masked words and 6 regions), from the
    measured facts, less what the last layers leave out: 29 words and 30 image tokens, output
    projection and MLP of each.
    """
    random = np.random.default_rng(0)
    example = Example(
        token_ids=np.ones(36, np.int64),
        token_types=np.zeros(36, np.int64),
        features=random.normal(size=(36, 2048)).astype(np.float16),
        locations=random.random((36, 5)),
        class_ids=np.ones((36, 1), np.int64),
        class_probs=np.ones((36, 1)),
        hidden_regions=np.arange(36) < 6,
        msm_positions=np.arange(1, 7),
        msm_labels=np.ones(6, np.int64),
    )
    left_out = 3 * (29 + 30) * 2 * (768 * 768 + 2 * 768 * 3072) / 1e9
    assert (
        abs(training_flops(PRESETS["base"], pack([example], 2048)) / 1e9 - (38.7 - left_out)) < 0.5
    )


def test_loading_refuses_what_does_not_fit():
    full = {name: p.detach() for name, p in make().named_parameters()}
    missing = {k: v for k, v in full.items() if k != "itm_head.bias"}
    with pytest.raises(UsageError, match=r"itm_head\.bias is missing"):
        load_full_state(make(), missing, ParallelState(), "x")
    with pytest.raises(UsageError, match=r"itm_head.bias has shape \[3\], the model expects \[2\]"):
        load_full_state(make(), {**full, "itm_head.bias": torch.zeros(3)}, ParallelState(), "x")


def test_seeds_give_other_first_weights():
    """Also seeds that differ only beyond 32 bits of some mixture of theirs: each is hashed with the
    parameter's name.
    """
    drawn = []

    for seed in (0, 1, 2, 1 << 32):
        model = InterBert(SMALL, HEADS)
        initialise(model, SMALL, seed, ParallelState())
        drawn.append(model.itm_head.weight.detach().clone())

    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    again = InterBert(SMALL, HEADS)
    initialise(again, SMALL, 1, ParallelState())
    assert torch.equal(again.itm_head.weight, drawn[1])
