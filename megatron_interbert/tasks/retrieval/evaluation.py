"""Run `evaluate retrieval`: score all pairs tile by tile, compute recall and write a page; on
request also search in two stages.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.files import json_sha256, write_text
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.pages.photo_folder import PhotoFolder, photos_in
from megatron_interbert.parallel.agreement import some
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.image_finder import find_images
from megatron_interbert.tasks.loading import (
    agree_on_inputs,
    as_trained,
    check_photos,
    load_model,
    open_for,
)
from megatron_interbert.tasks.name_lists import read_names
from megatron_interbert.tasks.parts import fit_length
from megatron_interbert.tasks.results import Published, result_of, table, write_result
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig
from megatron_interbert.tasks.retrieval.job import (
    choose_pairs,
    flat_metrics,
    ranks_of_tiles,
    recall_metrics,
)
from megatron_interbert.tasks.retrieval.page import result_page
from megatron_interbert.tasks.retrieval.pairs import Pairs
from megatron_interbert.tasks.retrieval.tiles import ScoreTiles, fill
from megatron_interbert.tasks.retrieval.two_stage import two_stage_search
from megatron_interbert.weights.manifest import versions
from megatron_interbert.weights.sources import WeightSource

SHOWN = 40  # captions on the page
AUTHORS = "README of the authors' code, black4321/InterBERT"
OSCAR = "microsoft/Oscar, MODEL_ZOO.md"
VINVL = "microsoft/Oscar, VinVL_MODEL_ZOO.md"
PUBLISHED = (
    Published(
        "flickr30k",
        "InterBERT",
        {"t2i_R@1": 61.9, "t2i_R@5": 87.1, "t2i_R@10": 92.7},
        AUTHORS,
        "test",
    ),
    Published(
        "flickr30k",
        "InterBERT",
        {"t2i_R@1": 49.2, "t2i_R@5": 77.6, "t2i_R@10": 86.0},
        AUTHORS,
        "test",
        "zero-shot",
    ),
    Published("coco-5k", "Oscar-B", {"t2i_R@1": 54.0, "i2t_R@1": 70.0}, OSCAR, "test 5k"),
    Published("coco-5k", "VinVL-B", {"t2i_R@1": 58.1, "i2t_R@1": 74.6}, VINVL, "test 5k"),
)


def evaluate_retrieval(
    config: EvaluateRetrievalConfig, state: ParallelState, device: torch.device
) -> dict[str, Any]:
    """Write result.json and, if all pairs are scored, result.html, and return the result.

    All ranks of a launch must call it.
    """
    check_photos(config.image_folder, state)
    model, source = load_model(
        config.load, ("itm",), config.kernels, device, state, config.averaged, config.precision
    )
    if config.zero_shot and source.facts.get("task"):
        raise UsageError(
            f"--zero-shot: {config.load} was finetuned ({source.facts['task']}); leave the flag out"
        )

    corpus, tokenizer = open_for(config, source, [config.data_path])
    as_trained(config, source)
    fit_length(config, source.config)
    scorer = PairScorer(model)
    listed = [config.images] if config.images else []
    files = [*(store.path / MANIFEST for store in corpus.stores), *listed]
    folder = agree_on_inputs(config, state, source, tokenizer, files)
    folds = fold_pairs(config, corpus, tokenizer)
    pairs = folds[0]
    metrics: dict[str, float] = {}
    more: dict[str, Any] = {
        "images": len(pairs.images),
        "captions": len(pairs.captions),
        "folds": len(folds),
        "chance_R@1": 100.0 / len(pairs.images),
        "ties": "a wrong candidate with an equal score ranks before the right one",
    }
    scored: list[ScoreTiles] = []
    if config.exhaustive:
        for number, fold in enumerate(folds):
            own = folder / f"fold-{number + 1}" if len(folds) > 1 else folder
            weights = source.facts["files"]
            scored.append(score_tiles(config, state, device, scorer, fold, own, weights))

        each = [metrics_of(*entry) for entry in zip(scored, folds, strict=True)]
        metrics = {name: float(np.mean([fold[name] for fold in each])) for name in each[0]}

    if config.two_stage:
        found = two_stage_search(scorer, pairs, device, state, config.two_stage, config.batch_pairs)
        if config.exhaustive:
            found["lost_R@1"] = metrics["t2i_R@1"] - found["R@1"]
        more["two_stage"] = {"reranked": min(config.two_stage, len(pairs.images)), **found}

    protocol = protocol_of(config, source)
    result = result_of(
        config, protocol, metrics, source, corpus, listed, published=PUBLISHED, **more
    )
    if state.is_main:
        write_result(folder, result)
        if scored:
            photos = photos_in(config.image_folder)
            write_text(folder / "result.html", page_of(result, scored[0], pairs, photos))
        report(result, folder)

    state.barrier()
    if state.is_main:
        for tiles in scored:
            tiles.remove()
            if len(folds) > 1:
                with contextlib.suppress(OSError):  # files of others may lie there
                    tiles.folder.parent.rmdir()

    return result


def fold_pairs(
    config: EvaluateRetrievalConfig, corpus: Corpus, tokenizer: CaptionTokenizer
) -> list[Pairs]:
    """Return the captions and images of each fold: of all images or those of --images, in the
    order of the store.

    Raises UsageError if the corpus lacks an image that --images lists.
    """
    settings = (config.language, config.max_images, config.max_regions, config.max_tokens)
    only = listed_images(config.images, corpus) if config.images else None
    everything = choose_pairs(corpus, tokenizer, *settings, only)
    images = everything.images
    if config.folds == 1:
        return [everything]

    if config.folds > len(images):
        raise UsageError(f"--folds {config.folds}: there are only {len(images)} images")

    return [
        choose_pairs(corpus, tokenizer, *settings, part)
        for part in np.array_split(images, config.folds)
    ]


def listed_images(path: str, corpus: Corpus) -> np.ndarray:
    """Return the numbers of the images that a file lists, a name on each line; see `fold_pairs`."""
    names = read_names(path, "--images")
    found = find_images(corpus, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(
            f"--images {path}: {len(missing)} of {len(names)} images are not in {corpus.path}"
            f" ({some(missing)}); give the store that holds them"
        )

    return np.unique(list(found.values()))


def protocol_of(config: EvaluateRetrievalConfig, source: WeightSource) -> str:
    """Name how the weights were trained to judge pairs: zero-shot, finetuned, or unknown."""
    if config.zero_shot:
        return "zero-shot"
    if source.facts.get("task") == "retrieval":
        return "finetuned"
    return "matching head as loaded"


def score_tiles(
    config: EvaluateRetrievalConfig,
    state: ParallelState,
    device: torch.device,
    scorer: PairScorer,
    pairs: Pairs,
    folder: Path,
    weights: dict[str, str],
) -> ScoreTiles:
    """Score all tiles to disk, and return them.

    Tiles that a stopped evaluation of the same weights, data and settings has left are reused.
    """
    settings = {
        name: getattr(config, name)
        for name in ("language", "max_images", "max_regions", "max_tokens", "averaged", "precision")
    }
    data = [store.manifest.get("shards") for store in pairs.corpus.stores]
    identity = {
        "weights": weights,
        "data": data,
        "vocabulary": pairs.tokenizer.sha256,
        "pairs": json_sha256([pairs.captions.tolist(), pairs.images.tolist()]),
        **settings,
        "by": versions(),
    }
    shape = len(pairs.captions), len(pairs.images)
    tiles = ScoreTiles(folder, shape, (config.tile_captions, config.tile_images), identity, state)
    missing = tiles.missing()
    mine = tiles.share(missing)
    total = sum(tiles.pairs(place) for place in mine)

    if state.is_main and len(missing) < len(tiles.places):
        print(
            f"{len(tiles.places) - len(missing)} of {len(tiles.places)} tiles are already scored",
            flush=True,
        )

    with progress(
        total=total, unit="pair", unit_scale=True, desc="scoring", shown=state.is_main
    ) as bar:
        fill(tiles, mine, pairs, scorer, device, config.batch_pairs, bar.update)

    state.barrier()

    return tiles


def metrics_of(tiles: ScoreTiles, pairs: Pairs) -> dict[str, float]:
    """Compute the metrics of both directions, flat."""
    # column of each image in the tiles
    columns = np.empty(len(pairs.images), np.int64)
    columns[pairs.by_regions()] = np.arange(len(columns))
    of_captions, of_images = ranks_of_tiles(
        tiles.read, columns[pairs.own_image()[pairs.by_length()]], len(columns)
    )

    return flat_metrics(
        {"text_to_image": recall_metrics(of_captions), "image_to_text": recall_metrics(of_images)}
    )


def page_of(
    result: dict[str, Any], tiles: ScoreTiles, pairs: Pairs, photos: PhotoFolder | None
) -> str:
    """Return the HTML page, which shows up to SHOWN captions spread evenly over the store."""
    shown = np.linspace(0, len(pairs.captions) - 1, min(SHOWN, len(pairs.captions))).astype(int)
    place = {int(caption): row for row, caption in enumerate(pairs.by_length())}
    rows_wanted = np.array([place[int(caption)] for caption in shown])
    scores = np.empty((len(shown), len(pairs.images)), np.float32)
    order = pairs.by_regions()
    for rows, columns, block in tiles.read():
        here = (rows_wanted >= rows.start) & (rows_wanted < rows.stop)
        scores[np.ix_(here, order[columns])] = block[rows_wanted[here] - rows.start]

    return result_page(
        result, scores, pairs.corpus.stores[0], pairs.captions[shown], pairs.images, photos
    )


def report(result: dict[str, Any], folder: Path) -> None:
    """Print a summary of the result."""
    means = f", means of {result['folds']} folds" if result["folds"] > 1 else ""
    origin = " (generated scenes)" if result["data"]["generated"] else ""
    print(
        f"{result['protocol']} retrieval, {result['captions']} captions x {result['images']}"
        f" images{means}{origin}"
    )
    chance = result["chance_R@1"]

    if result["metrics"]:
        print(table(result))
        print(
            f"text to image R@1 is {result['metrics']['t2i_R@1'] / chance:.1f} times chance"
            f" ({chance:.2f})"
        )

    if "two_stage" in result:
        print(
            "two stages: "
            + ", ".join(f"{name} {value:.2f}" for name, value in result["two_stage"].items())
        )

    print(
        f"result: {folder / 'result.json'}"
        + (f"\npage:   {folder / 'result.html'}" if result["metrics"] else "")
    )
