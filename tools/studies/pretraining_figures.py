"""Read from the metrics of a pretraining what it reached."""

import json
import statistics
from pathlib import Path

from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_text
from megatron_interbert.training.metrics import RECORDS, step_of

LAST_PART = 0.1  # of a run's steps
LOSSES = ("msm_loss", "mrm_loss", "itm_loss")


def pretraining_figures(run: Path) -> dict[str, float]:
    """Return the means over the last tenth of a run's steps: `loss`, the sum of the objectives'
    losses without that of balance, and with experts `largest_load`, over layers too. Raises
    UsageError if the metrics are missing.
    """
    lines = read_text(run / RECORDS, "--output").splitlines()
    records = [json.loads(line) for line in lines if step_of(line) is not None]
    steps = [record for record in records if record["split"] == "train"]
    if not steps:
        raise UsageError(
            f"{run / RECORDS}: expected the metrics of a pretraining, found none; remove {run}, and"
            " the same command trains it again"
        )

    begin = (1 - LAST_PART) * steps[-1]["step"]
    last = [record for record in steps if record["step"] > begin]

    figures = {"loss": statistics.mean(sum(r.get(x, 0.0) for x in LOSSES) for r in last)}
    loads = [r[name] for r in last for name in r if name.endswith("/largest_load")]
    if loads:
        figures["largest_load"] = statistics.mean(loads)

    return figures
