"""Read the command line and YAML into dataclasses of options, and build --help from these."""

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_interbert.config.options import (
    AUTO,
    GROUPS,
    Facts,
    declaring_class,
    flag,
    nearest,
    rows,
)
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.reading import read_text

# options that may name a file beside the YAML that sets them
BESIDE = ("deepspeed_config", "model")
FLAG = re.compile("--[A-Za-z0-9_-]+")
RECIPE = "the launcher's recipe"  # origin of settings that the launcher makes and the user does not
TITLES = {
    "parallelism": "parallelism, precision and kernels",
    "logging": "logging and evaluation",
}


class Parser(argparse.ArgumentParser):
    """Parse a command line, reporting errors in one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, which `run_entry` prints."""
        raise UsageError(message.removeprefix("argument "))


class Help(argparse.RawDescriptionHelpFormatter):
    """Format --help: the description as written, and one short name for each flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return "--[no-]" + action.option_strings[0].removeprefix("--")
        return super()._format_action_invocation(action)


def build_parser(
    config_class: type, description: str, command: str | None = None
) -> argparse.ArgumentParser:
    """Build a parser with one flag per dataclass field; --help calls it `command`.

    Flags that are not given are absent from the namespace.
    """
    arguments = [
        metavar(entry) + (" .." if entry.metadata["facts"].several else "")
        for entry in dataclasses.fields(config_class)
        if is_argument(entry)
    ]
    parser = Parser(
        prog=command,
        description=inspect.cleandoc(description),
        usage=" ".join(["%(prog)s", *arguments, "[FLAGS]"]),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=Help,
    )

    for title, entries in grouped(config_class).items():
        group = parser.add_argument_group(TITLES.get(title, title))
        for entry in entries:
            add_flag(group, entry)
        if title == "more":
            group.add_argument(
                "--config", metavar="FILE", help="YAML with any of these flags as keys"
            )

    # Passed by the deepspeed launcher, and out of habit by users of Megatron-DeepSpeed; both are
    # ignored.
    parser.add_argument("--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)

    return parser


def grouped(config_class: type) -> dict[str, list[dataclasses.Field]]:
    """Group the flags of a command by the title under which --help shows them.

    Within a title a command's own flags come before inherited ones; titles that are not in GROUPS
    come before `optimisation`.
    """
    found: dict[str, list[dataclasses.Field]] = {"more": []}

    for declaring in config_class.__mro__:
        for entry in dataclasses.fields(config_class):
            if declaring_class(config_class, entry.name) is declaring:
                title = entry.metadata["facts"].group or declaring.GROUP
                found.setdefault(title, []).append(entry)

    own = [title for title in found if title not in GROUPS]
    first = GROUPS.index("optimisation")
    order = (*GROUPS[:first], *own, *GROUPS[first:])

    return {title: found[title] for title in order if title in found}


def add_flag(group: Any, entry: dataclasses.Field) -> None:
    """Add the flag of one field, and its old spellings, to a group of a parser."""
    facts: Facts = entry.metadata["facts"]
    text = facts.help.replace("%", "%%") + default_of(entry)
    kind: dict[str, Any] = {"type": reader(entry), "metavar": metavar(entry)}
    if facts.several:
        kind["nargs"] = "+"
    if entry.type is bool:
        kind = {"action": argparse.BooleanOptionalAction}

    if facts.positional:
        group.add_argument(entry.name, help=text, **kind)
        return

    group.add_argument(spelling(entry.name, facts), dest=entry.name, help=text, **kind)
    for old in facts.old_names:
        group.add_argument(old, dest=entry.name, help=argparse.SUPPRESS, **kind)


def spelling(name: str, facts: Facts) -> str:
    """Return how the command line spells a setting."""
    return name if facts.positional else facts.flag or flag(name)


def is_argument(entry: dataclasses.Field) -> bool:
    """Check whether a field is a positional argument."""
    return entry.metadata["facts"].positional


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


def metavar(entry: dataclasses.Field) -> str:
    """Return what --help shows as a flag's value: its choices, N for int, X for float, else its
    last word.
    """
    facts: Facts = entry.metadata["facts"]
    if facts.choices:
        return "{" + ",".join(named(facts.choices)) + "}"
    if facts.positional:
        return entry.name.upper()
    if entry.type is int:
        return "N"

    return "X" if entry.type is float else entry.name.split("_")[-1].upper()


def default_of(entry: dataclasses.Field) -> str:
    """Return how --help states a flag's default; empty where the flag's own text states it."""
    facts: Facts = entry.metadata["facts"]
    if facts.as_trained is not None:
        otherwise = "" if isinstance(facts.as_trained, bool) else f", else {facts.as_trained}"
        return f"; default: as the weights were trained{otherwise}"

    if entry.type is bool:
        return " (default)" if entry.default and "--no-" not in facts.help else ""
    if "default:" in facts.help or entry.default in ("", (), None):
        return " (required)" if facts.required and not facts.positional else ""
    if not entry.default and f"{entry.default:g}:" in facts.help:  # `0: never`
        return " (default: 0)"

    return f" (default: {entry.default})"


def parse(
    config_class: type,
    description: str,
    argv: Sequence[str] | None = None,
    recipe: Sequence[str] = (),
    command: str | None = None,
) -> Any:
    """Read the command line and the YAML of --config into an instance of `config_class`.

    --help calls the program `command`, by default the name of its file.

    `recipe` holds flags that apply where neither sets a value. `.given` of the result holds the
    names that any of the three has set, `.origins` where those not from the command line come from.
    """
    argv = [with_dashes(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(config_class, description, command)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        wrong = unknown[0].split("=")[0]
        raise UsageError(f"unknown argument '{wrong}'{hint(wrong, config_class)}; --help lists all")

    values = vars(namespace)
    values.pop("local_rank", None)
    values.pop("deepspeed", None)
    file = values.pop("config", "")
    by_file = read_yaml(config_class, file) if file else {}
    by_recipe = vars(parser.parse_args(recipe)) if recipe else {}
    given = {**by_recipe, **by_file, **values}
    check_required(config_class, given)

    config = config_class(**given)
    config.given = set(given)
    config.origins |= {name: RECIPE for name in by_recipe if name not in values}
    config.origins |= {name: file for name in by_file if name not in values}

    return config


def hint(wrong: str, config_class: type) -> str:
    """Say for an unknown flag which other command has it, or which flag is most similar."""
    for who_takes, other in config_class.ELSEWHERE.items():
        if wrong in spellings(other):
            return f", which {who_takes}, not this command"

    return nearest(wrong, (spelling(name, facts) for name, facts in rows(config_class)))


def spellings(config_class: type) -> set[str]:
    """Return all flags of a command, with their negations and old names."""
    found = set()
    for entry in dataclasses.fields(config_class):
        facts = entry.metadata["facts"]
        word = spelling(entry.name, facts)
        found |= {word, *facts.old_names}
        if entry.type is bool:
            found.add(word.replace("--", "--no-", 1))

    return found


def check_required(config_class: type, given: Mapping[str, Any]) -> None:
    """Raise UsageError that names the required flags that are missing."""
    missing = [
        spelling(name, facts)
        for name, facts in rows(config_class)
        if facts.required and not facts.positional and name not in given
    ]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")


def run_command(
    config_class: type, about: str, work: Callable[[Any], None], reports: bool = False
) -> None:
    """Run `work` with the options of the command line; for `reports` see `run_entry`."""
    run_entry(lambda: work(read_options(config_class, about)), reports)


def read_options(config_class: type, about: str = "") -> Any:
    """Read the command line into options and check them; raises UsageError if they are invalid."""
    options = parse(config_class, about)
    options.check()
    return options


def with_dashes(word: str) -> str:
    """Return `--data-path=a_b` for `--data_path=a_b`; leave words other than flags alone, such as a
    value that holds flags for another command.
    """
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if FLAG.fullmatch(name) else word


def parse_task(tasks: Mapping[str, tuple[type, Any]], example: str) -> tuple[Any, Any]:
    """Read `TASK FLAGS`; return the checked configuration, and what `tasks` pairs with its class.

    Raises UsageError for an unknown task. Ignores the --local_rank that the deepspeed launcher may
    put before the task.
    """
    command = command_name()
    words = [word for word in sys.argv[1:] if not word.startswith("--local")]
    task, flags = (words[0], words[1:]) if words else ("", [])
    if task in ("-h", "--help"):
        print(help_of_tasks(tasks, command, example))
        raise SystemExit

    if task not in tasks:
        given = task and not task.startswith("-")
        found = f"task '{task}'{nearest(task, tasks)}" if given else "the task is missing"
        first = "" if given else " as the first word"
        raise UsageError(
            f"{found}, expected one of {', '.join(tasks)}{first}, for example: {command} {example}"
        )

    config_class, function = tasks[task]
    about = config_class.__doc__ or ""
    config = parse(config_class, about, flags, command=f"{command} {task}")
    config.check()

    return config, function


def command_name() -> str:
    """Return how a user calls this program: by its file, or for a module as an `interbert`
    command.
    """
    file = os.path.basename(sys.argv[0])
    package = os.path.dirname(os.path.abspath(__file__))
    if os.path.dirname(os.path.abspath(sys.argv[0])) == package:
        return f"interbert {file.removesuffix('.py')}"

    return file


def help_of_tasks(tasks: Mapping[str, tuple[type, Any]], command: str, example: str) -> str:
    """Return a help text that lists the tasks of a command."""
    width = max(map(len, tasks))
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, (kind, _) in tasks.items()}
    rows = [f"  {name:<{width}}  {sentence}" for name, sentence in about.items()]

    return "\n".join(
        [
            f"usage: {command} TASK [FLAGS]",
            "",
            "tasks:",
            *rows,
            "",
            f"{command} TASK --help lists the flags of a task. Example:",
            f"  {command} {example}",
        ]
    )


def read_yaml(config_class: type, path: str) -> dict[str, Any]:
    """Read YAML whose keys are flag names (with `-` or `_`), and check types and choices.

    Raises UsageError that names the file and the key.
    """
    text = read_text(path, "--config")

    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from error

    if not isinstance(values, dict):
        raise UsageError(
            f"{path}: holds a {type(values).__name__}, expected flags with their settings, such as"
            " 'lr: 1e-4'"
        )

    entries = {entry.name: entry for entry in dataclasses.fields(config_class)}
    names = {name: name for name in entries}
    for name, facts in rows(config_class):
        spellings = (spelling(name, facts), *facts.old_names)
        names |= {key_of(word): name for word in spellings}

    result: dict[str, Any] = {}
    for key, value in values.items():
        written = key_of(str(key))
        if written not in names:
            raise UsageError(f"{path}: unknown key '{key}'{nearest(written, names)}")

        name = names[written]
        if name in result:
            raise UsageError(f"{path}: '{key}' sets {flag(name)} a second time; leave one of them")
        result[name] = from_yaml(entries[name], value, f"{path}: '{key}'")
        if name in BESIDE and isinstance(result[name], str):
            result[name] = beside(path, result[name])

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
