"""The model card: what is known and nothing else."""

import dataclasses

import yaml

from megatron_interbert.hf import InterBertForPreTraining, model_card
from megatron_interbert.model.presets import PRESETS
from tests.hf.small import SMALL, build


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter():
    front, _ = front_matter(model_card(SMALL, {}))
    assert front == {
        "library_name": "transformers",
        "tags": ["interbert", "vision-and-language", "region-features"],
    }
    assert front_matter(model_card(SMALL, {"license": "apache-2.0"}))[0]["license"] == "apache-2.0"


def test_sizes_and_parameters_are_those_of_the_model():
    card = model_card(SMALL, {})
    for name in (
        "hidden size | 32",
        "interaction layers | 2",
        "text layers | 1",
        "feature dim | 20",
        "vocab size | 150",
        "fusion | product",
    ):
        assert f"| {name} |" in card

    model = build(InterBertForPreTraining)
    padding = (SMALL.padded_vocab_size - SMALL.vocab_size) * (SMALL.hidden_size + 1)
    assert f"{sum(p.numel() for p in model.parameters()) - padding:,} parameters" in card
    assert "157,0" in model_card(PRESETS["base"], {})
    assert "| `visual_feats` | [samples, regions, 24] |" in model_card(
        dataclasses.replace(SMALL, feature_dim=24), {}
    )


def test_facts_are_told_when_given():
    facts = {
        "detector": {"name": "bottom-up-attention", "revision": "r101"},
        "vocabulary": "ab" * 32,
        "iteration": 4321,
        "consumed_samples": 987654,
        "source": "runs/x/global_step4321",
        "topology": {"data": 8},  # of a manifest, not for a card
    }
    card = model_card(SMALL, facts)

    for words in (
        "name bottom-up-attention, revision r101",
        "abab",
        "4321",
        "987654",
        "runs/x/global_step4321",
    ):
        assert words in card

    assert "topology" not in card
    bare = model_card(SMALL, {"iteration": None})
    for words in ("## Training", "generated", "None", "steps", "license"):
        assert words not in bare


def test_generated_scenes_are_called_so():
    assert "generated scenes" in model_card(SMALL, {"generated": True})
    assert "generated" not in model_card(SMALL, {"generated": False})


def test_the_code_in_it_names_what_there_is():
    import megatron_interbert.hf as hf

    card = model_card(SMALL, {})
    assert "https://arxiv.org/abs/2003.13198" in card
    assert "import megatron_interbert.hf" in card
    assert all(
        hasattr(hf, name) and name in card
        for name in ("InterBertScorer", "InterBertForImageTextRetrieval")
    )
