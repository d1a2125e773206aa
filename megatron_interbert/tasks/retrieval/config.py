"""What finetuning and evaluating caption-based image retrieval are told."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import BELOW_1, option, split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import EvaluateConfig, FinetuneConfig


@dataclass
class RetrievalConfig(FinetuneConfig):
    """Caption-based image retrieval: four pairs for each caption, two-class loss of the matching head on each."""

    data_path: str = option("sample_corpus/train", "region store to train on, with hard_images.npy (tools/mine_neighbours.py)")
    valid_data_path: str = option("", "region store to evaluate on, all pairs of it; none: no evaluation")
    language: str = option("", "only captions of this language tag (en, zh); default: all")
    valid_images: int = option(0, "evaluate on the first images of the store only; 0: all")
    lr: float = option(4e-5, "peak learning rate", least=0)
    lr_decay_style: str = option("multistep", "shape after the warm-up", ("linear", "cosine", "constant", "multistep"))
    ema_decay: float = option(
        0.9999,
        "keep an average of the weights with this decay and evaluate it; 0: none",
        least=0,
        most=BELOW_1,
    )
    max_regions: int = option(101, "regions per image, first ones as stored")
    max_tokens: int = option(30, "tokens per caption with [CLS] and [SEP]")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (*FinetuneConfig.SAME_SAMPLES, "language")

    def stores(self) -> list[str]:
        """The region stores of --data-path."""
        return split_paths(self.data_path)


@dataclass
class EvaluateRetrievalConfig(EvaluateConfig):
    """All pairs of a store's images and captions by the matching head, both directions."""

    data_path: str = option("sample_corpus/test", "region store to evaluate on")
    zero_shot: bool = option(False, "label the result as zero-shot: the pretrained matching head, no finetuning")
    benchmark: str = option("", "the data are this benchmark's: show the paper's figures beside", ("", "flickr30k"))
    language: str = option("", "only captions of this language tag; default: all")
    max_images: int = option(0, "only the first images of the store; 0: all")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens per caption with [CLS] and [SEP]; default: as the weights were trained, else 36")
    bf16: bool = option(False, "as --precision bf16; --no-bf16 as --precision fp32")
    batch_pairs: int = option(512, "pairs per forward pass")
    tile_captions: int = option(1024, "captions of a tile, the unit of work that is kept when an evaluation is stopped")
    tile_images: int = option(256, "images of a tile")
    two_stage: int = option(0, "also rank by pooled vectors and score only so many images of each caption again; 0: no")
    exhaustive: bool = option(True, "score all pairs; --no-exhaustive leaves that out where only --two-stage can be paid for")
    image_folder: str = option("", "photos named IMAGE_ID.jpg to show on the page")
    TASK: ClassVar[str] = "retrieval"
    POSITIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.POSITIVE, "batch_pairs", "tile_captions", "tile_images")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*EvaluateConfig.NOT_NEGATIVE, "max_images", "max_regions", "max_tokens", "two_stage")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if not self.exhaustive and not self.two_stage:
            raise UsageError("--no-exhaustive leaves nothing to do without --two-stage K")
        if self.bf16 and self.precision not in ("auto", "bf16"):
            raise UsageError(f"--bf16 and --precision {self.precision} exclude each other; leave one out")
        if self.bf16:
            self.precision = "bf16"
        elif "bf16" in self.given and self.precision == "auto":
            self.precision = "fp32"
