"""Names and layouts of other codebases: the official InterBERT state dict and BERT in Hugging Face form.

Both use separate query, key and value matrices; ours are one, ordered by head. The official encoder numbers interaction
and text layers through (`layer.0` .. ), its image layers are `v_layer`.
"""

from collections.abc import Mapping

import torch

from megatron_interbert.config import ModelConfig
from megatron_interbert.errors import UsageError

LAYER = {  # ours -> BERT's, inside one layer; QKV apart
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


def fuse_qkv(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Query, key, value weights [H, H] (or biases [H]) -> head-major [3 H, H] (or [3 H])."""
    by_head = torch.stack([p.reshape(heads, -1, *p.shape[1:]) for p in parts], dim=1)  # [heads, 3, D, ..]
    return by_head.reshape(-1, *parts[0].shape[1:])


def split_qkv(fused: torch.Tensor, heads: int) -> list[torch.Tensor]:
    """The inverse of `fuse_qkv`."""
    by_head = fused.reshape(heads, 3, -1, *fused.shape[1:])
    return [by_head[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


def stacks(config: ModelConfig) -> list[tuple[str, str, int, int, int]]:
    """(ours, official prefix, first official number, layers, heads) of the three stacks."""
    first_text, heads = config.interaction_layers, config.num_attention_heads
    return [
        ("interaction", "bert.encoder.layer", 0, config.interaction_layers, heads),
        ("text_stream", "bert.encoder.layer", first_text, config.text_layers, heads),
        ("image_stream", "bert.encoder.v_layer", 0, config.image_layers, config.image_attention_heads),
    ]


def _layer_from(source: Mapping[str, torch.Tensor], ours: str, theirs: str, heads: int) -> dict[str, torch.Tensor]:
    result = {f"{ours}.{name}": source[f"{theirs}.{other}"] for name, other in LAYER.items()}
    for kind in ("weight", "bias"):
        parts = [source[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        result[f"{ours}.attention.qkv.{kind}"] = fuse_qkv(parts, heads)
    return result


def pad_vocabulary(state: dict[str, torch.Tensor], config: ModelConfig, where: str) -> dict[str, torch.Tensor]:
    """Zero rows up to the padded vocabulary for the word embedding and the output bias; UsageError when sizes differ."""
    for name in ("text_embedding.word.weight", "msm_head.bias"):
        if name in state:
            if len(state[name]) != config.vocab_size:
                raise UsageError(
                    f"{where}: vocabulary of {len(state[name])} entries, the model has {config.vocab_size};"
                    " give the vocabulary the checkpoint was made with (--vocab-file)"
                )
            rows = config.padded_vocab_size - config.vocab_size
            state[name] = torch.cat([state[name], state[name].new_zeros(rows, *state[name].shape[1:])])
    return state


def from_official(
    source: Mapping[str, torch.Tensor], config: ModelConfig, where: str = "official checkpoint"
) -> dict[str, torch.Tensor]:
    """Full state in our names from an official InterBERT state dict (pretraining or downstream form)."""
    source = {name.removeprefix("module."): tensor for name, tensor in source.items()}
    try:
        state = {ours: source[theirs] for ours, theirs in OFFICIAL.items() if theirs in source}
        for ours, theirs, first, layers, heads in stacks(config):
            for number in range(layers):
                state |= _layer_from(source, f"{ours}.layers.{number}", f"{theirs}.{first + number}", heads)
    except KeyError as error:
        raise UsageError(f"{where}: {error.args[0]} is missing; not an official InterBERT state dict of these sizes") from error
    return pad_vocabulary(state, config, where)


def to_official(state: Mapping[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The inverse of `from_official`: full state in our names -> official names, the tied decoder included."""
    state = {
        name: tensor[: config.vocab_size] if name in ("text_embedding.word.weight", "msm_head.bias") else tensor
        for name, tensor in state.items()
    }
    result = {theirs: state[ours] for ours, theirs in OFFICIAL.items() if ours in state}
    if "msm_head.bias" in state:
        result["cls.predictions.decoder.weight"] = state["text_embedding.word.weight"]
    for ours, theirs, first, layers, heads in stacks(config):
        for number in range(layers):
            mine, other = f"{ours}.layers.{number}", f"{theirs}.{first + number}"
            result |= {f"{other}.{name}": state[f"{mine}.{key}"] for key, name in LAYER.items()}
            for kind in ("weight", "bias"):
                for part, tensor in zip(
                    ("query", "key", "value"), split_qkv(state[f"{mine}.attention.qkv.{kind}"], heads), strict=True
                ):
                    result[f"{other}.attention.self.{part}.{kind}"] = tensor
    return result


def from_bert(source: Mapping[str, torch.Tensor], config: ModelConfig, where: str = "BERT checkpoint") -> dict[str, torch.Tensor]:
    """Partial state from BERT in Hugging Face form: its first layers become the interaction module, the next ones the
    text stream, its embeddings ours, its word head ours where it has one."""
    source = {
        ("" if name.startswith(("bert.", "cls.")) else "bert.") + name.replace(".gamma", ".weight").replace(".beta", ".bias"): t
        for name, t in source.items()
    }
    try:
        state = {ours: source[theirs] for ours, theirs in TEXT_EMBEDDING.items()}
        state |= {ours: source[theirs] for ours, theirs in WORD_HEAD.items() if theirs in source}
        for ours, theirs, first, layers, heads in stacks(config)[:2]:
            for number in range(layers):
                state |= _layer_from(source, f"{ours}.layers.{number}", f"{theirs}.{first + number}", heads)
    except KeyError as error:
        raise UsageError(
            f"{where}: {error.args[0]} is missing; BERT needs {config.interaction_layers + config.text_layers}"
            " layers for this model"
        ) from error
    return pad_vocabulary(state, config, where)
