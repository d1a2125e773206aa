"""InterBERT (arXiv 2003.13198) on the DeepSpeed engine: region features, any scale."""

import itertools
import os
import signal
import sys

__version__ = "0.1.0"


def _begin_command() -> None:
    """Prepare a process of one of our commands for imports that take seconds.

    Ctrl-C ends it without a traceback (run_entry takes the signal back), and DS_ACCELERATOR is
    sound before DeepSpeed looks at it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    device = os.environ.get("DS_ACCELERATOR", "cpu")
    if device not in ("cpu", "cuda"):
        print(
            f"error: DS_ACCELERATOR is '{device}', expected cpu or cuda; unset it to let torch"
            " decide",
            file=sys.stderr,
        )
        sys.exit(2)


def _is_command() -> bool:
    """Tell whether this process runs `python -m megatron_interbert..`, a launcher or a tool."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":  # what Python writes there until it has found the module to run
        name = next(
            (word for before, word in itertools.pairwise(sys.orig_argv) if before == "-m"), ""
        )
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
