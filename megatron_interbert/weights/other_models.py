"""Recognise weights of other models of the field, by the names of their parameters."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from megatron_interbert.errors import UsageError

INSTEAD = "give weights of InterBERT, or of BERT to start from"


class OtherModel(NamedTuple):
    """Hold a model's name, the beginnings of parts of parameter names that tell it from InterBERT
    and BERT, and a reason why it cannot be started from, if there is one to add.
    """

    name: str
    telling: tuple[str, ...]
    reason: str = ""


# The first one found is named, so models whose names are part of another's come later.
OTHER_MODELS = (
    OtherModel("ViLBERT", ("c_layer.", "biattention.")),
    OtherModel("LXMERT", ("lxmert.", "r_layers.", "x_layers.", "visn_fc.", "visual_attention.")),
    OtherModel(
        "VisualBERT",
        (
            "visual_bert.",
            "token_type_embeddings_visual.",  # the authors' names, and mmf's
            "position_embeddings_visual.",
            "visual_token_type_embeddings.",  # those of transformers
            "visual_position_embeddings.",
            "embeddings.visual_projection.",
        ),
    ),
    OtherModel("UNITER", ("uniter.", "img_embeddings.")),
    OtherModel("VL-BERT", ("vlbert.", "visual_1x1_text.", "visual_ln_text.")),
    OtherModel("Oscar or VinVL", ("img_embedding.", "img_layer_norm.")),
    OtherModel("VLP", ("vis_embed.", "vis_pe_embed.")),
    OtherModel("a VOLTA model", ("attention_self.",)),
    OtherModel("ViLT", ("vilt.", "transformer.patch_embed.", "text_embeddings.word_embeddings.")),
    OtherModel("METER or BridgeTower", ("bridgetower.", "cross_modal_")),
    OtherModel("FLAVA", ("flava.", "image_to_mm_projection.", "multimodal_model.")),
    OtherModel("BLIP-2", ("qformer.", "Qformer.")),
    OtherModel(
        "ALBEF or BLIP", ("visual_encoder.", "vision_proj.", "text_decoder.", "self_attn.qkv.")
    ),
    OtherModel("OFA", ("embed_images.",)),
    OtherModel(
        "CLIP",
        (
            "visual.conv1.",
            "visual.transformer.",
            "visual.trunk.",
            "vision_model.",
            "visual_projection.",
            "text_projection",
            "logit_scale",
        ),
    ),
    OtherModel(
        "RoBERTa",
        ("roberta.", "sentence_encoder."),
        "whose vocabulary is not one of word pieces as BERT's is",
    ),
    OtherModel("DistilBERT", ("distilbert.", "transformer.layer.")),
    OtherModel("ALBERT", ("albert.", "albert_layer_groups.")),
    OtherModel("ELECTRA", ("electra.", "discriminator_predictions.", "generator_predictions.")),
    OtherModel("DeBERTa", ("deberta.",)),
    OtherModel("ERNIE", ("ernie.", "task_type_embeddings.")),
)
# `model_type` of transformers' config.json, where it is not the name in small letters
MODEL_TYPES = {
    "albef": "ALBEF or BLIP",
    "blip": "ALBEF or BLIP",
    "bridgetower": "METER or BridgeTower",
    "chineseclip": "CLIP",
    "debertav2": "DeBERTa",
    "xlmroberta": "RoBERTa",
    "camembert": "RoBERTa",
}


def refuse_other_models(names: Iterable[str], where: str) -> None:
    """Raise UsageError, which names the model and the parameter that tells it, if the parameters
    are those of a known other model.
    """
    names = list(names)

    for model in OTHER_MODELS:
        pattern = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, model.telling))})")
        telling = next((name for name in names if pattern.search(name)), None)
        if telling is not None:
            raise UsageError(refusal(where, model.name, f"it has {telling[:200]}", model.reason))


def refuse_roberta(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise UsageError for a bare RoBERTa: its names are BERT's, but it has one token type only."""
    name = "bert.embeddings.token_type_embeddings.weight"
    if shapes.get(name, ())[:1] == (1,):
        roberta = next(model for model in OTHER_MODELS if model.name == "RoBERTa")
        raise UsageError(refusal(where, roberta.name, f"{name} has one row", roberta.reason))


def refuse_model_type(found: object, where: str) -> None:
    """Raise UsageError if the `model_type` of a BERT's config.json is given and another's."""
    if found in (None, "bert"):
        return

    plain = re.sub(r"[-_]", "", str(found).lower())
    by_type = {model.name.lower().replace("-", ""): model for model in OTHER_MODELS}
    known = by_type.get(MODEL_TYPES.get(plain, plain).lower().replace("-", ""))
    name = known.name if known else f"'{str(found)[:60]}'"
    raise UsageError(
        refusal(where, name, f"model_type is {found!r:.60}", known.reason if known else "")
    )


def refusal(where: str, model: str, evidence: str, reason: str = "") -> str:
    """Return the line that says whose weights these are and how that is known."""
    because = f", {reason}" if reason else ""
    return f"{where}: weights of {model}, another model{because} ({evidence}); {INSTEAD}"
