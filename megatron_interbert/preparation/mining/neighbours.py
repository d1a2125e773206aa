"""Find the images with the nearest mean region features, exactly, with blocked matrix products."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.files import own_name, whole_file
from megatron_interbert.preparation.mining.work import NeighbourFolder, complete, finish_together
from megatron_interbert.preparation.sharing import Claims
from megatron_interbert.progress import progress

READ_AT_ONCE = 256  # images whose regions are in memory
IMAGES_OF_TILE = 65_536  # whose distances to a block of images are in memory
IMAGES_OF_PART = 16_384  # whose means are one file


def mean_features(corpus: Corpus, images: range) -> np.ndarray:
    """Compute the mean of the region features of some images, float32 [images, F]."""
    means = np.empty((len(images), corpus.feature_dim), np.float32)
    for start in range(0, len(images), READ_AT_ONCE):
        numbers = np.array(images[start : start + READ_AT_ONCE])
        regions = read_regions(corpus, numbers, int(corpus.region_counts.max()))
        sums = np.add.reduceat(regions.features.astype(np.float32), regions.offsets[:-1], axis=0)
        means[start : start + len(numbers)] = sums / regions.counts[:, None]

    return means


def nearest_images(
    means: torch.Tensor, squares: torch.Tensor, rows: range, neighbours: int
) -> np.ndarray:
    """Find the K nearest other images of some images, int32 [rows, K], nearest first.

    `means` is [images, F], `squares` their squared lengths [images]; the distances to
    IMAGES_OF_TILE images are in memory at a time.
    """
    own = means[rows.start : rows.stop]
    nearest = own.new_empty((len(rows), 0))
    found = torch.empty((len(rows), 0), dtype=torch.int64, device=means.device)

    for start in range(0, len(means), IMAGES_OF_TILE):
        stop = min(start + IMAGES_OF_TILE, len(means))
        # the rows' own squares do not affect the order
        distance = squares[start:stop] - 2 * own @ means[start:stop].T
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:  # images are not neighbours of themselves
            itself = distance[first - rows.start : last - rows.start, first - start : last - start]
            itself.fill_diagonal_(torch.inf)

        numbers = torch.arange(start, stop, device=means.device).expand(len(rows), -1)
        nearest = torch.cat([nearest, distance], dim=1)
        best = nearest.topk(min(neighbours, nearest.shape[1]), dim=1, largest=False)
        found = torch.cat([found, numbers], dim=1).gather(1, best.indices)
        nearest = best.values

    return found.int().cpu().numpy()


def mine_neighbours(
    corpus: Corpus, folder: NeighbourFolder, device: torch.device, claims: Claims | None = None
) -> dict[str, Any] | None:
    """Write the table of neighbours of a store's images, alone or with others; return its summary,
    None if another process has finished it.
    """
    means = _all_means(corpus, folder, claims).to(device)
    squares = means.square().sum(dim=1)
    shown = claims is None or claims.team.is_first

    with progress(total=folder.rows, unit="image", desc="neighbours", shown=shown) as bar:

        def make(rows: range) -> np.ndarray:
            bar.update(len(rows))
            return nearest_images(means, squares, rows, folder.width)

        folder.complete(make, claims)

    def finish(may_publish: Callable[[], bool]) -> dict[str, Any] | None:
        folder.assemble()
        if not may_publish():
            return None

        summary = {"images": folder.rows, "neighbours": folder.width}
        folder.publish(summary)

        return summary

    return finish_together(folder, finish, claims)


def _all_means(corpus: Corpus, folder: NeighbourFolder, claims: Claims | None) -> torch.Tensor:
    """Compute the means of all images in parts, which are files; return them [images, F]."""
    starts = range(0, corpus.num_images, IMAGES_OF_PART)
    parts = {
        number: range(start, min(start + IMAGES_OF_PART, corpus.num_images))
        for number, start in enumerate(starts)
    }
    names = {number: f"means-{number:06d}" for number in parts}
    paths = {number: folder.path / f"{name}.npy" for number, name in names.items()}

    def make(number: int) -> None:
        with whole_file(paths[number], own_name(paths[number])) as handle:
            np.save(handle, mean_features(corpus, parts[number]), allow_pickle=False)

    def missing() -> list[int]:
        return [number for number in parts if not _is_whole(paths[number], parts[number], corpus)]

    complete(names, missing, make, claims)

    means = np.empty((corpus.num_images, corpus.feature_dim), np.float32)
    for number, images in parts.items():
        means[images.start : images.stop] = np.load(paths[number], allow_pickle=False)

    return torch.from_numpy(means)


def _is_whole(path: Path, images: range, corpus: Corpus) -> bool:
    """Check whether a file holds the means of some images."""
    try:
        means = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False

    return means.shape == (len(images), corpus.feature_dim) and means.dtype == np.float32
