"""Report how well models search and recommend in the generated shop, beside TF-IDF and chance.

    interbert shop-report --search runs/shop_12000/product_search \\
        --recommendation runs/shop_12000/recommendation

Prints mean and deviation over several runs. Queries are marked by what answers them (`interbert
make-shop`): the picture, the title, or either. TF-IDF compares single characters and pairs of them
in titles. Chance is a shuffled list. Clicks were drawn by how much of what a topic wants a product
has, so no score can order them better than that share does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, json_text, write_output
from megatron_interbert.sample.shop_report import (
    Figures,
    recommendation_figures,
    search_figures,
    table,
)


@dataclass
class Options(Flags):
    """Hold the flags of shop-report."""

    GROUP: ClassVar[str] = "data"

    search: list[str] = option((), "runs finetuned for product search", several=True)
    recommendation: list[str] = option((), "runs finetuned for recommendation", several=True)
    data_path: str = option("sample_shop/test", "generated shop")
    two_stage: int = option(
        0,
        "also search in two stages, keeping this many products by vectors first; 0: no",
        least=0,
        group="scoring",
        old_names=("--first-stage",),
    )
    output: str = option("", "JSON file for the figures", group="logging")


def run(options: Options) -> None:
    """Print the tables."""
    if not options.search and not options.recommendation:
        raise UsageError("nothing to report on; give --search RUN or --recommendation RUN")
    if options.output:  # before hours of work
        check_output(Path(options.output), "--output")

    report: dict[str, dict[str, Figures]] = {}
    if options.search:
        report["search"] = search_figures(options.search, options.data_path, options.two_stage)
        print("\n".join(table("what tells: way", report["search"])))

    if options.recommendation:
        figures = recommendation_figures(options.recommendation, options.data_path)
        report["recommendation"] = figures
        print("\n".join(table("among: way", figures)))

    if options.output:
        write_output(Path(options.output), json_text(report), "--output")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run, reports=True)
