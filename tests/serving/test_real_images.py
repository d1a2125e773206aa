"""Test twenty real images and their Chinese captions: a small model that has memorised them finds
each, and the page shows its photo.
"""

import dataclasses
import functools
import json
import sys
from urllib.parse import quote

from megatron_interbert.model.presets import PRESETS
from tests.launching import launch, until
from tests.serving_client import Service
from tests.shared import SHARED, needs_shared


@needs_shared
def test_twenty_real_images_find_their_captions(tmp_path, request):
    data = SHARED / "data"
    captions = [
        json.loads(line)
        for line in (data / "region_features/captions.jsonl").read_text().splitlines()
    ]
    chinese = [caption for caption in captions if caption["lang"] == "zh"]
    vocabulary = data / "vocab/bert-base-chinese-vocab.txt"
    code, out, err = launch(
        *(
            sys.executable,
            "tools/build_features.py",
            data / "region_features/npz",
            "--vocab-file",
            vocabulary,
            "--workers",
            1,
        ),
        *("--text-normalisation", "chinese", "--output", tmp_path / "store"),
    )
    assert code == 0, out + err
    sizes = dataclasses.replace(
        PRESETS["sample-chinese"], vocab_size=21128, feature_dim=2048, num_classes=1601
    )
    (tmp_path / "model.json").write_text(json.dumps(dataclasses.asdict(sizes)))
    queries = [
        {"query_id": n, "query_text": c["caption"], "item_ids": [c["image_id"]]}
        for n, c in enumerate(chinese)
    ]
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in queries)
    )
    common = (
        "--data-path",
        tmp_path / "store",
        "--queries",
        tmp_path / "queries.jsonl",
        "--no-titles",
    )

    code, out, err = launch(
        *(
            sys.executable,
            "-m",
            "megatron_interbert.finetune",
            "product_search",
            "--model",
            tmp_path / "model.json",
            *common,
        ),
        *(
            "--train-iters",
            160,
            "--lr",
            "2e-3",
            "--adam-beta2",
            0.98,
            "--micro-batch-size",
            16,
            "--global-batch-size",
            16,
        ),
        *(
            "--data-partitions",
            1,
            "--ema-decay",
            0,
            "--zero-stage",
            0,
            "--num-workers",
            0,
            "--save",
            tmp_path / "run",
        ),
    )
    assert code == 0, out + err
    code, out, err = launch(
        *(
            sys.executable,
            "-m",
            "megatron_interbert.evaluate",
            "product_search",
            "--load",
            tmp_path / "run",
            *common,
            "--two-stage",
            5,
        )
    )
    assert code == 0, out + err
    metrics = json.loads((tmp_path / "run/evaluation/product_search/result.json").read_text())[
        "metrics"
    ]
    assert metrics["R@1"] > 95
    assert metrics["two_stage_R@1"] > 90
    visit = request.getfixturevalue("visit")  # without a browser the rest is skipped
    serving = (
        "--load",
        tmp_path / "run",
        "--data-path",
        tmp_path / "store",
        "--image-folder",
        data / "images",
    )

    with Service(*serving) as service:
        page = visit(service.url)
        for caption in chinese[:: len(chinese) // 5]:
            page.fill("#query", caption["caption"])
            page.keyboard.press("Enter")
            until(
                functools.partial(first_picture_is, page, caption["image_id"]),
                caption["caption"],
                20,
            )

            until(
                functools.partial(
                    page.evaluate, "document.querySelector('#results img').naturalWidth > 300"
                ),
                "its photo",
                20,
            )


def first_picture_is(page, image_id):
    source = page.evaluate("document.querySelector('#results img')?.getAttribute('src')")
    return source == f"pictures/{quote(image_id)}"
