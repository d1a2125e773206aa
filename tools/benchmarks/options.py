"""Declare the flags of every benchmark."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import Flags, option


@dataclass
class BenchmarkOptions(Flags):
    """Hold the flags that all benchmarks share."""

    GROUP: ClassVar[str] = "measuring"

    folder: str = option(
        "", "disk to measure on; default: that of temporary files", group="logging"
    )
    output: str = option("", "JSON file for the figures", group="logging")
