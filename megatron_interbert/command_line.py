"""Read command lines into dataclasses of options, and build --help from these."""

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from megatron_interbert.config.options import (
    GROUPS,
    Facts,
    declaring_class,
    nearest,
    rows,
    spelling,
)
from megatron_interbert.config.words import named, reader
from megatron_interbert.config.yaml_file import read_yaml
from megatron_interbert.errors import UsageError, run_entry

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


def is_argument(entry: dataclasses.Field) -> bool:
    """Check whether a field is a positional argument."""
    return entry.metadata["facts"].positional


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
