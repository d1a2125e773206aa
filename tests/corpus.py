"""Write a small region store of random content in a test's own folder."""

from pathlib import Path

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "car",
    "tree",
    "house",
    "runs",
    "sits",
    "under",
    "over",
    "near",
    "the",
    "old",
    "small",
    "playing",
    "##s",
    "##ing",
    ",",
]
VOCABULARY = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
FEATURES = 24
CLASSES = 11


def write_store(
    path: Path,
    images: int = 40,
    captions_each: int = 2,
    seed: int = 0,
    images_per_shard: int = 16,
    num_attributes: int = 0,
    **options,
) -> Path:
    """Write a store of `images` with 2 to 9 regions each, soft labels of three entries and perhaps
    attributes, and its vocab.txt; return its path.
    """
    random = np.random.default_rng(seed)

    with RegionStoreWriter(
        path,
        feature_dim=FEATURES,
        num_classes=CLASSES,
        images_per_shard=images_per_shard,
        **{
            "detector": {"name": "random", "revision": "0"},
            "soft_labels": "top_k",
            "vocabulary": "\n".join(VOCABULARY) + "\n",
            "extra": {"num_attributes": num_attributes},
            **options,
        },
    ) as writer:
        for number in range(images):
            regions = random_regions(random, f"image-{number}")
            if num_attributes:
                shape = (len(regions.features), 1)
                regions.attribute_ids = random.integers(num_attributes, size=shape)
                # 0 where the attribute is unknown
                regions.attribute_probs = np.maximum(random.uniform(-0.3, 1, size=shape), 0)
            writer.add(
                regions,
                [
                    (" ".join(random.choice(WORDS[:18], size=random.integers(1, 12))), "en")
                    for _ in range(captions_each)
                ],
            )

    return path


def random_regions(random: np.random.Generator, name: str) -> Regions:
    """Make random regions of one image of 100 x 80 pixels."""
    count = int(random.integers(2, 10))
    corner = random.uniform(0, [60, 40], size=(count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(5, 40, size=(count, 2))], axis=1)
    ids = np.stack([random.permutation(CLASSES)[:3] for _ in range(count)])
    probs = random.dirichlet(np.ones(4), size=count)[:, :3]

    return Regions(
        name,
        (100.0, 80.0),
        random.normal(size=(count, FEATURES)).astype(np.float16),
        boxes.astype(np.float32),
        ids,
        probs.astype(np.float32),
    )
