"""Pretrain the Chinese model: as `pretrain`, with a recipe for the flags that are not given.

Without --data-path it trains a small model on the generated sample shop.
"""

from collections.abc import Sequence

from megatron_interbert import pretrain
from megatron_interbert.config.pretraining import RunConfig

SAMPLE = (
    *("--model", "sample-chinese"),
    *("--data-path", "sample_shop/train"),
    *("--micro-batch-size", "32"),
    *("--lr", "2e-3"),
    *("--lr-warmup-fraction", "0.05"),
    *("--adam-beta2", "0.98"),
    "--no-msm-on-mismatched",
    *("--num-workers", "0"),
)
RECIPE = (
    *("--model", "base-chinese"),
    *("--language", "zh"),
    *("--lr", "1e-4"),
    *("--lr-warmup-fraction", "0.1"),
    *("--max-tokens", "64"),
)


ABOUT = f"""Pretrain the Chinese model. Flags that neither the command line nor --config sets are,
with --data-path:

    {" ".join(RECIPE)}

and without it, for the generated sample shop:

    {" ".join(SAMPLE)}

All others are those of pretrain, whose defaults are shown below."""


def recipe(told: RunConfig) -> Sequence[str]:
    """Return the flags that apply where neither the command line nor --config sets a value."""
    return RECIPE if "data_path" in told.given else SAMPLE


def main() -> None:
    """Run the entry point."""
    pretrain.main(recipe, ABOUT)


if __name__ == "__main__":
    main()
