"""Declare the options of commands: one row per flag, with everything that is known about it.

Precedence: flag, then YAML (`--config`), then DeepSpeed JSON where it has the same setting, then
the default in the row. Only `training/deepspeed_config.py` merges the DeepSpeed JSON.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from megatron_interbert.errors import UsageError

LARGEST_INTEGER = (1 << 63) - 1  # that generators, tensors and files can hold
BELOW_1 = math.nextafter(1.0, 0.0)
ABOVE_0 = math.nextafter(0.0, 1.0)
AUTO = -(1 << 62)  # `auto`, a number to be found when the run starts; never given as a number

ONE_TEXT = "[CLS] word [SEP]"
TWO_TEXTS = "[CLS] word [SEP] word [SEP]"

# Titles of --help, in this order; a command's own titles come before `optimisation`.
GROUPS = ("data", "model", "optimisation", "parallelism", "checkpoints", "logging", "more")


class Resume(Enum):
    """Name what a resumed run does if a setting differs from that of its checkpoint."""

    SAME = "refuse: samples or losses of a step depend on it"
    NOTE = "take the new value and print a note"
    FREE = "take the new value"


SAME, NOTE, FREE = Resume


@dataclass(frozen=True)
class Facts:
    """Hold everything that is known about a flag except its name, type and default."""

    help: str
    choices: Sequence[Any] | None = None
    auto: bool = False  # accepts the word `auto`, read as AUTO
    least: float = -math.inf
    most: float = math.inf
    room_for: str = ""  # tokens that the length must leave room for, unless it is 0
    # Set for flags whose default is what the weights were trained with: used if that is unknown.
    as_trained: int | bool | None = None
    resume: Resume | None = None  # for settings of a training run
    fitted: bool = False  # to data and model; a resumed run keeps the value of its first start
    may_differ: bool = False  # between machines
    names_store: bool = False  # one or more paths of region stores
    deepspeed: str = ""  # path in the DeepSpeed JSON of the same setting
    group: str = ""  # title in --help; default: that of the class that declares the flag
    positional: bool = False  # an argument without a flag
    several: bool = False  # takes one or more words, a list of texts or numbers
    required: bool = False
    read: Callable[[str], Any] | None = None  # converts a word; default: the field's type
    flag: str = ""  # if it is not the field's name, for example a Python keyword
    old_names: tuple[str, ...] = ()  # earlier spellings, still accepted


def option(default: Any, help: str, choices: Sequence[Any] | None = None, **facts: Any) -> Any:
    """Declare a flag as a field of a `Flags` dataclass; `facts` are fields of `Facts`."""
    return _field(default, Facts(help, choices, **facts))


def argument(help: str, several: bool = False, **facts: Any) -> Any:
    """Declare a positional argument of a command, of one word or several."""
    default: Any = () if several else ""
    return option(default, help, positional=True, several=several, required=True, **facts)


def _field(default: Any, facts: Facts) -> Any:
    return field(default=default, metadata={"facts": facts})


def setting(
    default: Any, help: str, resume: Resume, choices: Sequence[Any] | None = None, **facts: Any
) -> Any:
    """Declare a flag of a training run; `resume` says what a resumed run does if it differs."""
    return option(default, help, choices, resume=resume, **facts)


def redefault(config_class: type, name: str, default: Any, help: str = "", **facts: Any) -> Any:
    """Declare a flag of a base class with another default; facts not given are inherited."""
    changed = {"help": help, **facts} if help else facts
    inherited = facts_of(config_class, name)
    return _field(default, dataclasses.replace(inherited, **changed))


def facts_of(config: Any, name: str) -> Facts:
    """Return the facts of a flag of a configuration or its class."""
    return config.__dataclass_fields__[name].metadata["facts"]


def rows(config: Any) -> Iterator[tuple[str, Facts]]:
    """Yield name and facts of every flag of a configuration or its class."""
    for entry in dataclasses.fields(config):
        yield entry.name, entry.metadata["facts"]


def declaring_class(config_class: type, name: str) -> type:
    """Return the class that first declares a flag, whatever subclass changes its default."""
    ancestors = reversed(config_class.__mro__)
    return next(c for c in ancestors if name in inspect.get_annotations(c))


@dataclass
class Flags:
    """Hold the settings of a command, record which were given and where others come from, and
    check them.
    """

    GROUP: ClassVar[str] = "more"
    # commands whose flags users may try here, such as "pretrain takes", and their flags
    ELSEWHERE: ClassVar[dict[str, type]] = {}

    def __post_init__(self) -> None:
        self.given: set[str] = set()
        self.origins: dict[str, str] = {}  # where settings come from that no flag gives
        self.fitted: set[str] = set()
        self.notes: list[str] = []  # lines about settings that were fitted, for the user
        self.frozen = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; raises TypeError for a change to a frozen configuration."""
        if self.__dict__.get("frozen") and getattr(self, name) != value:
            raise TypeError(
                f"{name} is settled at {getattr(self, name)!r} and cannot become {value!r}"
            )

        super().__setattr__(name, value)

    def freeze(self) -> None:
        """Make all settings immutable from now on."""
        self.frozen = True

    def is_default(self, name: str) -> bool:
        """Check whether a setting was given by nothing: no flag, file or checkpoint."""
        return name not in self.given and name not in self.origins

    def settle(self, name: str, value: Any, origin: str) -> None:
        """Take a setting from `origin`, such as `ds.json` or `RUN/global_step10`."""
        setattr(self, name, value)
        self.origins[name] = origin
        self.check_limits(name)

    def fit(self, name: str, value: Any, reason: str) -> None:
        """Replace a default by a value that fits, and note it with the reason for the user."""
        if value == getattr(self, name):
            return
        self.notes.append(f"note: {flag(name)} {value} instead of {getattr(self, name)}: {reason}")
        setattr(self, name, value)
        self.fitted.add(name)

    def told(self, name: str) -> str:
        """Return a setting, its value and its origin, such as `--lr 0.1 (from run.yaml)`."""
        value = getattr(self, name)
        auto = value == AUTO and facts_of(self, name).auto
        return f"{flag(name)} {'auto' if auto else value}{self.origin(name)}"

    def origin(self, name: str) -> str:
        """Return where a setting comes from, such as ` (default)`; empty if a flag gives it."""
        if name in self.origins:
            return f" (from {self.origins[name]})"
        if name in self.fitted:
            return " (fitted)"
        return " (default)" if self.is_default(name) else ""

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        for name, _ in rows(self):
            self.check_limits(name)

    def check_limits(self, name: str) -> None:
        """Raise UsageError for NaN, infinity, or a number outside the limits of its row."""
        value = getattr(self, name)
        facts = facts_of(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        if value == AUTO and facts.auto:
            return
        if isinstance(value, int) and not -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
            raise UsageError(
                f"{flag(name)}{self.origin(name)}: expected a number of fewer than 20 digits"
            )

        if not math.isfinite(value):
            raise UsageError(f"{self.told(name)}: expected a finite number")

        if not facts.least <= value <= facts.most:
            raise UsageError(f"{self.told_as_number(name)} expected {limits(facts)}")
        if facts.room_for and 0 < value < len(facts.room_for.split()):
            least = len(facts.room_for.split())
            raise UsageError(
                f"{self.told_as_number(name)} expected {least} or more ({facts.room_for})"
            )

    def told_as_number(self, name: str) -> str:
        """Return how a message about a setting out of its limits begins."""
        value = getattr(self, name)
        if isinstance(value, float) and facts_of(self, name).least != ABOVE_0:
            return f"{self.told(name)}:"
        return f"{flag(name)} is {value}{self.origin(name)},"


def limits(facts: Facts) -> str:
    """Describe the limits of a number, such as `0 or more`."""
    if facts.least == ABOVE_0 and math.isinf(facts.most):
        return "more than 0"
    if facts.least == ABOVE_0:
        return f"more than 0, {facts.most:g} at most"
    if math.isinf(facts.most):
        return f"{facts.least:g} or more"
    if facts.most == BELOW_1:
        return f"{facts.least:g} or more and below 1"
    if math.isinf(facts.least):
        return f"{facts.most:g} or less"

    return f"{facts.least:g} to {facts.most:g}"


def flag(name: str) -> str:
    """Return `--data-path` for `data_path`."""
    return "--" + name.replace("_", "-")


def spelling(name: str, facts: Facts) -> str:
    """Return how the command line spells a setting."""
    return name if facts.positional else facts.flag or flag(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'X'?)` with the known name nearest to a wrong one, else no text."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""
