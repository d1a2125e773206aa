"""Compare variants of a model over several seeds, and write a table of what they reach."""

import dataclasses
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_interbert.data.manifest import MANIFEST
from megatron_interbert.files import check_writable, write_json, write_text
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json
from megatron_interbert.weights.manifest import versions
from tools.studies.options import (
    Options,
    check_further_flags,
    check_stores,
    chosen_variants,
    read_seeds,
)
from tools.studies.variant_run import Results, Run, Variant


@dataclass(frozen=True)
class Figure:
    """Hold where the results of a run have a figure, and the decimals that a table shows."""

    stage: str
    metric: str
    decimals: int = 1


FIGURES = {
    "zero-shot t2i R@1": Figure("zero-shot", "t2i_R@1"),
    "zero-shot i2t R@1": Figure("zero-shot", "i2t_R@1"),
    "finetuned t2i R@1": Figure("finetuned", "t2i_R@1"),
    "finetuned i2t R@1": Figure("finetuned", "i2t_R@1"),
}


def study(
    options: Options, every: dict[str, Variant], name: str, figures: dict[str, Figure]
) -> None:
    """Compare the variants in --only, or all of `every`; the table is OUTPUT/`name`.md."""
    seeds = read_seeds(options.seeds)
    chosen = chosen_variants(options, every)
    check_stores(options, chosen)
    check_further_flags(options)
    check_writable(Path(options.output), "--output")

    runs = [Run(one, every[one], seed, options) for seed in seeds for one in chosen]
    found = run_all(runs, options.jobs, name)
    write_report(options, found, table(found, every, figures), name)


def run_all(runs: list[Run], jobs: int, study_name: str) -> dict[str, list[Results]]:
    """Run all, `jobs` at a time; return the results of each variant in the order of its seeds."""
    found: dict[str, list[Results]] = {one.name: [] for one in runs}

    with (
        ThreadPoolExecutor(jobs) as pool,
        progress(total=len(runs), unit="run", desc=study_name) as bar,
    ):
        futures = [pool.submit(one.results) for one in runs]
        try:
            for one, future in zip(runs, futures, strict=True):
                result = future.result()
                found[one.name].append(result)
                bar.update()
                bar.write(f"{one.name}, seed {one.seed}: {json.dumps(result['finetuned'])}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    return found


def table(
    found: dict[str, list[Results]], all_variants: dict[str, Variant], figures: dict[str, Figure]
) -> str:
    """Return a Markdown table of mean and spread (standard deviation over seeds) of each figure,
    with the change against `full` in the last column.
    """
    lines = [
        "| variant | " + " | ".join(figures) + " | change, finetuned t2i |",
        "|---" * (len(figures) + 2) + "|",
    ]
    full = [r["finetuned"]["t2i_R@1"] for r in found.get("full", [])]

    for name, results in found.items():
        cells = [_mean(results, figure) for figure in figures.values()]
        mine = statistics.mean(r["finetuned"]["t2i_R@1"] for r in results)
        change = f"{mine - statistics.mean(full):+.1f}" if full and name != "full" else ""
        lines.append(f"| {all_variants[name].what} | {' | '.join(cells)} | {change} |")

    return "\n".join(lines)


def _mean(results: list[Results], figure: Figure) -> str:
    values = [r[figure.stage][figure.metric] for r in results if figure.metric in r[figure.stage]]
    if not values:
        return ""

    spread = f" ± {statistics.stdev(values):.{figure.decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{figure.decimals}f}{spread}"


def write_report(
    options: Options, found: dict[str, list[Results]], found_table: str, name: str
) -> None:
    """Write the figures and the table as files of a name, and print the table."""
    manifest = read_json(Path(options.test_data_path) / MANIFEST, "--test-data-path")
    scenes = "; generated scenes" if manifest.get("generated") else ""
    note = (
        f"{options.train_iters} + {options.finetune_iters} steps of {options.batch_size}, seeds"
        f" {options.seeds}{scenes}"
    )
    text = f"{found_table}\n\n{note}\n"

    write_json(
        Path(options.output) / f"{name}.json",
        {"results": found, "options": dataclasses.asdict(options), "versions": versions()},
    )
    write_text(Path(options.output) / f"{name}.md", text)
    print(text)
