"""Read weights of named things, such as `itm:2,msm:1`."""

from collections.abc import Callable

from megatron_interbert.errors import UsageError


def read_weights(text: str, flag: str, check_name: Callable[[str, str], None]) -> dict[str, float]:
    """Return weights by name; `check_name` gets each name with the flag.

    Raises UsageError for what is no name with a positive number.
    """
    found: dict[str, float] = {}

    for part in filter(None, map(str.strip, text.split(","))):
        name, colon, number = part.partition(":")
        check_name(name.strip(), flag)
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0

        if not colon or not 0 < weight < float("inf"):
            raise UsageError(f"{flag}: '{part}', expected NAME:WEIGHT with a positive number")

        if name.strip() in found:
            raise UsageError(f"{flag}: '{name.strip()}' occurs twice; give one weight")

        found[name.strip()] = weight

    return found
