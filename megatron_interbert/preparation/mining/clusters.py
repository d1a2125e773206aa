"""Find clusters of region features by k-means, and the cluster of every region: classes for masked
regions of stores whose detector gave none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.region_batch import read_regions
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.mining.centroids import Centroids
from megatron_interbert.preparation.mining.work import ClusterFolder
from megatron_interbert.progress import progress

READ_AT_ONCE = 256  # images whose regions are in memory


@dataclass(frozen=True)
class KMeans:
    """Hold how clusters are found: their number, the regions that are looked at for each, the
    rounds, and whether only the direction of a feature counts (`unit_length`).
    """

    clusters: int
    samples_per_cluster: int
    rounds: int
    unit_length: bool
    seed: int


def find_centroids(corpora: Sequence[Corpus], options: KMeans) -> np.ndarray:
    """Return the middles of clusters of the regions of some corpora, float32 [clusters, F].

    Raises UsageError if there are fewer regions than clusters.
    """
    regions = sum(int(corpus.region_counts.sum()) for corpus in corpora)
    if regions < options.clusters:
        raise UsageError(
            f"--clusters {options.clusters}: the stores have only {regions} regions; give fewer"
        )

    features = sample_features(corpora, options.clusters * options.samples_per_cluster, options)
    centroids = None

    for step in progress(range(options.rounds), desc="k-means", unit="round"):
        rounds = faiss.Kmeans(
            features.shape[1],
            options.clusters,
            niter=1,
            seed=options.seed + step,
            spherical=options.unit_length,
            # the sample is drawn here
            min_points_per_centroid=1,
            max_points_per_centroid=len(features),
        )
        rounds.train(features, init_centroids=centroids)
        centroids = rounds.centroids

    return centroids


def sample_features(corpora: Sequence[Corpus], wanted: int, options: KMeans) -> np.ndarray:
    """Draw the features of about `wanted` regions, or of all, as k-means compares them: float32
    [n, F]. An image gives all its regions; each store gives its share.
    """
    regions = sum(int(corpus.region_counts.sum()) for corpus in corpora)
    share = min(1.0, wanted / regions)
    random = np.random.default_rng(options.seed)
    parts = []

    for corpus in corpora:
        images = random.permutation(corpus.num_images)
        ends = np.cumsum(corpus.region_counts[images])
        enough = int(np.searchsorted(ends, share * ends[-1])) + 1
        chosen = np.sort(images[:enough])
        for start in progress(
            range(0, len(chosen), READ_AT_ONCE), desc=f"reading {corpus.path}", unit="block"
        ):
            part = chosen[start : start + READ_AT_ONCE]
            parts.append(features_of(corpus, part, options.unit_length))

    return np.concatenate(parts)


def features_of(corpus: Corpus, images: np.ndarray, unit_length: bool) -> np.ndarray:
    """Read the features of all regions of some images as k-means compares them: float32 [R, F]."""
    found = read_regions(corpus, images, int(corpus.region_counts.max()))
    features = found.features.astype(np.float32)
    if unit_length:
        faiss.normalize_L2(features)

    return features


class Assignment:
    """Assign each region of a store to the nearest centroid."""

    def __init__(self, corpus: Corpus, centroids: Centroids) -> None:
        self.corpus = corpus
        self.unit_length = centroids.unit_length
        counts = corpus.region_counts.astype(np.int64)
        self.first = np.concatenate([[0], np.cumsum(counts)])  # region of each image
        self.index = faiss.IndexFlatL2(centroids.middles.shape[1])
        self.index.add(centroids.middles)

    def clusters(self, rows: range, advance: Callable[[int], object]) -> np.ndarray:
        """Return the clusters of some regions of the store, int32 [rows, 1]."""
        first = self.first
        start = int(np.searchsorted(first, rows.start, side="right")) - 1
        stop = int(np.searchsorted(first, rows.stop, side="left"))
        found = []

        for image in range(start, stop, READ_AT_ONCE):
            images = np.arange(image, min(image + READ_AT_ONCE, stop))
            features = features_of(self.corpus, images, self.unit_length)
            low = max(rows.start, first[images[0]]) - first[images[0]]
            high = min(rows.stop, first[images[-1] + 1]) - first[images[0]]

            _, nearest = self.index.search(features[low:high], 1)
            found.append(nearest.astype(np.int32))
            advance(len(nearest))

        return np.concatenate(found)


def assign(corpus: Corpus, folder: ClusterFolder, centroids: Centroids) -> list[int]:
    """Write the clusters of all regions of a store; return how many regions each has."""
    assignment = Assignment(corpus, centroids)
    with progress(total=folder.rows, unit="region", unit_scale=True, desc="clusters") as bar:
        folder.complete(lambda rows: assignment.clusters(rows, bar.update))

    sizes = np.bincount(folder.assemble()[:, 0], minlength=folder.below).tolist()
    folder.publish({"sizes": sizes})

    return sizes
