"""Declare the flags for finetuning and evaluating the grounding of phrases."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import FREE, ONE_TEXT, SAME, option, redefault, setting
from megatron_interbert.tasks.grounding.config import EvaluateRegionsConfig, RegionConfig

FOLDER = "folder of Flickr30k Entities, with Sentences/, Annotations/ and UNRELATED_CAPTIONS"
IMAGES = "train.txt, val.txt or test.txt: the numbers of the images"
CONTEXT = "read the whole sentence after the phrase"
SEVERAL = "what a phrase for several boxes means: any of them, or the one box around all (merged)"


@dataclass
class EntitiesConfig(RegionConfig):
    """Finetune on grounding of phrases (Flickr30k Entities): a score for each region."""

    entities: str = setting("", FOLDER, FREE)
    images: str = setting("", IMAGES, FREE)
    valid_images: str = setting("", f"{IMAGES} to evaluate on; default: no evaluation", FREE)
    context: bool = setting(False, CONTEXT, SAME)
    several: str = setting("any", SEVERAL, SAME, ("any", "merged"))
    lr: float = redefault(RegionConfig, "lr", 2e-5)
    max_tokens: int = redefault(
        RegionConfig,
        "max_tokens",
        36,
        "tokens per text, [CLS] and [SEP] included",
        room_for=ONE_TEXT,
    )


@dataclass
class EvaluateEntitiesConfig(EvaluateRegionsConfig):
    """Evaluate grounding of phrases: R@1, R@5 and R@10 at an IoU of 0.5."""

    TASK: ClassVar[str] = "flickr30k_entities"

    entities: str = option("", FOLDER)
    images: str = option("", IMAGES)
    context: bool = option(False, CONTEXT, as_trained=False)
    several: str = option("any", SEVERAL, ("any", "merged"))
    max_tokens: int = option(0, "tokens per text", least=0, room_for=ONE_TEXT, as_trained=36)
