"""Build stores from region features in tests, and compare them with what was written."""

import numpy as np
import pytest

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.build import build
from megatron_interbert.preparation.building.plan import BuildPlan
from megatron_interbert.preparation.building.sources.fields import ReadOptions
from megatron_interbert.preparation.building.sources.opening import open_features
from tests.preparation import published


def opened(path, kind="auto", image_ids="", columns=(), **options):
    options = ReadOptions(**{"trust_pickle": True, **options})
    return open_features(str(path), kind, options, columns, str(image_ids))


def built(path, output, max_dropped=0.0, **options):
    """Build a store; return its images by name, its manifest, and how the source was read."""
    source = opened(path, **options)
    plan = BuildPlan([source], str(output), detector={"name": "x"})
    manifest = build(plan, max_dropped=max_dropped)
    store = RegionStore(str(output))
    found = {store.image_id(number): store.read(number) for number in range(store.num_images)}
    return found, manifest, "; ".join([source.how(), *source.remarks()])


def refusal(path, **options):
    """Return why a path cannot be opened or read: one line."""
    with pytest.raises(UsageError) as refused:
        opened(path, **options).facts()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def check(found, images, labels="top", size=(100.0, 80.0), tolerance=1e-4):
    """Compare what was read with the fields from which the file was written."""
    assert sorted(found) == sorted(map(published.name_of, images))

    for image in images:
        got = found[published.name_of(image)]
        expected = image["boxes"].clip(0, [100, 80, 100, 80])
        if size == (1.0, 1.0):
            expected = expected / [100, 80, 100, 80]
        assert got.size == size
        np.testing.assert_array_equal(got.features, image["features"].astype(np.float16))
        np.testing.assert_allclose(got.boxes, expected, atol=tolerance)
        if labels == "none":
            assert not got.class_probs.any()
        else:
            np.testing.assert_array_equal(got.class_ids[:, 0], image["cls_id_1601"])
            likely = image["cls_conf"] if labels == "top" else np.full(len(got.boxes), 0.8)
            np.testing.assert_allclose(got.class_probs[:, 0], likely, atol=2e-3)
