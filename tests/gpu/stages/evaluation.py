"""Evaluate retrieval in fp32 and bf16: recall and speed; and train on a long batch as in VCR."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import pack
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.tasks.retrieval.job import choose_pairs
from megatron_interbert.tasks.retrieval.pairs import score_block
from megatron_interbert.virtual.samples import random_examples
from tests.gpu.stages.data import TEST_SCENES, base_store, sample_corpus
from tests.gpu.stages.place import Place, Record
from tests.gpu.stages.programs import module
from tests.launching import records

PRECISIONS = {"fp32": "--no-bf16", "bf16": "--bf16"}
WORDS_LEARNT = 0.4  # share of masked words that a trained model predicts at least
RECALL_NOISE = 3.0  # percentage points that the precisions may differ by


def check_evaluation(place: Place, record: Record) -> None:
    """Evaluate trained weights, time the base model, and try sequences as long as VCR's."""
    check_recall(place, record)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        measure_pairs(place, record, name, dtype)
    check_long_batch(place, record)


def check_recall(place: Place, record: Record) -> None:
    """Train the sample model for a while, and evaluate it in both precisions."""
    data = sample_corpus(place)
    run = place.scratch / "sample_run"
    ended = module(
        "pretrain",
        *("--model", "sample", "--data-path", data / "train", "--language", "en", "--bf16"),
        *("--train-iters", place.choose(2000, 5), "--micro-batch-size", 64, "--lr", "2e-3"),
        *("--lr-warmup-fraction", 0.05, "--adam-beta2", 0.98, "--no-msm-on-mismatched"),
        *(
            "--save",
            run,
            "--log-interval",
            place.choose(100, 1),
            "--num-workers",
            place.choose(4, 0),
        ),
    ).wait()
    record.expect(ended.code == 0, f"training for it: code {ended.code}: {ended.last}")
    if ended.code:
        return

    check_learnt(place, record, run)
    programs = {
        name: module(
            "evaluate",
            *(
                "retrieval",
                "--zero-shot",
                "--load",
                run,
                "--data-path",
                data / "test",
                "--language",
                "en",
            ),
            *("--output", place.scratch / f"retrieval-{name}", flag),
        )
        for name, flag in PRECISIONS.items()
    }
    found = {}

    for name, program in programs.items():
        ended = program.wait()
        record.expect(ended.code == 0, f"evaluation in {name}: code {ended.code}: {ended.last}")
        if ended.code == 0:
            found[name] = recalls(place.scratch / f"retrieval-{name}")

    record.note(recall=found)
    if len(found) == len(PRECISIONS):
        compare_recalls(place, record, found)


def check_learnt(place: Place, record: Record, run: Path) -> None:
    """Check that masked words are predicted; on a CPU 55 % of them were after 272 steps."""
    last = records(run)[max(records(run))]
    record.note(words_right=last["msm_accuracy"], matches_right=last["itm_accuracy"])
    if place.pretended:
        return

    right = last["msm_accuracy"]
    record.expect(
        right > WORDS_LEARNT, f"only {right:.0%} of hidden words are guessed: no learning"
    )


def recalls(folder: Path) -> dict[str, float]:
    """Return R@K of both directions in per cent, by `direction/name`."""
    (path,) = folder.rglob("result.json")
    metrics: dict[str, Any] = json.loads(path.read_text())["metrics"]
    return flat(metrics)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested dictionaries of numbers, joining names with `/`."""
    found = {}

    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = float(value)

    return found


def compare_recalls(place: Place, record: Record, found: dict[str, dict[str, float]]) -> None:
    """Check that R@1 agrees in both precisions; report chance too, near which R@1 says little."""
    first = [name for name in found["fp32"] if name.lower().endswith("r@1")]
    record.expect(bool(first), f"no R@1 among {', '.join(found['fp32'])}")
    chance = 100 / place.choose(*TEST_SCENES)

    for name in first:
        exact = found["fp32"][name]
        half = found["bf16"][name]
        record.expect(
            abs(exact - half) <= RECALL_NOISE, f"{name}: {exact:.1f} in fp32, {half:.1f} in bf16"
        )
        record.say(f"{name}: {exact:.1f} in fp32, {half:.1f} in bf16, by chance {chance:.1f}")


def measure_pairs(place: Place, record: Record, name: str, dtype: torch.dtype) -> None:
    """Measure pairs/s with random weights, scored as `evaluate retrieval` scores a tile."""
    device = place.device
    store = base_store(place)
    sizes = place.sizes.without_dropout()
    kernels = choose_kernels("auto", device, head_sizes=sizes.head_sizes, dtype=dtype)
    model = InterBert(sizes, kernels=kernels)
    initialise(model, sizes, 0, ParallelState())
    scorer = PairScorer(model.to(device, dtype).eval())
    tokenizer = CaptionTokenizer(str(store / "vocab.txt"))
    pairs = choose_pairs(Corpus([str(store)]), tokenizer, "", place.choose(100, 4), 36, 36)
    order = pairs.by_length()

    with torch.no_grad():
        images = pairs.image_side(scorer, np.arange(len(pairs.images)), device)
        captions = pairs.caption_side(scorer, order, device)
        kept = {}

        def score() -> None:
            kept["scores"] = score_block(scorer, images, captions, 512)

        seconds = [place.seconds(score) for _ in range(2)]

    count = len(pairs.images) * len(pairs.captions)
    finite = bool(torch.isfinite(kept["scores"]).all())
    record.expect(finite, f"{name}: scores of pairs are not finite")
    record.note(
        **{
            f"pairs_{name}": {
                "pairs_per_second": count / seconds[-1],
                "seconds": seconds,
                "pairs": count,
                "kernels": kernels.describe(),
            }
        }
    )
    record.say(f"{place.model}, {count} pairs in {name}: {count / seconds[-1]:.0f} pairs/s")


def check_long_batch(place: Place, record: Record) -> None:
    """Run both passes with dropout on 161 joint tokens: 60 words, 100 regions and their mean.

    Our kernels and plain torch's start from the same weights; their losses must agree as far as
    different dropout masks allow.
    """
    words, regions = place.choose((60, 100), (30, 50))
    samples = place.choose(64, 2)
    device = place.device
    sizes = place.sizes
    batch = pack(
        random_examples(sizes, samples, (words, words), (regions, regions)), sizes.feature_dim
    )
    batch = batch.to(device)
    found = {}

    for name in ("auto", "torch"):
        kernels = choose_kernels(
            name, device, True, head_sizes=sizes.head_sizes, dtype=torch.bfloat16
        )
        streams = RandomStreams(0, device=device, alone=True)
        model = InterBert(sizes, kernels=kernels, streams=streams)
        initialise(model, sizes, 0, ParallelState())
        model = model.to(device, torch.bfloat16).train()

        def passes(model=model, name=name) -> None:
            model.zero_grad()
            loss, _ = PretrainingTask().loss(model(batch), batch, batch.target_counts().to(device))
            loss.backward()
            found[name] = loss.item()

        seconds = [place.seconds(passes) for _ in range(3)]
        bad = [
            n
            for n, p in model.named_parameters()
            if p.grad is None or not torch.isfinite(p.grad).all()
        ]
        record.expect(
            not bad, f"{words + regions + 1} joint tokens, {name}: gradients not finite: {bad[:3]}"
        )
        record.note(
            **{
                f"long_{name}": {
                    "loss": found[name],
                    "ms": 1000 * min(seconds),
                    "kernels": kernels.describe(),
                }
            }
        )

    off = abs(found["auto"] - found["torch"]) / found["torch"]
    record.expect(
        off < 0.05, f"{words + regions + 1} joint tokens: losses {found} are {off:.1%} apart"
    )
    record.say(
        f"{words + regions + 1} joint tokens with dropout: loss {off:.2%} apart from plain torch's"
    )
