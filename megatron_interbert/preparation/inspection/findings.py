"""Define the result of an inspection: the report with its figures, and its verdicts."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Verdict:
    """Hold one verdict. level: ok, warning, problem; where: the first places; more: how many others
    are not listed.
    """

    level: str
    about: str
    what: str
    mend: str = ""
    where: list[str] = field(default_factory=list)
    more: int = 0


@dataclass
class Report:
    """Hold what was found; the JSON has everything except `class_names` and `readable`."""

    store: str
    facts: dict[str, Any]
    counts: dict[str, Any]
    shards: list[dict[str, Any]]
    histograms: dict[str, Any]
    classes: dict[str, Any]
    class_shift: dict[str, Any]
    box_format: dict[str, Any]
    layout: dict[str, Any]
    verdicts: list[Verdict]
    class_names: list[str] = field(default_factory=list)
    # images that could be read, evenly spread, for examples
    readable: list[int] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """Return how many verdicts are problems."""
        return sum(verdict.level == "problem" for verdict in self.verdicts)

    @property
    def summary(self) -> str:
        """Return the numbers of problems and warnings as text: "1 problem, 2 warnings"."""
        counts = {
            level: sum(verdict.level == level for verdict in self.verdicts)
            for level in ("problem", "warning")
        }
        return ", ".join(
            f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items()
        )

    def as_json(self) -> str:
        """Return the report as JSON text."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("readable", "class_names")
        }
        return json.dumps({**values, "problems": self.problems}, indent=1, ensure_ascii=False)
