"""The Hugging Face configuration holds a ModelConfig under its own names, and refuses what no model
can be.
"""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import InterBertConfig, InterBertModel
from megatron_interbert.model.presets import PRESETS
from tests.hf.small import SMALL


def test_defaults_are_those_of_the_model():
    assert InterBertConfig().model_config() == ModelConfig() == PRESETS["base"]


def test_there_and_back_through_a_folder(tmp_path):
    sizes = dataclasses.replace(SMALL, fusion="sum", hidden_dropout=0.25)
    config = InterBertConfig.from_model_config(sizes, num_labels=5, training_facts={"iteration": 7})
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert dataclasses.asdict(sizes).items() <= stored.items()
    assert stored["model_type"] == "interbert"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is InterBertConfig
    assert loaded.model_config() == sizes
    assert loaded.num_labels == 5
    assert loaded.training_facts == {"iteration": 7}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": "many"}, "hidden_size is 'many', expected a whole number from 1"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5, expected a whole number from 1"),
        ({"hidden_size": None}, "hidden_size is None, expected a whole number from 1"),
        ({"text_layers": True}, "text_layers is True, expected a whole number from 0"),
        ({"image_layers": -1}, "image_layers is -1, expected a whole number from 0 to 1000"),
        (
            {"text_layers": 10**8},
            "text_layers is 100000000, expected a whole number from 0 to 1000",
        ),
        ({"vocab_size": 0}, "vocab_size is 0, expected the size of a whole model: 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 12"),
        ({"fusion": "mean"}, "fusion is 'mean', expected 'product' or 'sum'"),
        ({"fusion": 1}, "fusion is 1, expected a text"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0, expected a number from 0 up to 1"),
        (
            {"initializer_range": "0.02"},
            "initializer_range is '0.02', expected a finite number of 0 or more",
        ),
    ],
)
def test_wrong_values_name_their_key(values, message):
    with pytest.raises(UsageError, match=message):
        InterBertConfig(**values)


def test_values_set_later_are_checked_by_the_model():
    config = InterBertConfig.from_model_config(SMALL)
    config.image_attention_heads = 5
    with pytest.raises(UsageError, match="not a multiple of image_attention_heads 5"):
        InterBertModel(config)


def test_whole_numbers_serve_as_shares():
    assert InterBertConfig(hidden_dropout=0).model_config().hidden_dropout == 0.0


def test_equal_when_all_sizes_are():
    assert InterBertConfig.from_model_config(SMALL) == InterBertConfig.from_model_config(SMALL)
    assert InterBertConfig.from_model_config(SMALL) != InterBertConfig.from_model_config(
        dataclasses.replace(SMALL, feature_dim=21)
    )
