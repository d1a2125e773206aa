"""What all Hugging Face classes share: the packed core inside, first weights, strict loading,
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

from megatron_interbert.errors import UsageError
from megatron_interbert.files import write_text
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.hf.model_card import model_card
from megatron_interbert.hf.padding import PaddedInputs, Slots, pack_padded, to_padded
from megatron_interbert.hf.stream import TorchStream
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.layers import VocabParallelEmbedding
from megatron_interbert.weights.sources import read_index

HEADS = ("msm", "mrm", "itm", "choice", "sentence")
# of downstream tasks: no pretraining has them
NEW_BY_NATURE = re.compile(r"classifier\..*|interbert\.choice_head\..*")
LISTED = 20  # names of wrong parameters in an error; more are counted


class InterBertPreTrainedModel(PreTrainedModel):
    """A core with the heads named by the class.

    All its parameters are `interbert.<our name>`, whatever the class.
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
        """Modules beside the core, made before weights are drawn; none here."""

    def run(
        self,
        inputs: PaddedInputs,
        hidden_regions: torch.Tensor | None = None,
        everything: bool = False,
    ) -> tuple[InterBertOutput, Slots]:
        """Give the core on the packed inputs, with the hidden states of all tokens if `everything`
        is wanted, and where its rows belong.
        """
        batch, slots = pack_padded(inputs, self.interbert.config, hidden_regions)
        return self.interbert(batch, everything), slots

    @staticmethod
    def streams(
        output: InterBertOutput, slots: Slots, inputs: PaddedInputs
    ) -> dict[str, torch.Tensor | None]:
        """Give hidden states of both streams, padded again, and pooled vectors, under the names of
        the outputs.
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
        """N(0, initializer_range) for matrices, 1 for LayerNorm gains, 0 for biases and padded
        vocabulary rows.

        transformers calls it for each module; its `init` leaves alone what was loaded.
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
        """Switches the core's own recomputation, which takes the place of the function that
        transformers offers.
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
        """As in transformers, but weights that do not fit are an error that lists them: missing,
        unexpected, wrong shapes.

        Heads that this class lacks may be in the file; the classifier and the choice head may be
        missing from it.
        """
        where = pretrained_model_name_or_path
        folder = Path(str(where)) / kwargs.get("subfolder", "")
        for index in folder.glob("*.index*.json"):  # of any variant
            read_index(index)  # transformers would follow names of files out of the folder

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
        """As in transformers, and a model card: with `card_facts` (see `model_card`), or where no
        README.md is yet.
        """
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if not is_main_process:
            return

        folder = Path(save_directory)
        # safetensors writes them as 0600, readable by no other user
        for weights in folder.glob("model*.safetensors"):
            shutil.copymode(folder / "config.json", weights)

        card = folder / "README.md"
        if card_facts is not None or not card.exists():
            write_text(card, model_card(self.interbert.config, card_facts or {}))


def listing(names: Any) -> str:
    """`a, b, c`, sorted; after LISTED names only how many more."""
    names = sorted(names)
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest
