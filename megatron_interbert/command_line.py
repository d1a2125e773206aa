"""From the command line and YAML to the dataclasses of `config`."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_interbert.config import AUTO, LARGEST_INTEGER, flag, nearest, read_text
from megatron_interbert.errors import UsageError
from megatron_interbert.parser import Parser

RECIPE = "the launcher's recipe"  # origin of settings that a launcher gives where the user does not


def build_parser(config_class: type, description: str) -> argparse.ArgumentParser:
    """An argument parser with one flag per dataclass field. Absent flags stay absent from the namespace."""
    parser = Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for entry in dataclasses.fields(config_class):
        text = f"{entry.metadata['help']} (default: {entry.default!r})"
        if entry.type is bool:
            parser.add_argument(flag(entry.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            kind = number_or_auto if entry.metadata.get("auto") else entry.type
            parser.add_argument(flag(entry.name), type=kind, choices=entry.metadata["choices"], help=text)
    parser.add_argument("--config", help="YAML file with any of these flags as keys")
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher, unused
    # Users of Megatron-DeepSpeed type it by habit; there is no other engine here.
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(config_class: type, description: str, argv: Sequence[str] | None = None, recipe: Sequence[str] = ()) -> Any:
    """Command line (and `--config` YAML) -> an instance of `config_class` with `.given`, the names set explicitly. `recipe`: flags that
    hold where neither says anything."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv = [a.split("=", 1)[0].replace("_", "-") + a[len(a.split("=", 1)[0]) :] if a.startswith("--") else a for a in argv]
    parser = build_parser(config_class, description)
    namespace, unknown = parser.parse_known_args(argv)
    known = {f.name for f in dataclasses.fields(config_class)}
    if unknown:
        wrong = unknown[0].split("=")[0]
        raise UsageError(f"unknown argument '{wrong}'{nearest(wrong, map(flag, known))}; --help lists all")
    values = vars(namespace)
    values.pop("local_rank", None)
    values.pop("deepspeed", None)
    file = values.pop("config", "")
    by_file = read_yaml(config_class, file) if file else {}
    by_recipe = vars(parser.parse_args(recipe))
    given = {**by_recipe, **by_file, **values}
    config = config_class(**given)
    config.given = set(given)
    config.origins |= {name: RECIPE for name in by_recipe if name not in values}
    config.origins |= {name: file for name in by_file if name not in values}
    return config


def parse_task(tasks: Mapping[str, tuple[type, Any]], example: str) -> tuple[Any, Any]:
    """`TASK FLAGS` of the command line -> (its checked configuration, what stands beside the configuration's class in `tasks`).

    UsageError for an unknown task. The deepspeed launcher may put --local_rank before it.
    """
    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    task, flags = (words[0], words[1:]) if words else ("", [])
    if task in ("-h", "--help"):
        task, flags = next(iter(tasks)), ["--help"]
    if task not in tasks:
        raise UsageError(f"task '{task}', expected one of {', '.join(tasks)}{nearest(task, tasks)}, for example: {example}")
    config_class, function = tasks[task]
    config = parse(config_class, config_class.__doc__ or "", flags)
    config.check()
    return config, function


def read_yaml(config_class: type, path: str) -> dict[str, Any]:
    """YAML with flag names as keys (`-` or `_`), types and choices checked; UsageError names file and key."""
    text = read_text(path, "--config")
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds a {type(values).__name__}, expected flags with their settings, such as 'lr: 1e-4'")

    entries = {f.name: f for f in dataclasses.fields(config_class)}
    result = {}
    for key, value in values.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in entries:
            raise UsageError(f"{path}: unknown key '{key}'{nearest(name, entries)}")
        kind = entries[name].type
        if entries[name].metadata.get("auto") and value == "auto":
            value = AUTO
        if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            value = to_float(value, path, name)  # YAML 1.1 reads 1e-4 as a string
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"{path}: '{key}' is {value!r}, expected {kind.__name__}")
        choices = entries[name].metadata["choices"]
        if choices and value not in choices:
            raise UsageError(f"{path}: '{key}' is {value!r}, expected one of {', '.join(map(str, choices))}")
        result[name] = value
    return result


def to_float(value: Any, path: str, name: str) -> float:
    """float(value), or UsageError that names the file and the key."""
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{path}: '{name}' is {value!r}, expected a number") from None


def finite_number(text: str) -> float:
    """Read the number of a flag; NaN and infinity are none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}', expected a finite number")
    return value


def seed_number(text: str) -> int:
    """Read the seed of a flag, which all generators can take."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not 0 <= value <= LARGEST_INTEGER:
        raise argparse.ArgumentTypeError(f"'{text}', expected 0 to {LARGEST_INTEGER}")
    return value


def number_or_auto(text: str) -> int:
    """`32`, or AUTO for `auto`."""
    if text == "auto":
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}', expected a number or auto") from None
