"""Test the README's code blocks, unchanged, in a copy of the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.launching import ENVIRONMENT, ROOT
from tests.shared import SHARED, needs_shared
from tests.test_wheel import copy_of_checkout
from tests.tools.test_extract_features import make_detector

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FEATURES = 64  # of the generated corpus that the quickstart trains on


def save_detector(folder):
    """Save a random detector with the quickstart's number of features."""
    torch.manual_seed(0)
    for part in make_detector("rt_detr", FEATURES):
        part.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Copy the checkout, and add what a reader of the README has: a photo and a detector."""
    place = copy_of_checkout(tmp_path_factory.mktemp("readme") / "checkout")
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    photo = min((SHARED / "data" / "photos").glob("*.jpg"))
    shutil.copy(photo, place / "photo.jpg")
    save_detector(place / "PekingU" / "rtdetr_r50vd")
    return place


def variables(place):
    """Return variables that shorten long commands and name the files the README leaves open."""
    tsv = SHARED / "data" / "lxmert_tsv"
    return {
        **ENVIRONMENT,
        "PYTHONPATH": str(place),
        "VENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "STEPS": "20",
        "SCENES": "600",
        "MODEL": "tiny",
        "FEATURES": str(tsv / "train2014_obj36.tsv"),
        "CAPTIONS": str(SHARED / "data" / "region_features" / "captions.jsonl"),
        "VOCABULARY": str(SHARED / "data" / "vocab" / "bert-base-uncased-vocab.txt"),
    }


@needs_shared
def test_every_block_runs_as_it_stands(checkout):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert [language for language, _ in blocks].count("python") == 3
    assert len(blocks) >= 7
    for language, code in blocks:
        shell = ["bash", "-euc", code] if language == "bash" else [sys.executable, "-c", code]
        ended = subprocess.run(
            shell,
            cwd=checkout,
            env=variables(checkout),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert ended.returncode == 0, code + ended.stdout + ended.stderr
        if "rank(" in code:
            assert ended.stdout.startswith("[Ranked(index=")

    result = checkout / "runs/retrieval/evaluation/retrieval/result.json"
    assert json.loads(result.read_text())["protocol"] == "finetuned"


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
