"""`interbert COMMAND ..`, also as `python -m megatron_interbert COMMAND ..`."""

import sys
from importlib import import_module

from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError, run_entry

# Each command with the module whose `main` it is, and what it does.
COMMANDS = {
    "pretrain": ("pretrain", "pretrain on region stores, in one process"),
    "pretrain-chinese": ("pretrain_chinese", "the same with the Chinese model's recipe"),
    "finetune": ("finetune", "finetune for retrieval, VCR, GLUE, product search, recommendation"),
    "evaluate": ("evaluate", "evaluate a trained model on one of these tasks"),
    "serve": ("serve", "product search and recommendation over HTTP"),
    "launch": ("launch", "any of these on all GPUs of this machine: interbert launch pretrain .."),
    "preflight": ("preflight", "check machines, data and one step before a long run"),
    "plan": ("commands.plan", "layouts of a model that fit the memory of a device"),
    "build-features": ("commands.build_features", "a region store from published features"),
    "extract-features": ("commands.extract_features", "a region store from photos"),
    "inspect-features": (
        "commands.inspect_features",
        "what is in a region store, and what is wrong",
    ),
    "mine-negatives": ("commands.mine_negatives", "hard captions for pretraining"),
    "mine-neighbours": ("commands.mine_neighbours", "hard images for finetuning"),
    "make-queries": ("commands.make_queries", "queries of KDD Cup 2020 for product search"),
    "make-sample": ("commands.make_sample", "a generated corpus to try things out"),
    "make-shop": ("commands.make_shop", "a generated shop in Chinese to try things out"),
    "shop-report": ("commands.shop_report", "how well models do in the generated shop"),
    "convert": ("commands.convert", "weights from any format to any other"),
    "summarise": ("commands.summarise", "mean and spread of several results"),
}


def help_text() -> str:
    """List all commands, a line each."""
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


def choose() -> str:
    """Choose the module of the command that is asked for; SystemExit after --help."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(help_text())
        raise SystemExit

    if name not in COMMANDS:
        raise UsageError(
            f"no command '{name}'{nearest(name, COMMANDS)}; interbert --help lists all"
        )

    return COMMANDS[name][0]


def main() -> None:
    """Run one command."""
    found: list[str] = []
    run_entry(lambda: found.append(choose()))
    sys.argv = [f"interbert {sys.argv[1]}", *sys.argv[2:]]
    import_module(f"megatron_interbert.{found[0]}").main()


if __name__ == "__main__":
    main()
