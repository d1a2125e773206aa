#!/usr/bin/env python3
"""Finds for each image of a region store those whose mean region features are nearest, for hard captions in finetuning.

Writes hard_images.npy [images, K] into the store, nearest first (Euclidean distance of mean features), never the image itself.
The search is exact: blocks of a matrix product. Memory holds the mean features and --block x images distances.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_IMAGES
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import whole_file
from megatron_interbert.parser import Parser
from megatron_interbert.progress import progress


def mean_features(corpus: Corpus, block: int = 256) -> torch.Tensor:
    """float32 [images, F]: the mean of each image's region features."""
    means = np.empty((corpus.num_images, corpus.feature_dim), np.float32)
    blocks = range(0, corpus.num_images, block)
    for start in progress(blocks, desc="mean features", unit="block"):
        images = np.arange(start, min(start + block, corpus.num_images))
        regions = read_regions(corpus, images, int(corpus.region_counts.max()))
        sums = np.add.reduceat(regions.features.astype(np.float32), regions.offsets[:-1], axis=0)
        means[images] = sums / regions.counts[:, None]
    return torch.from_numpy(means)


def nearest(means: torch.Tensor, neighbours: int, block: int) -> np.ndarray:
    """int32 [images, K]: the K nearest others of each, nearest first."""
    images = len(means)
    squares = means.square().sum(dim=1)
    found = np.empty((images, neighbours), np.int32)
    for start in progress(range(0, images, block), desc="neighbours", unit="block"):
        rows = means[start : start + block]
        distance = squares - 2 * rows @ means.T  # the rows' own squares change no order
        distance[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        found[start : start + len(rows)] = distance.topk(neighbours, dim=1, largest=False).indices.numpy()
    return found


def run() -> None:
    """Parse the command line, search, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="region store")
    parser.add_argument("--neighbours", type=int, default=100, help="images kept for an image (default: %(default)s)")
    parser.add_argument("--block", type=int, default=2048, help="images compared with all at a time (default: %(default)s)")
    options = parser.parse_args()
    if min(options.neighbours, options.block) < 1:
        raise UsageError("--neighbours and --block must be 1 or more")
    corpus = Corpus([options.store])
    if corpus.num_images < 2:
        raise UsageError(f"{options.store}: one image has no neighbours")
    found = nearest(mean_features(corpus), min(options.neighbours, corpus.num_images - 1), options.block)
    path = Path(options.store) / HARD_IMAGES
    try:
        with whole_file(path, path.with_suffix(f".{os.getpid()}.new")) as handle:
            np.save(handle, found)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error}); make room or choose a store that can be written to") from error
    print(f"{path}: {found.shape[1]} neighbours of each of {len(found)} images")


if __name__ == "__main__":
    run_entry(run)
