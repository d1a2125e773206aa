#!/usr/bin/env python3
"""Queries of KDD Cup 2020 (Multimodalities Recall) as the JSON lines that product search takes.

    python tools/make_queries.py train.tsv --output train.jsonl                               # each row is a query with its product
    python tools/make_queries.py valid.tsv --answers valid_answer.json --output valid.jsonl   # rows are candidates
    python tools/make_queries.py testA.tsv --candidates --output testA.jsonl                  # the same without answers

The pictures of the same files go into a region store by tools/build_features.py with
--columns product_id,image_h,image_w,num_boxes,boxes,features,class_labels,query,query_id --box-format yxyx --num-classes 34.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.files import check_output, write_output
from megatron_interbert.parser import Parser
from megatron_interbert.progress import progress
from megatron_interbert.reading import read_json

COLUMNS = ("product_id", "image_h", "image_w", "num_boxes", "boxes", "features", "class_labels", "query", "query_id")


def read_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(query id, query, product id) of each row; UsageError names the line that is none."""
    try:
        handle = open(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    with handle, progress(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            for number, line in enumerate(handle, 1):
                bar.update(len(line))
                values = line.rstrip("\r\n").split("\t")
                if tuple(values) == COLUMNS or not line.strip():
                    continue
                if len(values) != len(COLUMNS):
                    raise UsageError(
                        f"{path}: line {number} has {len(values)} columns, expected {len(COLUMNS)}: {', '.join(COLUMNS)}"
                    )
                row = dict(zip(COLUMNS, values, strict=True))
                for name in ("query_id", "query", "product_id"):
                    if not row[name].strip():
                        raise UsageError(f"{path}: line {number} has an empty {name}")
                yield row["query_id"], row["query"], row["product_id"]
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def run() -> None:
    """Parse the command line and write the file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="TSV of the benchmark")
    parser.add_argument(
        "--answers", type=Path, help="valid_answer.json: the products of each query; the rows are its candidates then"
    )
    parser.add_argument("--candidates", action="store_true", help="the rows are candidates, and the answers are not known")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    options = parser.parse_args()
    check_output(options.output, "--output")
    answers = read_json(options.answers, "--answers") if options.answers else {}
    texts: dict[str, str] = {}
    products: dict[str, list[str]] = {}
    for query_id, text, product in read_rows(options.source):
        texts.setdefault(query_id, text)
        products.setdefault(query_id, []).append(product)
    if not texts:
        raise UsageError(f"{options.source}: no rows in it")
    if options.answers and (missing := next((key for key in texts if key not in answers), None)):
        raise UsageError(f"{options.answers}: nothing for query {missing} of {options.source}; give the answers of that file")
    if wrong := next((key for key in texts if options.answers and not isinstance(answers[key], list)), None):
        raise UsageError(f"{options.answers}: the answer of query {wrong} is no list of products")
    lines = []
    for query_id, text in texts.items():
        listed = list(dict.fromkeys(products[query_id]))
        record = {"query_id": query_id, "query_text": text}
        if options.answers:
            record |= {"item_ids": [str(item) for item in answers[query_id]], "candidate_ids": listed}
        else:
            record |= {"candidate_ids" if options.candidates else "item_ids": listed}
        lines.append(json.dumps(record, ensure_ascii=False))
    write_output(options.output, "\n".join(lines) + "\n", "--output")
    print(f"{options.output}: {len(texts)} queries, {sum(map(len, products.values()))} rows")


if __name__ == "__main__":
    run_entry(run)
