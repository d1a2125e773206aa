"""Test that weights of other models, incomplete ones, and ones of other shapes are refused in one
line that names the parameter, with nothing written.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megatron_interbert.errors import UsageError
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import PRESETS
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.weights.foreign import official_links, to_official
from megatron_interbert.weights.other_models import refuse_other_models
from megatron_interbert.weights.sources import open_weights
from tests.corpus import CLASSES, FEATURES, VOCABULARY
from tests.launching import TINY, launch, pretrain
from tests.shared import SHARED, needs_shared
from tests.sizes import FOR_EIGHT_RANKS as SIZES
from tests.tools.test_convert import convert, random_source

LAYER = [
    *(f"attention.self.{part}" for part in ("query", "key", "value")),
    *("attention.output.dense", "attention.output.LayerNorm"),
    *("intermediate.dense", "output.dense", "output.LayerNorm"),
]
# parameters that the authors' own files have beside those of a BERT (layer 0 of each kind), which
# shows whose they are; the first of each is the one to be named
AUTHORS = {
    "ViLBERT": (
        "bert.",
        [
            *(
                f"bert.encoder.c_layer.0.biattention.{part}{side}"
                for side in (1, 2)
                for part in ("query", "key", "value")
            ),
            "bert.encoder.c_layer.0.biOutput.dense1",
            "bert.encoder.c_layer.0.v_intermediate.dense",
        ],
    ),
    "LXMERT": (
        "module.bert.",
        [
            "module.bert.encoder.visn_fc.visn_fc",
            *(f"module.bert.encoder.r_layers.0.{part}" for part in LAYER),
            "module.bert.encoder.x_layers.0.visual_attention.att.query",
        ],
    ),
    "VisualBERT": (
        "bert.bert.",
        [
            "bert.bert.embeddings.token_type_embeddings_visual",
            "bert.bert.embeddings.position_embeddings_visual",
            "bert.bert.embeddings.projection",
        ],
    ),
    "UNITER": (
        "uniter.",
        ["uniter.img_embeddings.img_linear", "uniter.img_embeddings.mask_embedding"],
    ),
    "Oscar or VinVL": ("bert.", ["bert.img_embedding"]),
    "VL-BERT": ("module.vlbert.", ["module.vlbert.visual_ln_text"]),
    "VLP": ("bert.", ["vis_embed.0", "vis_pe_embed.0"]),
    "a VOLTA model": ("bert.", ["bert.encoder.layer.0.attention_self.v_query"]),
    "ALBEF or BLIP": ("text_encoder.bert.", ["visual_encoder.blocks.0.attn.qkv", "vision_proj"]),
    "CLIP": ("bert.", ["visual.conv1"]),  # Chinese CLIP: its text encoder is a whole BERT
    "ViLT": ("", ["transformer.patch_embed.proj"]),
    "OFA": ("", ["encoder.embed_images.conv1"]),
}
# class of transformers, its configuration's changes, whose weights it makes
TRANSFORMERS = [
    ("LxmertForPreTraining", {"l_layers": 1, "x_layers": 1, "r_layers": 1}, "LXMERT"),
    ("VisualBertForPreTraining", {}, "VisualBERT"),
    ("ViltForMaskedLM", {}, "ViLT"),
    ("RobertaForMaskedLM", {}, "RoBERTa"),
    ("XLMRobertaModel", {}, "RoBERTa"),
    ("ElectraForPreTraining", {}, "ELECTRA"),
    ("AlbertForPreTraining", {}, "ALBERT"),
    ("DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_heads": 4}, "DistilBERT"),
    ("DistilBertModel", {"dim": 32, "hidden_dim": 48, "n_heads": 4}, "DistilBERT"),
    ("ErnieModel", {}, "ERNIE"),
    ("BertGenerationEncoder", {}, "'bert-generation'"),
]


def make(class_name, **changes):
    """Build a small model of transformers with random weights."""
    model_class = getattr(transformers, class_name)
    sizes = {
        "vocab_size": 150,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    return model_class(model_class.config_class(**{**sizes, **changes}))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Return an official state dict of SIZES, made without the readers under test."""
    state = random_source(SIZES, tmp_path_factory.mktemp("ours") / "ours")
    return to_official(state, SIZES)


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Return a function that checks that a path is refused, whatever it is said to be, by the
    converter and by --init-from, with one line, and that nothing is written.
    """
    (tmp_path / "sizes.json").write_text(json.dumps(dataclasses.asdict(SIZES)))

    def check(path, *words, kinds=("auto", "official", "bert")):
        before = sorted(tmp_path.rglob("*"))
        lines = []

        for kind in kinds:
            with pytest.raises(UsageError) as error:
                convert(
                    monkeypatch,
                    *(path, "--from", kind, "--model", tmp_path / "sizes.json"),
                    *("--to", "sharded", "--output", tmp_path / "new" / "out"),
                )
            lines.append(str(error.value))

        if "auto" in kinds:
            with pytest.raises(UsageError) as error:
                load_initial_weights(InterBert(SIZES), SIZES, str(path), ParallelState())
            lines.append(str(error.value))
            assert lines[-1].startswith("--init-from ")

        for line in lines:
            assert "\n" not in line
            assert all(word in line for word in (str(path), *words)), line

        assert sorted(tmp_path.rglob("*")) == before

    return check


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_files_of_other_models_are_named(name, official, tmp_path, refuse):
    """Check each with the rest of its own names, and added to a whole InterBERT or BERT of the
    right shapes, where nothing else is wrong.
    """
    prefix, parts = AUTHORS[name]
    telling = {f"{part}.weight": torch.zeros(4, 4) for part in parts}
    text = {
        prefix + key.removeprefix("bert."): tensor
        for key, tensor in make("BertForMaskedLM").state_dict().items()
        if key.startswith("bert.")
    }
    torch.save({"model": {**telling, **text}}, tmp_path / "own.bin")
    refuse(tmp_path / "own.bin", f"weights of {name}", next(iter(telling)))

    torch.save({**official, **telling}, tmp_path / "interbert.bin")
    refuse(tmp_path / "interbert.bin", f"weights of {name}", next(iter(telling)))

    torch.save({**make("BertModel").state_dict(), **telling}, tmp_path / "bert.bin")
    refuse(tmp_path / "bert.bin", f"weights of {name}", next(iter(telling)))


@pytest.mark.parametrize(("class_name", "changes", "name"), TRANSFORMERS)
def test_folders_of_other_models_are_named(class_name, changes, name, tmp_path, refuse):
    make(class_name, **changes).save_pretrained(tmp_path / "hf")
    kinds = ("auto", "bert") if name != "'bert-generation'" else ("bert",)
    refuse(tmp_path / "hf", f"weights of {name}", kinds=kinds)


def test_a_roberta_with_the_names_of_a_bert_is_named(tmp_path, refuse):
    torch.save(make("RobertaModel", type_vocab_size=1).state_dict(), tmp_path / "bare.bin")
    words = ("weights of RoBERTa", "vocabulary is not one of word pieces", "one row")
    refuse(tmp_path / "bare.bin", *words, kinds=("auto", "bert"))


def test_only_the_official_heads_may_be_beside_it(official, tmp_path, refuse, monkeypatch):
    heads = {
        "vil_prediction.weight": torch.zeros(7, SIZES.pooled_size),
        "vil_prediction.bias": torch.zeros(7),
        "vil_logit.weight": torch.zeros(1, SIZES.pooled_size),
        "vil_logit.bias": torch.zeros(1),
        "vision_logit.weight": torch.zeros(1, SIZES.hidden_size),
        "linguisic_logit.bias": torch.zeros(1),
    }
    wrapped = {f"module.{name}": tensor for name, tensor in {**official, **heads}.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "whole.bin")
    source = open_weights(tmp_path / "whole.bin", config=SIZES)
    assert source.kind == "official"
    assert {"choice_head.weight", "official_extra.vil_prediction.bias"} <= set(source.layouts)
    assert torch.equal(
        source.get("text_embedding.norm.bias"), official["bert.embeddings.LayerNorm.bias"]
    )

    for stranger in (
        "bert.encoder.layer.4.output.dense.bias",  # deeper than the model
        "bert.encoder.v_layer.0.gate.weight",
        "bert.embeddings.task_embeddings.weight",
        "vil_logits.weight",
        "caption_head.weight",
    ):
        torch.save(
            {**official, **heads, stranger: torch.zeros(2), "zzz": torch.zeros(1)},
            tmp_path / "more.bin",
        )
        refuse(
            tmp_path / "more.bin",
            f"{stranger} (and 1 more) is no parameter of an official InterBERT state dict of these"
            " sizes (2 + 2 + 1 layers); ",
            kinds=("auto", "official"),
        )

    twice = {**official, "module.cls.predictions.bias": official["cls.predictions.bias"]}
    torch.save(twice, tmp_path / "twice.bin")
    refuse(
        tmp_path / "twice.bin",
        "cls.predictions.bias and module.cls.predictions.bias are the same parameter",
    )


def test_every_needed_parameter_must_be_there(official, tmp_path, refuse):
    """Check one parameter of each kind, and that a head is whole or absent."""
    for name in (
        "bert.embeddings.word_embeddings.weight",
        "bert.v_embeddings.image_location_embeddings.bias",
        "bert.encoder.layer.3.attention.self.key.bias",
        "bert.encoder.v_layer.0.output.LayerNorm.weight",
        "bert.t_pooler.dense.weight",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.imagePredictions.decoder.bias",
        "cls.bi_seq_relationship.weight",
    ):
        torch.save(
            {key: tensor for key, tensor in official.items() if key != name},
            tmp_path / "less.bin",
        )
        refuse(
            tmp_path / "less.bin",
            f"{name} is missing; not an official InterBERT state dict",
            kinds=("auto", "official"),
        )

    headless = {name: tensor for name, tensor in official.items() if name.startswith("bert.")}
    torch.save(headless, tmp_path / "headless.bin")
    assert not [
        name
        for name in open_weights(tmp_path / "headless.bin", config=SIZES).layouts
        if "_head" in name
    ]


def test_shapes_are_always_checked(official, tmp_path, refuse):
    """Check every parameter of an official state dict with one row too many, and a BERT's."""
    names = {name for link in official_links(SIZES) for name in link.theirs} & set(official)
    heads = {
        "vil_logit.weight": torch.zeros(1, SIZES.pooled_size),
        "vil_logit.bias": torch.zeros(1),
        "vision_logit.weight": torch.zeros(1, SIZES.hidden_size),
    }
    whole = {**official, **heads}
    assert len(names) > 90

    for name in sorted(names | set(heads) | {"cls.predictions.decoder.weight"}):
        wrong = torch.zeros(len(whole[name]) + 1, *whole[name].shape[1:])
        torch.save({**whole, name: wrong}, tmp_path / "wrong.bin")
        with pytest.raises(UsageError) as error:
            open_weights(tmp_path / "wrong.bin", config=SIZES)
        assert f"{name} has shape {[*wrong.shape]}, expected {[*whole[name].shape]}; " in str(
            error.value
        )

    refuse(tmp_path / "wrong.bin", "vision_logit.weight has shape", kinds=("auto", "official"))

    bert = make("BertForMaskedLM").state_dict()
    for name, wrong in {
        "bert.embeddings.word_embeddings.weight": (151, 32),
        "bert.embeddings.position_embeddings.weight": (42, 32),  # those of a RoBERTa
        "bert.encoder.layer.2.intermediate.dense.weight": (32, 48),
        "bert.encoder.layer.3.attention.self.value.weight": (32,),
        "cls.predictions.bias": (150, 1),
    }.items():
        torch.save({**bert, name: torch.zeros(wrong)}, tmp_path / "bert.bin")
        refuse(
            tmp_path / "bert.bin",
            f"{name} has shape {[*wrong]}, expected {[*bert[name].shape]}; ",
            kinds=("auto", "bert"),
        )


def test_exported_folders_are_checked_too(tmp_path, monkeypatch, refuse):
    random_source(SIZES, tmp_path / "ours")
    convert(
        monkeypatch, tmp_path / "ours", "--to", "huggingface", "--output", folder := tmp_path / "hf"
    )
    source = open_weights(folder)
    whole = {f"interbert.{name}": source.get(name) for name in source.layouts}
    norm = "interbert.text_embedding.norm.bias"
    for changes, message in (
        ({norm: None}, "text_embedding.norm.bias is missing; not an InterBERT of these sizes"),
        ({"interbert.itm_head.bias": None}, "itm_head.bias is missing"),
        ({norm: torch.zeros(33)}, "text_embedding.norm.bias has shape [33], expected [32]"),
        ({"interbert.c_layer.weight": torch.zeros(3)}, "c_layer.weight is no parameter of an"),
        ({"visual.weight": torch.zeros(3)}, "visual.weight is no parameter of an"),
    ):
        tensors = {**whole, **changes}
        save_file(
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            folder / "model.safetensors",
        )
        refuse(folder, message, kinds=("auto", "huggingface"))


@needs_shared
def test_a_vilbert_of_equal_shapes_is_refused(tmp_path, monkeypatch):
    folder = SHARED / "data" / "field" / "vilbert_weights"
    for kind in ("auto", "official", "bert"):
        with pytest.raises(UsageError, match=r"weights of ViLBERT.*encoder\.c_layer\.0") as error:
            convert(
                monkeypatch,
                *(folder / "vilbert_equal_sizes.bin", "--from", kind),
                *("--model", folder / "sizes.json", "--to", "sharded", "--output", tmp_path / "x"),
            )
        assert str(folder / "vilbert_equal_sizes.bin") in str(error.value)

    assert list(tmp_path.iterdir()) == []


def test_other_weights_do_not_start_a_run(store, tmp_path):
    """Check with a program's exit code, and a run that would keep what it makes."""
    sizes = dataclasses.replace(
        PRESETS["tiny"], vocab_size=len(VOCABULARY), feature_dim=FEATURES, num_classes=CLASSES
    )
    state = to_official(random_source(sizes, tmp_path / "ours"), sizes)
    stranger = "bert.encoder.c_layer.0.biattention.query1.weight"
    torch.save({**state, stranger: torch.zeros(64, 64)}, tmp_path / "vilbert.bin")
    code, out, err = launch(
        *pretrain("--data-path", store, *TINY, "--train-iters", 1, "--save", tmp_path / "run"),
        *("--init-from", tmp_path / "vilbert.bin"),
    )
    assert code == 2, out + err
    assert err.splitlines()[-1] == (
        f"error: --init-from {tmp_path}/vilbert.bin: weights of ViLBERT, another model (it has"
        f" {stranger}); give weights of InterBERT, or of BERT to start from"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "vilbert.bin"]


def test_blip_is_not_called_clip():
    """Check the names that transformers gives to the towers of both."""
    tower = "vision_model.encoder.layers.0.self_attn."
    for name, model in ((f"{tower}qkv.weight", "ALBEF or BLIP"), (f"{tower}q_proj.weight", "CLIP")):
        with pytest.raises(UsageError, match=f"weights of {model}, another model"):
            refuse_other_models([name, "visual_projection.weight"], "x")
