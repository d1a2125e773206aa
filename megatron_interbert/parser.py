"""The parser of every command line here."""

import argparse
from typing import NoReturn

from megatron_interbert.errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, which `run_entry` prints."""
        raise UsageError(message)
