"""Find the images with the nearest mean region features, exactly, with blocked matrix products."""

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.progress import progress


def mean_features(corpus: Corpus, block: int = 256) -> torch.Tensor:
    """Compute the mean of each image's region features, float32 [images, F]."""
    means = np.empty((corpus.num_images, corpus.feature_dim), np.float32)
    blocks = range(0, corpus.num_images, block)
    for start in progress(blocks, desc="mean features", unit="block"):
        images = np.arange(start, min(start + block, corpus.num_images))
        regions = read_regions(corpus, images, int(corpus.region_counts.max()))
        sums = np.add.reduceat(regions.features.astype(np.float32), regions.offsets[:-1], axis=0)
        means[images] = sums / regions.counts[:, None]

    return torch.from_numpy(means)


def nearest_images(means: torch.Tensor, neighbours: int, block: int) -> np.ndarray:
    """Find the K nearest other images of each image, int32 [images, K], nearest first.

    `means` is [images, F]; block x images distances are in memory at a time.
    """
    images = len(means)
    squares = means.square().sum(dim=1)
    found = np.empty((images, neighbours), np.int32)

    for start in progress(range(0, images, block), desc="neighbours", unit="block"):
        rows = means[start : start + block]
        distance = squares - 2 * rows @ means.T  # the rows' own squares do not affect the order
        distance[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        nearest = distance.topk(neighbours, dim=1, largest=False).indices
        found[start : start + len(rows)] = nearest.numpy()

    return found
