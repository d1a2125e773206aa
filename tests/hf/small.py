"""A small model, padded inputs for it, and weights of other codebases by our names: what the tests
here share.
"""

import torch

from megatron_interbert.hf import InterBertConfig
from megatron_interbert.weights.fitting import from_foreign
from megatron_interbert.weights.foreign import to_official
from tests.sizes import WIDER_WEIGHTS as SMALL

__all__ = ["SMALL", "from_foreign", "to_official"]

TEXT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
TEXT_HOLES = torch.tensor([[0, 1, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0, 0]])
REGIONS = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
REGION_HOLES = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 1, 0, 1], [1, 1, 1, 0, 0]])


def build(model_class, seed=0, **extra):
    """A model of random weights in evaluation mode; `extra` goes to the configuration."""
    torch.manual_seed(seed)
    model = model_class(InterBertConfig.from_model_config(SMALL, **extra)).eval()

    with torch.no_grad():
        # biases of 0 and gains of 1 would hide that they are mixed up
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "msm_head.bias" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)

    return model


def padded_inputs(text=TEXT, regions=REGIONS, seed=0):
    """Inputs of three samples with random content everywhere, also where the masks are 0."""
    generator = torch.Generator().manual_seed(seed)
    samples, tokens = text.shape

    return {
        "input_ids": torch.randint(0, SMALL.vocab_size, (samples, tokens), generator=generator),
        "attention_mask": text,
        "token_type_ids": torch.randint(0, 2, (samples, tokens), generator=generator),
        "visual_feats": torch.randn(
            samples, regions.shape[1], SMALL.feature_dim, generator=generator
        ),
        "visual_pos": torch.rand(samples, regions.shape[1], 5, generator=generator),
        "visual_attention_mask": regions,
    }


def text_only(inputs):
    """The same without the visual inputs."""
    return {name: value for name, value in inputs.items() if not name.startswith("visual")}


def pretraining_labels(seed=0, soft=True):
    """Every kind of label for `padded_inputs`, also at places that are padding."""
    generator = torch.Generator().manual_seed(seed + 100)
    labels = torch.randint(0, SMALL.vocab_size, TEXT.shape, generator=generator)
    targets = torch.rand(*REGIONS.shape, SMALL.num_classes, generator=generator).softmax(dim=-1)

    return {
        "labels": labels.where(torch.rand(TEXT.shape, generator=generator) < 0.5, -100),
        "region_mask": torch.tensor([[1, 0, 0, 1, 1], [0, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool(),
        "region_targets": targets if soft else targets.argmax(dim=-1),
        "matched_label": torch.tensor([0, 1, 0]),
    }
