"""Render pages and pictures from Jinja templates, escaping texts in all but Markdown."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

COMMON = Path(__file__).with_name("templates")  # shared by all pages


@cache
def environment(folder: Path) -> Environment:
    """Return Jinja's environment for the templates in a folder, which may extend common ones."""
    return Environment(
        loader=FileSystemLoader([folder, COMMON]),
        autoescape=lambda name: not (name or "").endswith(".md.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path, **values: Any) -> str:
    """Return a template filled in with `values`; a name that is missing there is an error."""
    return environment(template.parent).get_template(template.name).render(**values)
