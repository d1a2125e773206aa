"""Measure exhaustive retrieval: pairs/s of our tiles against padded batches of the same model, and
how time grows.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_interbert.config.options import option
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import PackedBatch, to_batch
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.data.regions import Regions
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.model.embeddings import image_features
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.model.presets import fit_to_data, load_model_config
from megatron_interbert.model.transformer import TransformerLayer
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from megatron_interbert.tasks.pairs import caption_texts, pair_fields
from megatron_interbert.tasks.retrieval.job import choose_pairs
from megatron_interbert.tasks.retrieval.pairs import Pairs, score_block
from tools.benchmarks.data import captions_for
from tools.benchmarks.options import BenchmarkOptions

# regions of an image: always 36, or 10 to 100
FIXED = 36
MOST = 100


@dataclass
class Options(BenchmarkOptions):
    """Measure pairs/s of exhaustive retrieval by our tiles and by padded batches."""

    model: str = option("base", "preset or JSON file of sizes", group="model")
    images: int = option(16, "images to score", least=1)
    captions_of_each: int = option(2, "captions per image", least=1)
    max_tokens: int = option(36, "tokens to which captions are padded", least=1)
    regions: str = option(
        "fixed",
        "fixed: 36 per image; adaptive: 10 to 100 (mean 36), padded to 100 in padded batches",
        ("fixed", "adaptive"),
    )
    pairs: int = option(64, "pairs per forward pass", least=1)
    rounds: int = option(3, "alternating repeats", least=1)
    bf16: bool = option(False, "run all ways in bfloat16")
    captions: str = option(
        "", "captions_*.json of COCO for realistic lengths; default: made-up words", group="data"
    )
    vocab_file: str = option("", "WordPiece vocabulary", required=True, group="data")


OFFICIAL = "padded batches, all heads (official style)"
PADDED = "padded batches, matching head only"
OURS = "ours"


def measure(options: Options) -> dict[str, Any]:
    """Measure the rates of three ways to score the same pairs, the largest difference of their
    scores, and how our rate grows with the number of images.
    """
    device = this_device()
    tokenizer = CaptionTokenizer(options.vocab_file)
    model = random_model(options, tokenizer.vocab_size, device)
    scorer = PairScorer(model)

    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        pairs = choose_pairs(
            store_of(Path(folder) / "store", options), tokenizer, "", 0, MOST, options.max_tokens
        )
        print(
            f"{len(pairs.captions)} captions x {len(pairs.images)} images, {options.regions}"
            f" regions, {options.model}, {device.type}"
        )
        seconds, scores = time_ways(model, scorer, pairs, device, options)
        result: dict[str, Any] = rates(seconds, scores[OURS].numel())

        result["largest_difference"] = float((scores[OURS] - scores[PADDED]).abs().max())
        result["spread_of_scores"] = float(scores[PADDED].std())
        print(
            f"largest difference of scores {result['largest_difference']:.2e} (their spread:"
            f" {result['spread_of_scores']:.2e})"
        )

        result["growth"] = growth(scorer, pairs, device, options)
        at_paper = 5_000_000 / result["growth"][-1]["pairs_per_second"]
        print(f"1,000 images x 5,000 captions at this rate: {at_paper:.0f} s")
        result["seconds_for_1000_x_5000"] = at_paper

    return result


def random_model(options: Options, vocab_size: int, device: torch.device) -> InterBert:
    """Build the model of --model with random weights, ready to score on `device`."""
    sizes = load_model_config(options.model)
    config = fit_to_data(sizes, vocab_size, 2048, 1601, "benchmark").without_dropout()
    model = InterBert(config, PRETRAINING_HEADS, kernels=choose_kernels("auto", device))
    initialise(model, config, 0, ParallelState())

    return model.to(device, torch.bfloat16 if options.bf16 else torch.float32).eval()


def time_ways(
    model: InterBert, scorer: PairScorer, pairs: Any, device: torch.device, options: Options
) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """Return the seconds of each round and the scores, by way; the first round is a warm-up."""
    ways: dict[str, Callable[[], torch.Tensor]] = {
        OFFICIAL: lambda: padded_scores(model, pairs, device, options, heads=True),
        PADDED: lambda: padded_scores(model, pairs, device, options, heads=False),
        OURS: lambda: our_scores(scorer, pairs, device, options.pairs, len(pairs.captions)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, torch.Tensor] = {}

    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            seconds[name].append(timed(way, scores, name, device))

    return seconds, scores


def rates(seconds: dict[str, list[float]], count: int) -> dict[str, Any]:
    """Return and print pairs per second of each way and its ratio to the official style."""
    official = statistics.median(seconds[OFFICIAL][1:])
    result = {}

    for name, values in seconds.items():
        median = statistics.median(values[1:])
        result[name] = {"pairs_per_second": count / median, "of_official_style": official / median}
        print(f"{name:<46}{count / median:>10.1f} pairs/s {official / median:>6.2f}")

    return result


def timed(
    way: Callable[[], torch.Tensor],
    scores: dict[str, torch.Tensor],
    name: str,
    device: torch.device,
) -> float:
    """Return the seconds of one run, and keep its scores."""
    started = time.perf_counter()
    with torch.no_grad():
        scores[name] = way().float().cpu()
    if device.type == "cuda":
        torch.cuda.synchronize()

    return time.perf_counter() - started


def growth(
    scorer: PairScorer, pairs: Pairs, device: torch.device, options: Options
) -> list[dict[str, float]]:
    """Measure our time for a quarter, a half and all of the captions."""
    rows = []

    for share in (4, 2, 1):
        captions = max(1, len(pairs.captions) // share)
        seconds = timed(
            lambda c=captions: our_scores(scorer, pairs, device, options.pairs, c),
            {},
            "ours",
            device,
        )

        rows.append(
            {
                "captions": captions,
                "seconds": seconds,
                "pairs_per_second": captions * len(pairs.images) / seconds,
            }
        )
        print(
            f"ours, {captions} captions: {seconds:.2f} s, {rows[-1]['pairs_per_second']:.1f}"
            " pairs/s"
        )

    return rows


def store_of(path: Path, options: Options) -> Corpus:
    """Write and open a store with noise for features and the captions of the options."""
    random = np.random.default_rng(0)
    texts = captions_for(options.images * options.captions_of_each, options)
    facts = {
        "feature_dim": 2048,
        "num_classes": 1601,
        "detector": {"name": "noise"},
        "soft_labels": "top_k",
    }

    with RegionStoreWriter(path, **facts) as writer:
        for number in range(options.images):
            count = (
                FIXED
                if options.regions == "fixed"
                else int(np.clip(random.lognormal(3.45, 0.5), 10, MOST))
            )
            corner = random.uniform(0, 300, size=(count, 2))
            boxes = np.concatenate(
                [corner, corner + random.uniform(20, 150, size=(count, 2))], axis=1
            ).astype(np.float32)
            features = random.normal(size=(count, 2048)).clip(0).astype(np.float16)
            labels = np.zeros((count, 1), np.int32), np.ones((count, 1), np.float32)
            first = number * options.captions_of_each
            captions = [(text, "en") for text in texts[first : first + options.captions_of_each]]
            writer.add(Regions(str(number), (480.0, 480.0), features, boxes, *labels), captions)

    return Corpus([str(path)])


def our_scores(
    scorer: PairScorer, pairs: Pairs, device: torch.device, pairs_per_batch: int, captions: int
) -> torch.Tensor:
    """Return scores [captions, images] as `evaluate retrieval` computes a tile, with reading."""
    order = pairs.by_length()[np.linspace(0, len(pairs.captions) - 1, captions).astype(int)]
    side = pairs.caption_side(scorer, order, device)
    block = score_block(
        scorer,
        pairs.image_side(scorer, np.arange(len(pairs.images)), device),
        side,
        pairs_per_batch,
    )
    if captions < len(pairs.captions):
        return block

    scores = torch.empty_like(block)
    scores[torch.from_numpy(order)] = block

    return scores


def padded_scores(
    model: InterBert, pairs: Pairs, device: torch.device, options: Options, heads: bool
) -> torch.Tensor:
    """Return scores [captions, images], of each caption with all images in padded batches, where
    everything is computed anew for every pair.
    """
    images = np.arange(len(pairs.images))
    scores = torch.empty(len(pairs.captions), len(images))
    regions = read_regions(pairs.corpus, pairs.images, MOST)
    most = FIXED if options.regions == "fixed" else MOST

    for row in range(len(pairs.captions)):
        (text,) = caption_texts(
            pairs.corpus, pairs.tokenizer, pairs.captions[row : row + 1], options.max_tokens
        )
        for start in range(0, len(images), options.pairs):
            part = images[start : start + options.pairs]
            batch = to_batch(pair_fields([text] * len(part), regions, part, 2048)).to(device)
            scores[row, part] = (
                padded_margins(model, batch, options.max_tokens, most + 1, heads).float().cpu()
            )

    return scores


def padded_margins(
    model: InterBert, batch: PackedBatch, max_tokens: int, image_tokens: int, heads: bool
) -> torch.Tensor:
    """Return scores [B] as a padded implementation computes them, with the same weights and
    everything padded to `image_tokens` and `max_tokens`.
    """
    samples = len(batch)
    tokens = batch.max_text
    ids = F.pad(batch.token_ids.view(samples, tokens), (0, max_tokens - tokens))
    places = torch.arange(max_tokens, device=ids.device).expand(samples, -1)
    text = model.text_embedding(ids, places, torch.zeros_like(ids))
    lengths = (batch.image_offsets[1:] - batch.image_offsets[:-1]).long()
    slots = torch.arange(image_tokens, device=ids.device)
    rows = (
        batch.image_offsets[:-1, None].long() + torch.minimum(slots, lengths[:, None] - 1)
    ).flatten()
    features = image_features(batch, model.image_embedding.feature.weight.dtype, Kernels())[rows]
    image = model.image_embedding.feature(features)
    image = model.image_embedding.norm(
        image + model.image_embedding.location(batch.locations[rows].to(image.dtype))
    )
    image = image.view(samples, image_tokens, -1)
    seen_text = (places < tokens)[:, None, None]
    seen_image = (slots < lengths[:, None])[:, None, None]
    joint = torch.cat([image, text], dim=1)
    seen = torch.cat([seen_image, seen_text], dim=3)
    for layer in model.interaction.layers:
        joint = padded_layer(layer, joint, seen)

    image, text = joint.split([image_tokens, max_tokens], dim=1)
    for layer in model.image_stream.layers:
        image = padded_layer(layer, image, seen_image)
    for layer in model.text_stream.layers:
        text = padded_layer(layer, text, seen_text)
    if heads:
        model.msm_head(text.flatten(0, 1), model.text_embedding.word.weight)
        model.mrm_head(image.flatten(0, 1))

    logits = model.itm_head(
        model.fuse(model.text_pooler(text[:, 0]), model.image_pooler(image[:, 0]))
    )

    return logits[:, 0] - logits[:, 1]


def padded_layer(layer: TransformerLayer, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Run one layer over x [B, L, H] with padding masked out."""
    samples, length, hidden = x.shape
    size = layer.attention.head_size
    q, k, v = layer.attention.qkv(x).view(samples, length, -1, 3, size).permute(3, 0, 2, 1, 4)
    attended = (
        F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        .transpose(1, 2)
        .reshape(samples, length, hidden)
    )

    return layer.after_attention(attended, x)
