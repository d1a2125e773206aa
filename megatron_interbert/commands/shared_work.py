"""Declare the flags of every command whose work several processes can share."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import Flags, option
from megatron_interbert.preparation.sharing import TIMEOUT


@dataclass
class SharedWorkOptions(Flags):
    """Hold the flags of shared work."""

    GROUP: ClassVar[str] = "work"

    restart: bool = option(False, "discard unfinished work and start over")
    claim_timeout: float = option(
        TIMEOUT,
        "seconds without a sign of life after which the work of another process of the job is taken"
        " over",
        least=1,
    )
