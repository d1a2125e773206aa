"""Read the words that a command line or a YAML file gives for flags."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron_interbert.config.options import AUTO, Facts, nearest


def reader(entry: dataclasses.Field) -> Any:
    """Return the function that reads one word of a flag."""
    facts: Facts = entry.metadata["facts"]
    if facts.read:
        return facts.read
    if facts.auto:
        return number_or_auto
    if facts.choices:
        return one_of(facts.choices)

    return {int: whole_number, float: number}.get(entry.type, str)


def span(text: str) -> tuple[int, int]:
    """Read (36, 36) from `36`, and (10, 100) from `10-100`."""
    low, dash, high = text.partition("-")

    try:
        found = int(low), int(high if dash else low)
    except ValueError:
        found = (0, 0)

    if not 0 < found[0] <= found[1]:
        raise argparse.ArgumentTypeError(
            f"'{text}', expected a number above 0, or two from small to large, such as 10-100"
        )

    return found


def number_or_auto(text: str) -> int:
    """Read 32 from `32`, and AUTO from `auto`."""
    return AUTO if text == "auto" else whole_number(text, "a whole number or auto")


def whole_number(text: str, expected: str = "a whole number") -> int:
    """Read 32 from `32`."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}', expected {expected}") from None


def number(text: str) -> float:
    """Read 0.1 from `0.1` or `1e-1`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}', expected a number") from None


def one_of(choices: Sequence[Any]) -> Callable[[str], Any]:
    """Return a function that reads one of `choices`."""

    def read(text: str) -> Any:
        for choice in choices:
            if text == str(choice):
                return choice

        known = named(choices)
        raise argparse.ArgumentTypeError(
            f"'{text}', expected one of {', '.join(known)}{nearest(text, known)}"
        )

    return read


def named(choices: Sequence[Any]) -> list[str]:
    """Return choices as words, without the empty one that stands for a flag that is not given."""
    return [str(choice) for choice in choices if choice != ""]
