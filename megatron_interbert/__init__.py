"""Training of InterBERT (arXiv 2003.13198), a vision-and-language encoder over region features, on the DeepSpeed engine.

Importing the package registers its Auto classes with transformers, without importing transformers itself.
"""

import importlib
import itertools
import os
import signal
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


def _begin_command() -> None:
    """Prepare a process of one of our commands for imports that take seconds.

    Ctrl-C ends it without a traceback (run_entry takes the signal back), and DS_ACCELERATOR is sound
    before DeepSpeed looks at it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in ("cpu", "cuda"):
        print(f"error: DS_ACCELERATOR is '{device}', expected cpu or cuda; unset it to let torch decide", file=sys.stderr)
        sys.exit(2)


def _is_command() -> bool:
    """Whether this process runs `python -m megatron_interbert..`, a launcher or a tool."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":  # what Python writes there until it has found the module to run
        name = next((word for before, word in itertools.pairwise(sys.orig_argv) if before == "-m"), "")
        return name == "megatron_interbert" or name.startswith("megatron_interbert.")
    if os.path.basename(script).startswith("interbert"):
        return True
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    place = os.path.dirname(os.path.abspath(script))
    return place in (os.path.join(root, "launchers"), os.path.join(root, "tools"))


if os.environ.get("DS_ACCELERATOR") == "":  # DeepSpeed takes it for the name of a device
    del os.environ["DS_ACCELERATOR"]
if _is_command():
    _begin_command()


def _register_auto_classes() -> None:
    try:
        importlib.import_module("megatron_interbert.hf")
    except ImportError as error:  # another version of transformers: no reason to take that away from its user as well
        warnings.warn(f"megatron_interbert: no Auto classes for InterBERT: {error}", stacklevel=2)


class _WhenTransformersIsImported:
    """Import hook that registers our classes right after `transformers` has been imported, and then is done.

    The registries of transformers hold classes, not names, so filling them takes torch and the modelling code: seconds, which
    training processes and light tools never need. Whoever asks for AutoModel imports transformers first, and pays then. The
    package itself is the right moment: Python finishes it before any of its submodules begins.
    """

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The usual spec of `transformers`, its loader extended by the registration; None for every other module."""
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not cls)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            sys.meta_path.remove(cls)  # not earlier: a spec may be asked for only to see whether transformers is there
            _register_auto_classes()

        spec.loader.exec_module = load_and_register
        return spec


if "transformers" in sys.modules:
    _register_auto_classes()
else:
    sys.meta_path.insert(0, _WhenTransformersIsImported)
