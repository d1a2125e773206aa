"""Run the paper's ablation: measure what each part of the pretraining and of the model is worth.

For every variant and seed: pretrain, evaluate retrieval zero-shot, finetune for retrieval,
evaluate; with the same steps and samples for all. Finished runs are not repeated, so a stopped
study is resumable. Writes OUTPUT/ablation.json and OUTPUT/ablation.md.

    python tools/ablate.py --data-path sample_corpus/train --test-data-path sample_corpus/test \\
        --output ablation --language en
"""

from megatron_interbert.command_line import run_command
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.presets import load_model_config
from tools.studies.options import Options
from tools.studies.study import FIGURES, study
from tools.studies.variant_run import Variant


def variants(sizes: ModelConfig) -> dict[str, Variant]:
    """Return all variants by name; tokens pass through the same depth in each."""
    joint = sizes.interaction_layers
    text = sizes.text_layers
    image = sizes.image_layers

    return {
        "full": Variant("everything"),
        "no-msm": Variant("without masked segments", ("--objectives", "mrm,itm")),
        "no-mrm": Variant("without masked regions", ("--objectives", "msm,itm")),
        "no-itm": Variant("without image-text matching", ("--objectives", "msm,mrm")),
        "no-hard-negatives": Variant("random negatives only", ("--hard-negatives", "0")),
        "no-interaction": Variant(
            "streams only, no interaction module",
            sizes=layers(0, text + joint, image + joint),
        ),
        "no-streams": Variant(
            "interaction module only, no streams", sizes=layers(joint + max(text, image), 0, 0)
        ),
    }


def layers(interaction: int, text: int, image: int) -> dict[str, int]:
    """Return the sizes of a model with so many layers."""
    return {"interaction_layers": interaction, "text_layers": text, "image_layers": image}


def run(options: Options) -> None:
    """Run what is missing and write the table."""
    study(options, variants(load_model_config(options.model)), "ablation", FIGURES)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
