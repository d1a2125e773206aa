"""Auto classes: each finds its own once `megatron_interbert.hf` is imported."""

import shutil
import subprocess
import sys

import pytest
import transformers

import megatron_interbert
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.hf import (
    InterBertConfig,
    InterBertForImageTextRetrieval,
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForSequenceClassification,
    InterBertModel,
)
from tests.corpus import VOCABULARY
from tests.hf.small import build

AUTO = {
    "AutoModel": InterBertModel,
    "AutoModelForPreTraining": InterBertForPreTraining,
    "AutoModelForMultipleChoice": InterBertForMultipleChoice,
    "AutoModelForSequenceClassification": InterBertForSequenceClassification,
    "AutoModelForNextSentencePrediction": InterBertForImageTextRetrieval,
}
DOORS_FIRST = """
import sys
import megatron_interbert.hf
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, megatron_interbert.__version__)
"""
TRANSFORMERS_FIRST = """
import sys
from transformers import AutoConfig
import megatron_interbert.hf
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
"""
ONLY_THE_PACKAGE = """
import sys
before = list(sys.meta_path)
import megatron_interbert
heavy = {"torch", "transformers", "numpy", "deepspeed"} & set(sys.modules)
print(sorted(heavy), sys.meta_path == before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(InterBertForPreTraining).save_pretrained(folder)
    return folder


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes(name, folder):
    auto = getattr(transformers, name)
    assert type(auto.from_pretrained(folder)) is AUTO[name]
    assert type(auto.from_config(InterBertConfig.from_pretrained(folder))) is AUTO[name]


def test_auto_config(folder):
    assert type(transformers.AutoConfig.from_pretrained(folder)) is InterBertConfig
    assert type(transformers.AutoConfig.for_model("interbert")) is InterBertConfig


def test_auto_tokenizer_splits_as_ours(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = CaptionTokenizer(str(tmp_path / "vocab.txt"))
    caption = "The old Cats, playing under 3 trees"
    assert len(theirs) == ours.vocab_size
    assert theirs(caption)["input_ids"] == [ours.cls, *ours.encode(caption, 40).ids, ours.sep]


def test_a_process_that_imports_the_doors(folder):
    assert run(DOORS_FIRST, folder) == f"InterBertModel {megatron_interbert.__version__}"


def test_a_process_that_imported_transformers_before(folder):
    assert run(TRANSFORMERS_FIRST, folder) == "InterBertConfig"


def test_importing_the_package_alone_is_light_and_hooks_nothing():
    assert run(ONLY_THE_PACKAGE) == "[] True"
