"""Options of a command: one row a flag, and on it everything that is known about the flag.

Precedence: flag, then YAML (`--config`), then DeepSpeed JSON where it names the same thing, then
the default of the row. `training/deepspeed_config.py` is the one place that merges the DeepSpeed
JSON.
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

LARGEST_INTEGER = (1 << 63) - 1  # what generators, tensors and files hold
BELOW_1 = math.nextafter(1.0, 0.0)
ABOVE_0 = math.nextafter(0.0, 1.0)
AUTO = -(1 << 62)  # `auto`: a number that is found when the run starts, and that nobody gives

ONE_TEXT = "[CLS] word [SEP]"
TWO_TEXTS = "[CLS] word [SEP] word [SEP]"

# Titles of --help, in this order; what a command has beside these comes last.
GROUPS = ("data", "model", "optimisation", "parallelism", "checkpoints", "logging", "more")


class Resume(Enum):
    """What a resumed run does where a setting is not that of its checkpoint."""

    SAME = "refuse: samples or losses of a step depend on it"
    NOTE = "go by the new one, and say so"
    FREE = "go by the new one"


SAME, NOTE, FREE = Resume


@dataclass(frozen=True)
class Facts:
    """Everything that is known about a flag but its name, type and default."""

    help: str
    choices: Sequence[Any] | None = None
    auto: bool = False  # the word `auto` stands for AUTO
    least: float = -math.inf
    most: float = math.inf
    room_for: str = ""  # tokens that a length must have room for, unless it is 0
    as_trained: int | bool | None = None  # not given: as the weights were trained, else this
    resume: Resume | None = None  # of settings of a training run
    fitted: bool = False  # to data and model; a resumed run keeps what was fitted at first
    may_differ: bool = False  # between machines
    names_store: bool = False  # a path, or several, of region stores
    deepspeed: str = ""  # path of the DeepSpeed JSON that means the same
    group: str = ""  # in --help; default: that of the class that declares the flag
    positional: bool = False  # an argument without a flag
    several: bool = False  # one or more words, a list of texts or numbers
    required: bool = False
    read: Callable[[str], Any] | None = None  # from a word; default: the field's type
    flag: str = ""  # where it is not the field's name, which Python may not allow
    old_names: tuple[str, ...] = ()  # spellings of before, still accepted


def option(default: Any, help: str, choices: Sequence[Any] | None = None, **facts: Any) -> Any:
    """Declare a flag as a field of a `Flags` dataclass; `facts` are those of `Facts`."""
    return _field(default, Facts(help, choices, **facts))


def argument(help: str, several: bool = False, **facts: Any) -> Any:
    """Declare what a command takes without a flag, one word or several."""
    default: Any = () if several else ""
    return option(default, help, positional=True, several=several, required=True, **facts)


def _field(default: Any, facts: Facts) -> Any:
    return field(default=default, metadata={"facts": facts})


def setting(
    default: Any, help: str, resume: Resume, choices: Sequence[Any] | None = None, **facts: Any
) -> Any:
    """Declare a flag of a training run, which must decide what a resumed run does with it."""
    return option(default, help, choices, resume=resume, **facts)


def redefault(config_class: type, name: str, default: Any, help: str = "", **facts: Any) -> Any:
    """Declare a flag of a base class with another default; its other facts hold unless given."""
    changed = {"help": help, **facts} if help else facts
    inherited = facts_of(config_class, name)
    return _field(default, dataclasses.replace(inherited, **changed))


def facts_of(config: Any, name: str) -> Facts:
    """Give the facts of a flag of a configuration or its class."""
    return config.__dataclass_fields__[name].metadata["facts"]


def rows(config: Any) -> Iterator[tuple[str, Facts]]:
    """Give name and facts of every flag of a configuration or its class."""
    for entry in dataclasses.fields(config):
        yield entry.name, entry.metadata["facts"]


def declaring_class(config_class: type, name: str) -> type:
    """Give the class that declares a flag first, before others gave it another default."""
    ancestors = reversed(config_class.__mro__)
    return next(c for c in ancestors if name in inspect.get_annotations(c))


@dataclass
class Flags:
    """What every command is told: its settings, which of them were given, and whether they make
    sense.
    """

    GROUP: ClassVar[str] = "more"

    def __post_init__(self) -> None:
        self.given: set[str] = set()
        self.origins: dict[str, str] = {}  # where settings come from that no flag has given
        self.fitted: set[str] = set()
        self.notes: list[str] = []  # lines about settings that were fitted, for the user
        self.frozen = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        TypeError where it changes a setting of a configuration that is frozen.
        """
        if self.__dict__.get("frozen") and getattr(self, name) != value:
            raise TypeError(
                f"{name} is settled at {getattr(self, name)!r} and cannot become {value!r}"
            )

        super().__setattr__(name, value)

    def freeze(self) -> None:
        """Keep all settings as they are from now on."""
        self.frozen = True

    def is_default(self, name: str) -> bool:
        """Tell whether nobody has said this setting: no flag, file or checkpoint."""
        return name not in self.given and name not in self.origins

    def settle(self, name: str, value: Any, origin: str) -> None:
        """Take a setting from `origin` (`ds.json`, `RUN/global_step10`)."""
        setattr(self, name, value)
        self.origins[name] = origin
        self.check_limits(name)

    def fit(self, name: str, value: Any, reason: str) -> None:
        """Replace a default by what fits, and note it for the user."""
        if value == getattr(self, name):
            return
        self.notes.append(f"note: {flag(name)} {value} instead of {getattr(self, name)}: {reason}")
        setattr(self, name, value)
        self.fitted.add(name)

    def told(self, name: str) -> str:
        """Name a setting and where it comes from: `--lr 0.1 (from run.yaml)`."""
        value = getattr(self, name)
        return f"{flag(name)} {'auto' if value == AUTO else value}{self.origin(name)}"

    def origin(self, name: str) -> str:
        """Say where a setting comes from, if no flag has given it."""
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
                f"{flag(name)}{self.origin(name)}: expected a number of less than 20 digits"
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
        """Name a setting that is out of its limits, as the first words of a message."""
        value = getattr(self, name)
        if isinstance(value, float) and facts_of(self, name).least != ABOVE_0:
            return f"{self.told(name)}:"
        return f"{flag(name)} is {value}{self.origin(name)},"


def limits(facts: Facts) -> str:
    """Say between which limits a number lies."""
    if facts.least == ABOVE_0 and math.isinf(facts.most):
        return "more than 0"
    if math.isinf(facts.most):
        return f"{facts.least:g} or more"
    if facts.most == BELOW_1:
        return f"{facts.least:g} or more and below 1"
    if math.isinf(facts.least):
        return f"{facts.most:g} or less"

    return f"{facts.least:g} to {facts.most:g}"


def flag(name: str) -> str:
    """Give `--data-path` for `data_path`."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """Find `; did you mean 'X'?` for the known name nearest to a wrong one, else an empty text."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
