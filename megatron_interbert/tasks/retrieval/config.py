"""Declare the flags for finetuning and evaluating caption-based image retrieval."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, SAME, option, redefault, setting
from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import (
    EvaluateConfig,
    FinetuneConfig,
    benchmark,
    finetuned_average,
    photos,
    store,
    training_store,
)


@dataclass
class RetrievalConfig(FinetuneConfig):
    """Finetune on caption-based image retrieval: four pairs per caption, two-class loss on each."""

    data_path: str = training_store(
        "sample_corpus/train",
        "region store to train on, with hard_images.npy (interbert mine-neighbours)",
    )
    valid_data_path: str = training_store(
        "", "region store to evaluate on, with all its pairs; default: no evaluation"
    )
    language: str = setting("", "only captions with this language tag (en, zh); default: all", SAME)
    valid_images: int = setting(
        0, "evaluate only on this many first images of the store; 0: all", FREE, group="logging"
    )
    lr: float = redefault(FinetuneConfig, "lr", 4e-5)
    lr_decay_style: str = redefault(FinetuneConfig, "lr_decay_style", "multistep")
    ema_decay: float = finetuned_average()
    max_regions: int = redefault(FinetuneConfig, "max_regions", 101)
    max_tokens: int = redefault(FinetuneConfig, "max_tokens", 30)

    def stores(self) -> list[str]:
        """List the region stores of --data-path."""
        return split_paths(self.data_path)


@dataclass
class EvaluateRetrievalConfig(EvaluateConfig):
    """Score all pairs of a store's images and captions with the matching head, both directions."""

    TASK: ClassVar[str] = "retrieval"

    data_path: str = store("sample_corpus/test", "region store to evaluate on")
    language: str = option("", "only captions with this language tag; default: all")
    max_images: int = option(0, "only this many first images of the store; 0: all", least=0)
    images: str = option(
        "", "file with the ids of the images to evaluate on, such as those of COCO's fixed 1k"
    )
    folds: int = option(
        1,
        "cut the images, in the store's order, into this many parts, evaluate on each and report"
        " the means (COCO 1k: 5)",
        least=1,
    )
    max_regions: int = option(0, "regions per image", least=0, as_trained=36)
    max_tokens: int = option(
        0,
        "tokens per caption, [CLS] and [SEP] included",
        least=0,
        room_for="[CLS] word [SEP]",
        as_trained=36,
    )
    image_folder: str = photos()

    zero_shot: bool = option(
        False,
        "label the result as zero-shot: the pretrained matching head, no finetuning",
        group="logging",
    )
    benchmark: str = benchmark("flickr30k", "coco-5k")
    bf16: bool = option(
        False, "same as --precision bf16; --no-bf16: --precision fp32", group="parallelism"
    )
    batch_pairs: int = option(512, "pairs per forward pass", least=1, group="scoring")
    tile_captions: int = option(
        1024,
        "captions per tile, the unit of work that survives when an evaluation is stopped",
        least=1,
        group="scoring",
    )
    tile_images: int = option(256, "images per tile", least=1, group="scoring")
    two_stage: int = option(
        0,
        "also rank by pooled vectors, and score only this many images per caption again; 0: no",
        least=0,
        group="scoring",
    )
    exhaustive: bool = option(
        True,
        "score all pairs; --no-exhaustive: only --two-stage, where scoring all costs too much",
        group="scoring",
    )

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if not self.exhaustive and not self.two_stage:
            raise UsageError("--no-exhaustive leaves nothing to do without --two-stage K")
        if self.folds > 1 and self.two_stage:
            raise UsageError("--folds and --two-stage exclude each other; give one of them")
        if self.bf16 and self.precision not in ("auto", "bf16"):
            raise UsageError(
                f"--bf16 and --precision {self.precision} exclude each other; give only one"
            )

        if self.bf16:
            self.precision = "bf16"
        elif "bf16" in self.given and self.precision == "auto":
            self.precision = "fp32"
