"""Hold and check the sizes of a model, as presets, JSON files and checkpoints give them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError

# inner size and result columns of a GPU's 8-bit matrix product must be multiples of this
FLOAT8_MULTIPLE = 16
LARGEST_SIZE = 1 << 24  # of any size of a model
MOST_LAYERS = 1000  # of each kind; building a million layers would fill the memory first


@dataclass(frozen=True)
class ModelConfig:
    """Hold the sizes of one InterBERT model.

    A size of 0 for vocabulary, features or classes means: take it from the data.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    interaction_layers: int = 6
    text_layers: int = 6
    image_layers: int = 6
    num_attention_heads: int = 12
    image_attention_heads: int = 8
    ffn_hidden_size: int = 3072
    pooled_size: int = 1024
    feature_dim: int = 2048
    num_classes: int = 1601
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    image_hidden_dropout: float = 0.2
    image_attention_dropout: float = 0.1
    fusion: str = "product"
    # or "chinese": full-width and traditional characters become half-width and simplified ones
    text_normalisation: str = "none"
    experts: int = 0  # of each layer, in place of its MLP; 0: a dense model
    prototypes: int = 1  # that divide the experts; a token goes to one expert of each
    expert_stacks: str = "interaction,text,image"  # that have experts
    share_layers: bool = False  # all layers of a stack have the same parameters
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    FROM_DATA: ClassVar[tuple[str, ...]] = ("vocab_size", "feature_dim", "num_classes")
    STACKS: ClassVar[tuple[str, ...]] = ("interaction", "text", "image")
    MAY_BE_0: ClassVar[tuple[str, ...]] = (
        *FROM_DATA,
        *("interaction_layers", "text_layers", "image_layers", "experts"),
    )

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            self.check_size(entry.name, entry.type)
        for name in ("num_attention_heads", "image_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise UsageError(
                    f"model: hidden_size {self.hidden_size} is not a multiple of {name}"
                    f" {getattr(self, name)}"
                )

        self._check_experts()
        if self.fusion not in ("product", "sum"):
            raise UsageError(f"model: fusion is '{self.fusion}', expected 'product' or 'sum'")
        if self.text_normalisation not in ("none", "chinese"):
            raise UsageError(
                f"model: text_normalisation is '{self.text_normalisation}', expected 'none' or"
                " 'chinese'"
            )

    def _check_experts(self) -> None:
        if self.prototypes > 1 and not self.experts:
            raise UsageError(f"model: prototypes is {self.prototypes}, but there are no experts")
        if self.experts % self.prototypes:
            raise UsageError(
                f"model: experts {self.experts} is not a multiple of prototypes {self.prototypes};"
                " change one of them"
            )

        unknown = self.stacks_with_experts - set(self.STACKS)
        if unknown:
            raise UsageError(
                f"model: expert_stacks is '{self.expert_stacks}', expected some of"
                f" {','.join(self.STACKS)}, separated by commas"
            )

    @property
    def stacks_with_experts(self) -> set[str]:
        """Return the stacks (interaction, text, image) whose layers have the experts."""
        return set(self.expert_stacks.split(","))

    def has_experts(self, stack: str) -> bool:
        """Check whether the layers of a stack have experts."""
        return self.experts > 0 and stack in self.stacks_with_experts

    def described_experts(self) -> str:
        """Return the experts of the layers, such as `8 experts in 2 prototypes (text,image)`."""
        if not self.experts:
            return "no experts"

        plural = "s" * (self.experts > 1)
        prototypes = f" in {self.prototypes} prototypes" if self.prototypes > 1 else ""

        return f"{self.experts} expert{plural}{prototypes} ({self.expert_stacks})"

    def check_size(self, name: str, kind: type) -> None:
        """Raise UsageError if the size `name` is of a wrong type or out of range, as a JSON file
        may give it.
        """
        value = getattr(self, name)

        if kind is int:
            least = 0 if name in self.MAY_BE_0 else 1
            most = MOST_LAYERS if name.endswith("_layers") else LARGEST_SIZE
            sound = type(value) is int and least <= value <= most
            expected = f"a whole number from {least} to {most}"
        elif kind is float:
            below = 1.0 if name.endswith("dropout") else math.inf
            sound = type(value) in (int, float) and 0 <= value < below
            expected = "a number from 0 up to 1" if below == 1.0 else "a finite number of 0 or more"
        elif kind is bool:
            sound = type(value) is bool
            expected = "true or false"
        else:
            sound = isinstance(value, str)
            expected = "a text"

        if not sound:
            raise UsageError(f"model: {name} is {value!r:.60}, expected {expected}")

    @property
    def padded_vocab_size(self) -> int:
        """Return the vocabulary size rounded up to a multiple of 128, whatever the layout."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Return the head sizes of attention over text or joint tokens, and over image tokens."""
        return (
            self.hidden_size // self.num_attention_heads,
            self.hidden_size // self.image_attention_heads,
        )

    def check_tensor_parallel(self, size: int) -> None:
        """Raise UsageError if `size` ranks cannot split heads, MLP or vocabulary evenly."""
        if size < 1:
            raise UsageError(f"--tensor-model-parallel-size is {size}, expected 1 or more")

        for name in (
            "num_attention_heads",
            "image_attention_heads",
            "ffn_hidden_size",
            "padded_vocab_size",
        ):
            if getattr(self, name) % size:
                raise UsageError(
                    f"--tensor-model-parallel-size {size} does not divide {name}"
                    f" {getattr(self, name)} of the model; use a size that divides it"
                )

    def check_expert_parallel(self, size: int) -> None:
        """Raise UsageError if `size` ranks cannot divide the experts evenly."""
        if size == 1:
            return
        if not self.experts:
            raise UsageError(
                f"--expert-parallel-size {size}: the model has no experts; leave it out, or give"
                " --experts"
            )

        if self.experts % size:
            raise UsageError(
                f"--expert-parallel-size {size} does not divide the {self.experts} experts of the"
                " model; use a size that divides them"
            )

    def without_dropout(self) -> "ModelConfig":
        """Return the same sizes with every dropout at 0 (for exact comparisons of layouts)."""
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("dropout")]
        return dataclasses.replace(self, **dict.fromkeys(names, 0.0))


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """Build a ModelConfig from JSON values.

    Raises UsageError naming `where` for wrong sizes, and for unknown keys with the nearest known
    one.
    """
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for name in values:
        if name not in known:
            raise UsageError(
                f"{where}: unknown model key '{name}'{nearest(name, known)}; known are"
                f" {', '.join(sorted(known))}"
            )

    try:
        return ModelConfig(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
