"""Keep the centroids of clusters of region features, and name them in a store's manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatron_interbert.data.manifest import CENTROIDS, CLUSTERS, MANIFEST, REPEAT, sha256_of
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.files import file_entry, file_sha256, write_by_name, write_json
from megatron_interbert.reading import read_json

NAME = "centroids"


@dataclass(frozen=True)
class Centroids:
    """Hold the middles of clusters, float32 [clusters, F], and how they were found."""

    middles: np.ndarray
    origin: dict[str, Any]

    @property
    def unit_length(self) -> bool:
        """Check whether features are compared with them at unit length."""
        return bool(self.origin.get("unit_length", True))

    def write(self, store: Path) -> None:
        """Write the file of a store that holds them."""

        def write(path: Path) -> None:
            save_file({NAME: self.middles}, path, {"origin": json.dumps(self.origin)})

        write_by_name(store / CENTROIDS, write)


def read_centroids(store: Path) -> Centroids | None:
    """Read the centroids in a store, None if there are none or they are damaged."""
    try:
        with safe_open(store / CENTROIDS, "np") as file:
            return Centroids(file.get_tensor(NAME), json.loads(file.metadata()["origin"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def centroids_of(store: RegionStore, flag: str) -> Centroids:
    """Read the centroids that a store's manifest names; raises UsageError if there are none."""
    entry = store.manifest.get("clusters")
    if entry is None:
        raise UsageError(f"{flag} {store.path}: its regions have no clusters")

    found = read_centroids(store.path)
    whole = sha256_of(store.path, entry["centroids"]) == entry["centroids"]["sha256"]
    if found is None or not whole:
        raise UsageError(f"{store.path / CENTROIDS}: differs from {MANIFEST} (corrupt); {REPEAT}")

    return found


def name_clusters(store: Path, centroids: Centroids, regions: int) -> None:
    """Name the files of clusters in a store's manifest."""
    manifest = read_json(store / MANIFEST, "region store")
    manifest["clusters"] = {
        "file": CLUSTERS,
        **file_entry(store / CLUSTERS),
        "count": len(centroids.middles),
        "regions": regions,
        "centroids": {"file": CENTROIDS, **file_entry(store / CENTROIDS)},
        "origin": centroids.origin,
    }
    write_json(store / MANIFEST, manifest)


def forget_clusters(store: Path) -> None:
    """Remove clusters from a store's manifest, before their files are replaced."""
    manifest = read_json(store / MANIFEST, "region store")
    if manifest.pop("clusters", None) is not None:
        write_json(store / MANIFEST, manifest)


def remove_damaged(store: Path) -> bool:
    """Remove clusters and centroids that are not as a store's manifest says; return whether there
    were some.
    """
    entry = read_json(store / MANIFEST, "region store").get("clusters")
    if not isinstance(entry, dict) or not isinstance(entry.get("centroids"), dict):
        return False

    files = {CLUSTERS: entry, CENTROIDS: entry["centroids"]}
    damaged = [name for name, of in files.items() if not is_as_written(store / name, of)]
    if damaged:
        forget_clusters(store)
    if CENTROIDS in damaged:
        (store / CENTROIDS).unlink(missing_ok=True)

    return bool(damaged)


def is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    """Check whether a file is there with the sha256 of its entry."""
    try:
        return file_sha256(path) == entry["sha256"]
    except FileNotFoundError:
        return False
