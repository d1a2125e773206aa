"""Convert KDD Cup 2020 queries (Multimodalities Recall) to the JSON lines of product search.

    interbert make-queries train.tsv --output train.jsonl         # rows: query and product
    interbert make-queries valid.tsv --answers valid_answer.json --output valid.jsonl
    interbert make-queries testA.tsv --candidates --output testA.jsonl       # without answers

`interbert build-features` builds a region store from the pictures in the same files, with
--columns product_id,image_h,image_w,num_boxes,boxes,features,class_labels,query,query_id
--box-format yxyx --num-classes 34.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, argument, option
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_output, write_output
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json

COLUMNS = (
    "product_id",
    "image_h",
    "image_w",
    "num_boxes",
    "boxes",
    "features",
    "class_labels",
    "query",
    "query_id",
)


@dataclass
class Options(Flags):
    """Hold the flags of make-queries."""

    GROUP: ClassVar[str] = "data"

    source: str = argument("TSV of the benchmark")
    answers: str = option(
        "",
        "valid_answer.json: the right products of each query; the rows are then its candidates",
    )
    candidates: bool = option(False, "the rows are candidates, without known answers")
    output: str = option("", "file for the JSON lines", required=True)


def read_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (query id, query, product id) of each row; raises UsageError naming a bad line."""
    try:
        handle = open(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None

    size = path.stat().st_size
    with handle, progress(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            for number, line in enumerate(handle, 1):
                bar.update(len(line))
                values = line.rstrip("\r\n").split("\t")
                if line.strip() and tuple(values) != COLUMNS:
                    yield read_row(values, f"{path}: line {number}")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start}"
            raise UsageError(f"{path}: not UTF-8 ({where})") from None


def read_row(values: list[str], where: str) -> tuple[str, str, str]:
    """Return (query id, query, product id) from the columns of one row."""
    if len(values) != len(COLUMNS):
        expected = f"{len(COLUMNS)}: {', '.join(COLUMNS)}"
        raise UsageError(f"{where} has {len(values)} columns, expected {expected}")

    row = dict(zip(COLUMNS, values, strict=True))
    for name in ("query_id", "query", "product_id"):
        if not row[name].strip():
            raise UsageError(f"{where} has an empty {name}")

    return row["query_id"], row["query"], row["product_id"]


def check_answers(options: Options, answers: dict[str, Any], queries: dict[str, str]) -> None:
    """Raise UsageError for a query without a list of right products in --answers."""
    for query in queries:
        if query not in answers:
            raise UsageError(
                f"{options.answers}: no answer for query {query} of {options.source}; give the"
                " answers that belong to that file"
            )

        if not isinstance(answers[query], list):
            raise UsageError(
                f"{options.answers}: the answer of query {query} is not a list of products"
            )


def run(options: Options) -> None:
    """Read the rows and write a JSON line for each query."""
    output = Path(options.output)
    check_output(output, "--output")
    answers = read_json(options.answers, "--answers") if options.answers else {}
    texts: dict[str, str] = {}
    products: dict[str, list[str]] = {}
    for query_id, text, product in read_rows(Path(options.source)):
        texts.setdefault(query_id, text)
        products.setdefault(query_id, []).append(product)

    if not texts:
        raise UsageError(f"{options.source}: holds no rows; give a TSV of the benchmark")

    if options.answers:
        check_answers(options, answers, texts)
    lines = []

    for query_id, text in texts.items():
        listed = list(dict.fromkeys(products[query_id]))
        record: dict[str, Any] = {"query_id": query_id, "query_text": text}

        if options.answers:
            right = [str(item) for item in answers[query_id]]
            record |= {"item_ids": right, "candidate_ids": listed}
        else:
            record |= {"candidate_ids" if options.candidates else "item_ids": listed}

        lines.append(json.dumps(record, ensure_ascii=False) + "\n")

    write_output(output, "".join(lines), "--output")
    rows = sum(map(len, products.values()))
    print(f"{options.output}: {len(texts)} queries, {rows} rows")


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
