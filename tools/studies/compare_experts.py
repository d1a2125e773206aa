"""Compare experts with a dense model of the same work for each token, on the sample corpus.

For every variant and seed: pretrain, evaluate retrieval zero-shot, finetune for retrieval,
evaluate; with the same steps and samples for all. Loss and load are means over the last tenth of
the pretraining: the sum of its objectives' losses, and the busiest expert's tokens over the mean.
Finished runs are not repeated, so a stopped study is resumable. Writes OUTPUT/experts.json and
OUTPUT/experts.md. What a small generated world shows says nothing about models of M6's size.

    python tools/compare_experts.py --data-path sample_corpus/train \\
        --test-data-path sample_corpus/test --output experts --language en
"""

from megatron_interbert.command_line import run_command
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.model.presets import load_model_config
from tools.studies.options import Options
from tools.studies.study import FIGURES, Figure, study
from tools.studies.variant_run import Variant

COLUMNS = {
    "pretraining loss": Figure("pretraining", "loss", 3),
    "largest load": Figure("pretraining", "largest_load"),
    **FIGURES,
}
EXPERTS = 8
SAME_ORDER = ("--data-partitions", "1")  # which a routing group of a whole batch needs
BALANCED = ("--balance-coefficient", "0.01", "--routing-group", "64")


def variants(sizes: ModelConfig) -> dict[str, Variant]:
    """Return all variants by name; a token passes through products of the same size in each."""
    one = (*SAME_ORDER, "--experts", str(EXPERTS))
    two = (*SAME_ORDER, "--experts", str(2 * EXPERTS), "--prototypes", "2")

    return {
        "full": Variant("dense", SAME_ORDER),
        "top-1": Variant(f"{EXPERTS} experts, top-1", one),
        "balanced": Variant(f"{EXPERTS} experts, top-1, balance loss 0.01", (*one, *BALANCED)),
        "prototypes": Variant(
            f"2 prototypes of {EXPERTS} experts of half the width",
            two,
            {"ffn_hidden_size": sizes.ffn_hidden_size // 2},
        ),
        "two-schedules": Variant(
            f"{EXPERTS} experts, top-1, two halves, each with its own schedule", one, first_part=0.5
        ),
        "pseudo-to-real": Variant(
            "the same, layers shared in the first half",
            one,
            first_part=0.5,
            first_flags=("--share-layers",),
        ),
    }


def run(options: Options) -> None:
    """Run what is missing and write the table."""
    study(options, variants(load_model_config(options.model)), "experts", COLUMNS)


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
