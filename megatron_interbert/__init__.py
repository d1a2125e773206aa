"""Pretrain InterBERT (arXiv 2003.13198) over region features on DeepSpeed, at any scale."""

import itertools
import os
import signal
import sys

__version__ = "0.1.0"


def _begin_command() -> None:
    """Prepare the process of one of our commands for imports that take seconds.

    Ctrl-C ends it without a traceback until run_entry restores Python's handler. Exits with code 2
    for a DS_ACCELERATOR other than cpu and cuda, before DeepSpeed reads it.
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
    """Check whether this process runs `interbert`, a module of ours by -m, a launcher or a tool."""
    script = sys.argv[0] if sys.argv else ""
    if script == "-m":  # Python's placeholder until it has found the module to run
        name = next(
            (word for before, word in itertools.pairwise(sys.orig_argv) if before == "-m"), ""
        )
        return name == "megatron_interbert" or name.startswith("megatron_interbert.")

    name = os.path.basename(script)
    if name == "interbert" or name.startswith("interbert "):
        return True

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    place = os.path.dirname(os.path.abspath(script))

    return place in (os.path.join(root, "launchers"), os.path.join(root, "tools"))


if os.environ.get("DS_ACCELERATOR") == "":  # DeepSpeed would take it for a device name
    del os.environ["DS_ACCELERATOR"]
if _is_command():
    _begin_command()
