"""Run one stage: python -m tests.gpu.stages MODULE:FUNCTION --record FILE --scratch FOLDER."""

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

from tests.gpu.stages.place import Place, Record


def main() -> None:
    """Call the stage's function; an exception counts as a failure. Exit code 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--pretend", action="store_true")
    arguments = parser.parse_args()
    module, _, name = arguments.function.partition(":")
    record = Record(arguments.record)

    try:
        stage = getattr(importlib.import_module(module), name)
        stage(Place(arguments.scratch, arguments.pretend), record)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        record.expect(False, f"{type(error).__name__}: {text[:300]}")

    sys.stdout.flush()
    os._exit(1 if record.failed else 0)  # destructors of process groups may hang


main()
