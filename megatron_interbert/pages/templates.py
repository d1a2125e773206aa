"""Pages and pictures from Jinja templates; texts of users are escaped in HTML."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

COMMON = Path(__file__).with_name("templates")  # what all pages share


@cache
def environment(folder: Path) -> Environment:
    """Give the environment of the templates in a folder, which may extend the common ones."""
    return Environment(
        loader=FileSystemLoader([folder, COMMON]),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path, **values: Any) -> str:
    """Fill in a template; a name that it uses and nobody gives is an error."""
    return environment(template.parent).get_template(template.name).render(**values)
