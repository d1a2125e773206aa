"""Find clusters of region features by k-means, which stand for classes where regions have none.

    interbert cluster-features train_patches valid_patches --clusters 2048

Pretraining then predicts the cluster of each masked region (--region-labels clusters, the default
where there are no classes). Clusters of stores named together mean the same; --like takes those of
a store that has some. Writes clusters.npy and centroids.safetensors into each store and names them
in its manifest. Memory holds --clusters x --samples-per-cluster features. A run that was stopped or
killed is resumable: run the same command again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import CENTROIDS, MANIFEST
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_sha256, json_sha256
from megatron_interbert.preparation.mining.centroids import (
    Centroids,
    centroids_of,
    forget_clusters,
    name_clusters,
    read_centroids,
    remove_damaged,
)
from megatron_interbert.preparation.mining.clusters import KMeans, assign, find_centroids
from megatron_interbert.preparation.mining.work import ClusterFolder, work_on
from megatron_interbert.preparation.sharing import ALONE

SHAPING = ("clusters", "samples_per_cluster", "rounds", "unit_length", "seed")


@dataclass
class Options(Flags):
    """Hold the flags of cluster-features."""

    GROUP: ClassVar[str] = "clusters"

    stores: list[str] = argument("region stores", several=True, group="data")
    like: str = option("", "region store whose centroids to take", group="data")
    overwrite: bool = option(False, "replace other clusters of the stores", group="data")
    clusters: int = option(2048, "clusters", least=2)
    samples_per_cluster: int = option(256, "regions that k-means looks at, per cluster", least=1)
    rounds: int = option(20, "rounds of k-means", least=1)
    unit_length: bool = option(
        True, "compare only the directions of features; their lengths vary between patches"
    )
    seed: int = option(1234, "seed of the sample and of the first centroids")
    block: int = option(1 << 20, "regions between two saves", least=1, group="work")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other."""
        super().check()
        given = [self.told(name) for name in SHAPING if not self.is_default(name)]
        if self.like and given:
            raise UsageError(f"--like takes the centroids of a store as they are; drop {given[0]}")


def run(options: Options) -> None:
    """Find the clusters and write them into the stores."""
    for path in options.stores if options.overwrite else ():
        if (Path(path) / MANIFEST).is_file() and remove_damaged(Path(path)):
            print(f"{path}: its clusters are damaged, and are found again")

    corpora = [Corpus([path]) for path in options.stores]
    for corpus in corpora[1:]:
        refuse_unlike(corpora[0].stores[0], corpus.stores[0])

    centroids = chosen_centroids(corpora, options)
    left = [corpus for corpus in corpora if is_without(corpus.stores[0], centroids)]
    if not options.overwrite:
        refuse_clustered(left)

    for corpus in left:
        forget_clusters(corpus.stores[0].path)
        centroids.write(corpus.stores[0].path)
    for corpus in left:
        print(f"{corpus.path}: {write_clusters(corpus, centroids, options.block)}")
    if not left:
        print(f"nothing to do: the stores have these {len(centroids.middles)} clusters")


def refuse_unlike(one: RegionStore, other: RegionStore) -> None:
    """Raise UsageError if the features of two stores cannot be compared."""
    if one.feature_dim != other.feature_dim:
        raise UsageError(
            f"{other.path}: features of size {other.feature_dim}, but {one.path} has"
            f" {one.feature_dim}; name stores of one model together"
        )

    ours, theirs = one.manifest["detector"] or {}, other.manifest["detector"] or {}
    differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if ours and theirs and differing:
        raise UsageError(
            f"{other.path}: features of another model than {one.path} ({', '.join(differing)}"
            " differ); name stores of one model together"
        )


def chosen_centroids(corpora: list[Corpus], options: Options) -> Centroids:
    """Return the centroids of --like, those that the same command has left, or new ones."""
    if options.like:
        like = Corpus([options.like])
        refuse_unlike(like.stores[0], corpora[0].stores[0])
        return centroids_of(like.stores[0], "--like")

    shaping = {name: getattr(options, name) for name in SHAPING}
    stores = [json_sha256(corpus.stores[0].shards) for corpus in corpora]
    origin: dict[str, Any] = {**shaping, "stores": stores}
    for corpus in corpora:
        found = read_centroids(corpus.stores[0].path)
        if found is not None and found.origin == origin:
            return found

    if not options.overwrite:
        refuse_clustered(corpora)

    return Centroids(find_centroids(corpora, KMeans(**shaping)), origin)


def is_without(store: RegionStore, centroids: Centroids) -> bool:
    """Check whether a store has no clusters by these centroids."""
    entry = store.manifest.get("clusters")
    return entry is None or entry["origin"] != centroids.origin


def refuse_clustered(corpora: list[Corpus]) -> None:
    """Raise UsageError if one of some stores has clusters."""
    for corpus in corpora:
        if "clusters" in corpus.stores[0].manifest:
            raise UsageError(f"{corpus.path}: has other clusters; give --overwrite to replace them")


def write_clusters(corpus: Corpus, centroids: Centroids, block: int) -> str:
    """Write the cluster of each region of a store, and name them in its manifest; return a summary
    of their sizes.
    """
    store = corpus.stores[0]
    digest = file_sha256(store.path / CENTROIDS)
    folder = ClusterFolder(store, digest, len(centroids.middles), block)
    found = work_on(
        folder, ALONE, False, True, lambda claims: {"sizes": assign(corpus, folder, centroids)}
    )
    name_clusters(store.path, centroids, folder.rows)

    return described(np.array(found["sizes"]))


def described(sizes: np.ndarray) -> str:
    """Describe clusters by their sizes [clusters]."""
    shares = sizes[sizes > 0] / sizes.sum()
    even = float(np.exp(-(shares * np.log(shares)).sum()))

    return (
        f"{sizes.sum()} regions in {len(sizes)} clusters, {(sizes == 0).sum()} of them empty;"
        f" the largest has {100 * shares.max():.1f} %; as diverse as {even:.0f} clusters of equal"
        " size"
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
