"""Map parameters to and from two foreign formats: the official InterBERT state dict, and BERT as
Hugging Face stores it.

Both have separate query, key and value matrices; here they are fused, ordered by head. The official
encoder numbers interaction and text layers consecutively (`layer.0` ..); its image layers are
`v_layer`. A `Link` names the foreign tensors that one of our parameters is made of, so conversion
goes tensor by tensor in both directions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_interbert.config.model import ModelConfig, model_config_from_dict
from megatron_interbert.errors import UsageError

LAYER = {  # ours -> BERT's, within a layer, except QKV
    "attention.output.weight": "attention.output.dense.weight",
    "attention_norm.linear_bias": "attention.output.dense.bias",
    "attention_norm.weight": "attention.output.LayerNorm.weight",
    "attention_norm.bias": "attention.output.LayerNorm.bias",
    "mlp.up.weight": "intermediate.dense.weight",
    "mlp.up.bias": "intermediate.dense.bias",
    "mlp.down.weight": "output.dense.weight",
    "mlp_norm.linear_bias": "output.dense.bias",
    "mlp_norm.weight": "output.LayerNorm.weight",
    "mlp_norm.bias": "output.LayerNorm.bias",
}
TEXT_EMBEDDING = {
    "text_embedding.word.weight": "bert.embeddings.word_embeddings.weight",
    "text_embedding.position.weight": "bert.embeddings.position_embeddings.weight",
    "text_embedding.token_type.weight": "bert.embeddings.token_type_embeddings.weight",
    "text_embedding.norm.weight": "bert.embeddings.LayerNorm.weight",
    "text_embedding.norm.bias": "bert.embeddings.LayerNorm.bias",
}
WORD_HEAD = {
    "msm_head.bias": "cls.predictions.bias",
    "msm_head.transform.dense.weight": "cls.predictions.transform.dense.weight",
    "msm_head.transform.dense.bias": "cls.predictions.transform.dense.bias",
    "msm_head.transform.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "msm_head.transform.norm.bias": "cls.predictions.transform.LayerNorm.bias",
}
SENTENCE_HEAD = {
    "sentence_head.dense.weight": "bert.pooler.dense.weight",
    "sentence_head.dense.bias": "bert.pooler.dense.bias",
    "sentence_head.output.weight": "classifier.weight",
    "sentence_head.output.bias": "classifier.bias",
}
OFFICIAL = {
    **TEXT_EMBEDDING,
    **WORD_HEAD,
    "image_embedding.feature.weight": "bert.v_embeddings.image_embeddings.weight",
    "image_embedding.feature.bias": "bert.v_embeddings.image_embeddings.bias",
    "image_embedding.location.weight": "bert.v_embeddings.image_location_embeddings.weight",
    "image_embedding.location.bias": "bert.v_embeddings.image_location_embeddings.bias",
    "image_embedding.norm.weight": "bert.v_embeddings.LayerNorm.weight",
    "image_embedding.norm.bias": "bert.v_embeddings.LayerNorm.bias",
    "text_pooler.dense.weight": "bert.t_pooler.dense.weight",
    "text_pooler.dense.bias": "bert.t_pooler.dense.bias",
    "image_pooler.dense.weight": "bert.v_pooler.dense.weight",
    "image_pooler.dense.bias": "bert.v_pooler.dense.bias",
    "itm_head.weight": "cls.bi_seq_relationship.weight",
    "itm_head.bias": "cls.bi_seq_relationship.bias",
    "mrm_head.transform.dense.weight": "cls.imagePredictions.transform.dense.weight",
    "mrm_head.transform.dense.bias": "cls.imagePredictions.transform.dense.bias",
    "mrm_head.transform.norm.weight": "cls.imagePredictions.transform.LayerNorm.weight",
    "mrm_head.transform.norm.bias": "cls.imagePredictions.transform.LayerNorm.bias",
    "mrm_head.decoder.weight": "cls.imagePredictions.decoder.weight",
    "mrm_head.decoder.bias": "cls.imagePredictions.decoder.bias",
    "choice_head.weight": "vil_logit.weight",
    "choice_head.bias": "vil_logit.bias",
}


DECODER = "cls.predictions.decoder.weight"  # in both formats: the word embedding again
# official downstream heads that our model lacks; kept for converting back
EXTRA = "official_extra."
PADDED = ("text_embedding.word.weight", "msm_head.bias")
# what DDP, Lightning, torch.compile and FSDP put before the names of what they wrap
WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod|_fsdp_wrapped_module)\.)+")
NORM = {"gamma": "weight", "beta": "bias"}
OLD_NORM = re.compile(r"\.(gamma|beta)$")


def fuse_qkv(parts: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    """Fuse query, key, value weights [H, H] (biases [H]) to head-major [3 H, H] ([3 H])."""
    # [heads, 3, D, ..]
    by_head = torch.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], dim=1)
    return by_head.reshape(-1, *parts[0].shape[1:])


def split_qkv(fused: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """Split head-major [3 H, ..] into query, key and value [H, ..]; inverts `fuse_qkv`."""
    by_head = fused.reshape(heads, 3, -1, *fused.shape[1:])
    return [by_head[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


@dataclass(frozen=True)
class Link:
    """Link a parameter of ours to the foreign tensors it is made of: one, or query, key and value
    of `heads` heads.
    """

    ours: str
    theirs: tuple[str, ...]
    heads: int = 0

    def to_ours(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        """Build our tensor, padding the vocabulary with zero rows."""
        if self.heads:
            return fuse_qkv(parts, self.heads)

        tensor = parts[0]
        if self.ours not in PADDED:
            return tensor

        return torch.cat(
            [tensor, tensor.new_zeros(config.padded_vocab_size - len(tensor), *tensor.shape[1:])]
        )

    def to_theirs(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        """Return the foreign tensors, in the order of `theirs`, without vocabulary padding."""
        if self.heads:
            return split_qkv(tensor, self.heads)
        return [tensor[: config.vocab_size] if self.ours in PADDED else tensor]


def stacks(config: ModelConfig) -> list[tuple[str, str, int, int, int]]:
    """Return (ours, official prefix, first official number, layers, heads) of each stack."""
    first_text = config.interaction_layers
    heads = config.num_attention_heads

    return [
        ("interaction", "bert.encoder.layer", 0, config.interaction_layers, heads),
        ("text_stream", "bert.encoder.layer", first_text, config.text_layers, heads),
        (
            "image_stream",
            "bert.encoder.v_layer",
            0,
            config.image_layers,
            config.image_attention_heads,
        ),
    ]


def _layer_links(ours: str, theirs: str, heads: int) -> list[Link]:
    links = [Link(f"{ours}.{name}", (f"{theirs}.{other}",)) for name, other in LAYER.items()]
    for kind in ("weight", "bias"):
        parts = tuple(
            f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")
        )
        links.append(Link(f"{ours}.attention.qkv.{kind}", parts, heads))

    return links


def _links(
    table: Mapping[str, str], stacks: Iterable[tuple[str, str, int, int, int]]
) -> list[Link]:
    links = [Link(ours, (theirs,)) for ours, theirs in table.items()]
    for ours, theirs, first, layers, heads in stacks:
        for number in range(layers):
            links += _layer_links(f"{ours}.layers.{number}", f"{theirs}.{first + number}", heads)

    return links


def official_links(config: ModelConfig) -> list[Link]:
    """Link every parameter of ours to its official names, all heads included."""
    return _links(OFFICIAL, stacks(config))


def bert_links(config: ModelConfig) -> list[Link]:
    """Link the text path to BERT: BERT's first layers are the interaction module, the next ones the
    text stream; its embeddings and word head are ours, pooler and classifier our sentence head.
    """
    return _links({**TEXT_EMBEDDING, **WORD_HEAD, **SENTENCE_HEAD}, stacks(config)[:2])


def plain_name(name: str) -> str:
    """Strip what wrappers of training put before a name, and turn the LayerNorm names of old BERT
    (gamma, beta) into those of today (weight, bias).
    """
    name = WRAPPERS.sub("", name)
    return OLD_NORM.sub(lambda old: f".{NORM[old[1]]}", name)


def to_official(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Convert a full state to official names, with the tied decoder; inverts `from_official`."""
    result = {}
    for link in official_links(config):
        if link.ours in state:
            result |= dict(zip(link.theirs, link.to_theirs(state[link.ours], config), strict=True))

    if "msm_head.bias" in state:
        result[DECODER] = result["bert.embeddings.word_embeddings.weight"]

    return result


def bert_name(name: str) -> str:
    """Return a parameter's name in BertForMaskedLM; a bare BertModel omits the prefix."""
    name = plain_name(name)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


OFFICIAL_CONFIG = {  # ours -> keys of the official JSON
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "interaction_layers": "num_hidden_layers",
    "text_layers": "t_num_hidden_layers",
    "image_layers": "v_num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "image_attention_heads": "v_num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "pooled_size": "bi_hidden_size",
    "feature_dim": "v_feature_size",
    "num_classes": "v_target_size",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "image_hidden_dropout": "v_hidden_dropout_prob",
    "image_attention_dropout": "v_attention_probs_dropout_prob",
    "initializer_range": "initializer_range",
}
FUSIONS = {"mul": "product", "sum": "sum"}


def config_from_official(values: Mapping[str, object], where: str) -> ModelConfig:
    """Read sizes from the official configuration JSON; UsageError if a key is missing."""
    for key in OFFICIAL_CONFIG.values():
        if key not in values:
            raise UsageError(
                f"{where}: '{key}' is missing; not an official InterBERT configuration"
            )

    fusion = FUSIONS.get(
        str(values.get("pooling_method", "mul")), str(values.get("pooling_method"))
    )
    sizes = {ours: values[theirs] for ours, theirs in OFFICIAL_CONFIG.items()}

    return model_config_from_dict({**sizes, "fusion": fusion}, where)


def config_to_official(config: ModelConfig) -> dict[str, object]:
    """Build the official configuration JSON of a model."""
    values = {theirs: getattr(config, ours) for ours, theirs in OFFICIAL_CONFIG.items()}
    same_for_image = {
        "v_hidden_size": config.hidden_size,
        "v_intermediate_size": config.ffn_hidden_size,
    }
    fixed = {
        "hidden_act": "gelu",
        "v_hidden_act": "gelu",
        "v_initializer_range": config.initializer_range,
    }
    method = next(name for name, ours in FUSIONS.items() if ours == config.fusion)

    return {**values, **same_for_image, **fixed, "pooling_method": method}
