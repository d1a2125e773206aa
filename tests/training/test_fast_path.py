"""Test over 200 steps on the generated corpus that fast operations learn as well as their plain
twins and are reproducible to the bit.
"""

import dataclasses
import json
import statistics
import sys

import pytest

from megatron_interbert.model.presets import PRESETS
from tests.launching import ends, launch, losses, pretrain, records, start

STEPS = 200
WINDOW = 50
SEEDS = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train, two runs at a time, and return folders by (kernels, seed, repetition). Dropout is on,
    so the two kinds draw different masks.
    """
    folder = tmp_path_factory.mktemp("runs")
    code, out, err = launch(
        *(
            sys.executable,
            "tools/make_sample.py",
            "--output",
            folder / "corpus",
            "--train-scenes",
            600,
            "--test-scenes",
            12,
        )
    )
    assert code == 0, out + err
    model = dataclasses.replace(
        PRESETS["sample"], hidden_dropout=0.1, attention_dropout=0.1, image_hidden_dropout=0.1
    )
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(model)))
    common = (
        "--model",
        folder / "model.json",
        "--data-path",
        folder / "corpus/train",
        "--language",
        "en",
        "--train-iters",
        STEPS,
        "--micro-batch-size",
        16,
        "--lr",
        2e-3,
        "--adam-beta2",
        0.98,
        "--log-interval",
        WINDOW,
        "--num-workers",
        0,
    )
    kinds = [(kernels, seed, 0) for seed in SEEDS for kernels in ("auto", "torch")] + [
        ("auto", 1, 1)
    ]

    for first in range(0, len(kinds), 2):
        pair = kinds[first : first + 2]
        processes = []

        for kernels, seed, repetition in pair:
            save = folder / f"{kernels}-{seed}-{repetition}"
            deterministic = "--deterministic" if repetition else "--no-deterministic"
            flags = ("--kernels", kernels, "--seed", seed, "--save", save, deterministic)
            processes.append(start(*pretrain(*common, *flags)))

        for code, out, err in ends(processes, timeout=280):
            assert code == 0, out + err
            assert "kernels: attention=" in out

    return {kind: folder / "-".join(map(str, kind)) for kind in kinds}


def test_fast_and_plain_operations_learn_alike(runs):
    """Check that the mean losses of the last 50 steps differ by no more than by chance between
    seeds (four standard deviations of a run).
    """
    final = {kind: records(folder)[STEPS] for kind, folder in runs.items()}

    for name in ("loss", "msm_loss", "mrm_loss", "itm_loss"):
        of = {
            kernels: [final[kernels, seed, 0][name] for seed in SEEDS]
            for kernels in ("auto", "torch")
        }
        noise = 2 * (statistics.stdev(of["torch"]) + statistics.stdev(of["auto"]))
        assert abs(statistics.mean(of["auto"]) - statistics.mean(of["torch"])) < max(noise, 0.01), (
            name,
            of,
        )
        assert (
            statistics.mean(of["auto"]) < records(runs["auto", 1, 0])[WINDOW][name]
            or name == "itm_loss"
        ), "they learn at all"


def test_the_same_seed_gives_the_same_bits(runs):
    """Compare runs with and without --deterministic: a CPU's operations always are."""
    once = losses(runs["auto", 1, 0])
    assert once == losses(runs["auto", 1, 1])
    assert once != losses(runs["auto", 2, 0])
