"""Read the YAML files of --config, whose keys are flags."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_interbert.config.options import AUTO, flag, nearest, rows, spelling
from megatron_interbert.config.words import named, reader
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text

# options that may name a file beside the YAML that sets them
BESIDE = ("deepspeed_config", "model")


def read_yaml(config_class: type, path: str) -> dict[str, Any]:
    """Read YAML whose keys are flag names (with `-` or `_`), and check types and choices.

    Raises UsageError that names the file and the key.
    """
    result = flags_of(config_class, read_mapping(path, "--config"), path)
    for name in BESIDE:
        if isinstance(result.get(name), str):
            result[name] = beside(path, result[name])

    return result


def read_mapping(path: str, what: str) -> dict[str, Any]:
    """Read a YAML file of keys and values; raises UsageError naming `what` for anything else."""
    text = read_text(path, what)

    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from error

    if not isinstance(values, dict):
        raise UsageError(
            f"{path}: holds a {type(values).__name__}, expected flags with their settings, such as"
            " 'lr: 1e-4'"
        )

    return {str(key): value for key, value in values.items()}


def flags_of(config_class: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return settings by name from keys that are flag names, with types and choices checked.

    Raises UsageError that names the key and `where` it stands.
    """
    entries = {entry.name: entry for entry in dataclasses.fields(config_class)}
    names = {name: name for name in entries}
    for name, facts in rows(config_class):
        spellings = (spelling(name, facts), *facts.old_names)
        names |= {key_of(word): name for word in spellings}

    result: dict[str, Any] = {}
    for key, value in values.items():
        written = key_of(key)
        if written not in names:
            raise UsageError(f"{where}: unknown key '{key}'{nearest(written, names)}")

        name = names[written]
        if name in result:
            raise UsageError(f"{where}: '{key}' sets {flag(name)} a second time; leave one of them")
        result[name] = from_yaml(entries[name], value, f"{where}: '{key}'")

    return result


def beside(path: str, name: str) -> str:
    """Return the path of a JSON file that a YAML names, if it is there beside it; else the name."""
    found = Path(path).parent / name
    return str(found) if name.endswith(".json") and found.is_file() else name


def key_of(word: str) -> str:
    """Return the key of a flag in YAML: `data_path` for `--data-path`."""
    return word.lstrip("-").replace("-", "_")


def from_yaml(entry: dataclasses.Field, value: Any, where: str) -> Any:
    """Convert a setting from YAML; raises UsageError for a wrong type or choice."""
    facts = entry.metadata["facts"]
    kind = entry.type
    if facts.auto and value == "auto":
        return AUTO
    if facts.several and not isinstance(value, list):
        raise UsageError(f"{where} is {value!r}, expected a list")
    if facts.several or facts.read:
        words = value if facts.several else [value]
        try:
            found = [reader(entry)(str(word)) for word in words]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{where}: {error}") from None

        return found if facts.several else found[0]

    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = to_float(value, where)  # YAML 1.1 reads 1e-4 as a string
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where} is {value!r}, expected {kind.__name__}")
    if facts.choices and value not in facts.choices:
        expected = ", ".join(named(facts.choices))
        raise UsageError(f"{where} is {value!r}, expected one of {expected}")

    return value


def to_float(value: Any, where: str) -> float:
    """Convert a value from YAML to float; raises UsageError with `where` if it is not a number."""
    try:
        return float(value)
    except ValueError:
        raise UsageError(f"{where} is {value!r}, expected a number") from None
