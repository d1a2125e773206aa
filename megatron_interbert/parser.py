"""Parse command lines with errors of one line."""

import argparse
from typing import NoReturn

from megatron_interbert.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Parse a command line, reporting errors in one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, which `run_entry` prints."""
        raise UsageError(message)
