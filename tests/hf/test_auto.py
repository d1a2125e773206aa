"""Auto classes: each finds its own, also in a process that only imported the package; importing stays light."""

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
ONLY_THE_PACKAGE = """
import importlib.util, sys
import megatron_interbert
assert not {"torch", "transformers", "numpy", "deepspeed"} & set(sys.modules), "importing the package must stay light"
assert importlib.util.find_spec("transformers")  # as libraries do to see whether it is there; nothing may be lost by it
from transformers import AutoModel
assert not [finder for finder in sys.meta_path if getattr(finder, "__module__", "") == "megatron_interbert"], "hook left behind"
model = AutoModel.from_pretrained(sys.argv[1])
print(type(model).__name__, megatron_interbert.__version__)
"""
TRANSFORMERS_FIRST = """
import sys
from transformers import AutoConfig
import megatron_interbert
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
"""
DOORS_THAT_DO_NOT_FIT = """
import sys, warnings
import megatron_interbert
sys.modules["megatron_interbert.hf"] = None  # what an import error of the doors looks like
with warnings.catch_warnings(record=True) as caught:
    import transformers
print(transformers.__name__, *[w.message for w in caught if "megatron_interbert" in str(w.message)])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(InterBertForPreTraining).save_pretrained(folder)
    return folder


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120)
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
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), CaptionTokenizer(str(tmp_path / "vocab.txt"))
    caption = "The old Cats, playing under 3 trees"
    assert len(theirs) == ours.vocab_size
    assert theirs(caption)["input_ids"] == [ours.cls, *ours.encode(caption, 40).ids, ours.sep]


def test_a_process_that_only_imports_the_package(folder):
    assert run(ONLY_THE_PACKAGE, folder) == f"InterBertModel {megatron_interbert.__version__}"


def test_a_process_that_imported_transformers_before(folder):
    assert run(TRANSFORMERS_FIRST, folder) == "InterBertConfig"


def test_transformers_stays_usable_where_the_doors_do_not_fit_it():
    assert run(DOORS_THAT_DO_NOT_FIT).startswith("transformers megatron_interbert: no Auto classes for InterBERT:")
