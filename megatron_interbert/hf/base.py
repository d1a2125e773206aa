"""Define the base of all Hugging Face classes: the packed core, first weights, strict loading, and
saving with a model card.
"""

import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.hf.model_card import model_card
from megatron_interbert.hf.padding import PaddedInputs, Slots, pack_padded, to_padded
from megatron_interbert.hf.stream import TorchStream
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.layers import VocabParallelEmbedding
from megatron_interbert.weights.foreign_files import read_index

HEADS = ("msm", "mrm", "itm", "choice", "sentence")
# files hold a tensor for each expert, our layers one for all
register_checkpoint_conversion_mapping(
    InterBertConfig.model_type,
    [
        WeightConverter(
            [f".mlp.experts.*.{part}"], f".mlp.experts.{part}", operations=[MergeModulelist(dim=0)]
        )
        for part in ("up.weight", "up.bias", "down.weight")
    ],
    overwrite=True,
)
# parameters of downstream tasks, which pretrained weights lack
NEW_BY_NATURE = re.compile(r"classifier\..*|interbert\.choice_head\..*")
LISTED = 20  # wrong parameters that an error names; the rest are counted


class InterBertPreTrainedModel(PreTrainedModel):
    """Hold the packed core with the heads that the class names.

    In all classes its parameters are called `interbert.<our name>`.
    """

    config_class = InterBertConfig
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    heads: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBert(config.model_config(), self.heads, streams=TorchStream())
        self.gradient_checkpointing = False
        self.add_parts(config)
        absent = "|".join(name for name in HEADS if name not in self.heads)
        self._keys_to_ignore_on_load_unexpected = [rf"^interbert\.({absent})_head\."]
        if not hasattr(self, "classifier"):
            self._keys_to_ignore_on_load_unexpected.append(r"^classifier\.")

        self.post_init()

    def add_parts(self, config: InterBertConfig) -> None:
        """Add modules beside the core, before weights are drawn; none here."""

    def run(
        self,
        inputs: PaddedInputs,
        hidden_regions: torch.Tensor | None = None,
        everything: bool = False,
    ) -> tuple[InterBertOutput, Slots]:
        """Run the core on the packed inputs; return its output, with the hidden states of all
        tokens if `everything`, and the slots of its rows.
        """
        batch, slots = pack_padded(inputs, self.interbert.config, hidden_regions)
        return self.interbert(batch, everything), slots

    @staticmethod
    def streams(
        output: InterBertOutput, slots: Slots, inputs: PaddedInputs
    ) -> dict[str, torch.Tensor | None]:
        """Return padded hidden states of both streams and pooled vectors, by the names of the
        outputs.
        """
        samples, columns = inputs.input_ids.shape
        pictured = inputs.visual_feats is not None

        return {
            "text_hidden": to_padded(output.text_hidden, slots.text, samples, columns),
            "image_hidden": (
                to_padded(
                    output.image_hidden, slots.image, samples, 1 + inputs.visual_feats.shape[1]
                )
                if pictured
                else None
            ),
            "pooled_text": output.pooled_text,
            "pooled_image": output.pooled_image,
        }

    def get_input_embeddings(self) -> nn.Module:
        return self.interbert.text_embedding.word

    def _init_weights(self, module: nn.Module) -> None:
        """Draw matrices from N(0, initializer_range); set LayerNorm gains to 1, biases and padded
        vocabulary rows to 0.

        transformers calls it for each module; its `init` skips parameters that were loaded.
        """
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                init.zeros_(parameter)
            elif parameter.dim() == 1:
                init.ones_(parameter)
            else:
                loaded = getattr(parameter, "_is_hf_initialized", False)
                init.normal_(parameter, 0.0, self.config.initializer_range)
                if isinstance(module, VocabParallelEmbedding) and not loaded:
                    parameter[self.config.vocab_size :] = 0.0

    def _set_gradient_checkpointing(
        self, enable: bool = True, every_n_layers: int = 1, **_: Any
    ) -> None:
        """Turn the core's own recomputation on or off, instead of transformers' function.

        Raises UsageError for `every_n_layers` other than 1.
        """
        if every_n_layers != 1:
            raise UsageError(
                f"every_n_layers is {every_n_layers}, but InterBERT recomputes every layer or none;"
                " leave it at 1"
            )

        self.gradient_checkpointing = enable
        for stack in (
            self.interbert.interaction,
            self.interbert.text_stream,
            self.interbert.image_stream,
        ):
            stack.recompute = enable

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load weights as in transformers, but raise UsageError with a list of all that are
        missing, unexpected or of another shape.

        The file may hold heads that this class lacks, and may lack the classifier and the choice
        head.
        """
        where = pretrained_model_name_or_path
        folder = Path(str(where)) / kwargs.get("subfolder", "")
        for index in folder.glob("*.index*.json"):  # of any variant
            read_index(index)  # rejects names that transformers would follow out of the folder

        model, found = super().from_pretrained(
            where, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        mismatched = [] if ignore_mismatched_sizes else found["mismatched_keys"]
        problems = {
            "missing": [
                name for name in found["missing_keys"] if not NEW_BY_NATURE.fullmatch(name)
            ],
            "unexpected": found["unexpected_keys"],
            "of another shape": [
                f"{name} {[*shape]} instead of {[*own]}" for name, shape, own in mismatched
            ],
        }
        listed = [f"{kind}: {listing(names)}" for kind, names in problems.items() if names]

        if listed:
            raise UsageError(
                f"{where}: not the weights of this {cls.__name__}; {'; '.join(listed)}"
            )

        return (model, found) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        *args: Any,
        card_facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, and write a model card with `card_facts` (see `model_card`).

        Without `card_facts` an existing README.md is kept.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if not is_main_process:
            return

        folder = Path(save_directory)
        # safetensors creates them with mode 0600, unreadable for other users
        for weights in folder.glob("model*.safetensors"):
            shutil.copymode(folder / "config.json", weights)

        card = folder / "README.md"
        if card_facts is not None or not card.exists():
            facts = {"heads": self.heads, **(card_facts or {})}
            write_text(card, model_card(self.interbert.config, facts))


def listing(names: Any) -> str:
    """Return `a, b, c`, sorted; beyond LISTED names only their number."""
    names = sorted(names)
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
