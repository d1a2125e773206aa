"""Run a command of this checkout, whether or not its package is installed.

Tools run this file with MODULE, the name of the module whose `main` is the command, and TOOL, the
file that the user called.
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.argv[0] = TOOL  # noqa: F821

import_module(MODULE).main()  # noqa: F821
