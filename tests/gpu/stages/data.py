"""Generate data in the scratch folder, when a stage first needs them."""

import sys
from pathlib import Path

import numpy as np

from megatron_interbert.data.regions import Regions
from megatron_interbert.preparation.building.store_writer import RegionStoreWriter
from tests.corpus import write_store
from tests.gpu.stages.place import Place
from tests.gpu.stages.programs import Program

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CAPTIONS = 2  # per image
TEST_SCENES = (200, 20)  # in the generated world: on a GPU, on a pretended one


def small_store(place: Place) -> Path:
    """Return a store of random regions with few features, for the tiny model."""
    path = place.scratch / "small"
    return path if path.exists() else write_store(path, images=200)


def base_store(place: Place) -> Path:
    """Return a store of noise in the sizes of `place.model`: 10 to 36 regions, 6 to 18 words."""
    path = place.scratch / "base"
    if path.exists():
        return path

    sizes = place.sizes
    random = np.random.default_rng(0)
    words = [f"w{number}" for number in range(sizes.vocab_size - len(SPECIAL))]

    with RegionStoreWriter(
        path,
        feature_dim=sizes.feature_dim,
        num_classes=sizes.num_classes,
        detector={"name": "noise"},
        soft_labels="top_k",
        vocabulary="\n".join([*SPECIAL, *words]) + "\n",
    ) as writer:
        for number in range(place.choose(600, 80)):
            captions = [
                (" ".join(random.choice(words, random.integers(6, 19))), "en")
                for _ in range(CAPTIONS)
            ]
            writer.add(noise(random, number, sizes.feature_dim, sizes.num_classes), captions)

    return path


def noise(random: np.random.Generator, number: int, features: int, classes: int) -> Regions:
    """Make random regions of one image of 480 x 480 pixels."""
    count = int(random.integers(10, 37))
    corner = random.uniform(0, 300, (count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(20, 150, (count, 2))], axis=1)

    return Regions(
        f"image-{number}",
        (480.0, 480.0),
        random.normal(size=(count, features)).astype(np.float16),
        boxes.astype(np.float32),
        random.integers(1, classes, (count, 1)),
        np.ones((count, 1), np.float32),
    )


def sample_corpus(place: Place) -> Path:
    """Return the folder of the generated world, which a model can learn: stores train and test."""
    path = place.scratch / "sample_corpus"
    if not path.exists():
        scenes = (
            "--train-scenes",
            place.choose(4000, 200),
            "--test-scenes",
            place.choose(*TEST_SCENES),
        )
        ended = Program(sys.executable, "tools/make_sample.py", "--output", path, *scenes).wait()
        if ended.code:
            raise RuntimeError(f"make_sample.py ended with code {ended.code}: {ended.last}")

    return path
