"""Run `interbert COMMAND ..`, also as `python -m megatron_interbert COMMAND ..`."""

import sys
from importlib import import_module

from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError, run_entry

# command -> (module whose `main` runs it, what it does)
COMMANDS = {
    "pretrain": ("pretrain", "pretrain on region stores, in one process"),
    "pretrain-chinese": ("pretrain_chinese", "the same with the recipe of the Chinese model"),
    "finetune": ("finetune", "finetune on one of the tasks, or on several at once"),
    "evaluate": ("evaluate", "evaluate a trained model on one of these tasks"),
    "serve": ("serve", "serve product search and recommendation over HTTP"),
    "launch": (
        "launch",
        "run pretrain, finetune or evaluate on all GPUs of this machine",
    ),
    "preflight": ("preflight", "check machines, data and one step before a long run"),
    "dry-run": ("dry_run", "rehearse a run of any size without its machines"),
    "plan": ("commands.plan", "list the layouts of a model that fit the memory of a device"),
    "build-features": ("commands.build_features", "build a region store from published features"),
    "extract-features": ("commands.extract_features", "build a region store from photos"),
    "inspect-features": (
        "commands.inspect_features",
        "report what a region store holds and what is wrong with it",
    ),
    "mine-negatives": ("commands.mine_negatives", "mine hard captions for pretraining"),
    "mine-neighbours": ("commands.mine_neighbours", "mine hard images for finetuning"),
    "cluster-features": ("commands.cluster_features", "find classes for regions that have none"),
    "make-queries": ("commands.make_queries", "convert KDD Cup 2020 queries for product search"),
    "make-sample": ("commands.make_sample", "generate a corpus to try things out"),
    "make-shop": ("commands.make_shop", "generate a shop in Chinese to try things out"),
    "shop-report": ("commands.shop_report", "measure how well models do in the generated shop"),
    "convert": ("commands.convert", "convert weights from any format to any other"),
    "summarise": ("commands.summarise", "compute mean and spread of several results"),
}


def help_text() -> str:
    """Return the text of --help, which lists all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]

    return "\n".join(
        [
            "usage: interbert COMMAND ..",
            "",
            *lines,
            "",
            "interbert COMMAND --help lists the flags of a command.",
        ]
    )


def help_or_refuse(name: str) -> None:
    """Print --help if that was asked for; raises UsageError for an unknown command."""
    if name not in ("-h", "--help"):
        raise UsageError(
            f"no command '{name}'{nearest(name, COMMANDS)}; interbert --help lists all"
        )

    print(help_text())


def main() -> None:
    """Run the command named on the command line."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        run_entry(lambda: help_or_refuse(name))
        return

    module, _ = COMMANDS[name]
    sys.argv = [f"interbert {name}", *sys.argv[2:]]
    import_module(f"megatron_interbert.{module}").main()


if __name__ == "__main__":
    main()
