"""Finetune: `deepspeed launchers/finetune.sh TASK ARGS`, or `python -m megatron_interbert.finetune
TASK ARGS` in one process.
"""

import signal
from collections.abc import Callable
from typing import Any

from megatron_interbert.command_line import parse_task
from megatron_interbert.errors import end_at_once, run_entry
from megatron_interbert.signals import STOPPING, handle_signals
from megatron_interbert.tasks.config import FinetuneConfig
from megatron_interbert.tasks.glue.config import GlueConfig
from megatron_interbert.tasks.glue.job import glue_job
from megatron_interbert.tasks.retrieval.config import RetrievalConfig
from megatron_interbert.tasks.retrieval.job import retrieval_job
from megatron_interbert.tasks.shop.config import ProductSearchConfig, RecommendationConfig
from megatron_interbert.tasks.shop.search import product_search_job
from megatron_interbert.tasks.shop.topics import recommendation_job
from megatron_interbert.tasks.vcr.config import VcrConfig
from megatron_interbert.tasks.vcr.job import vcr_job
from megatron_interbert.training.setup import prepare

TASKS: dict[str, tuple[type[FinetuneConfig], Callable[..., Any]]] = {
    "retrieval": (RetrievalConfig, retrieval_job),
    "vcr": (VcrConfig, vcr_job),
    "glue": (GlueConfig, glue_job),
    "product_search": (ProductSearchConfig, product_search_job),
    "recommendation": (RecommendationConfig, recommendation_job),
}


def run() -> None:
    """Read `finetune TASK FLAGS`, build the parts and train."""
    handle_signals((*STOPPING, signal.SIGINT), end_at_once)  # until the run handles them itself
    config, make_job = parse_task(TASKS, "retrieval --init-from RUN --data-path STORE")
    prepare(config, make_job).train()


def main() -> None:
    """Run the entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
