"""Generate the sample shop in Chinese: made-up products, queries, topics and clicks of users.

    interbert make-shop --output sample_shop

For each split (train, test): a region store of the products, whose captions are their titles (and
descriptions, for training); items.jsonl with their attributes; queries.jsonl in the format of MUGE
(query_id, query_text, item_ids); topics.jsonl (name, description, keywords); clicks.jsonl
(topic_id, item_id, user_id, clicked). The test products, which a service may show, also have
pictures/ITEM_ID.png. Products, queries and topics of the two splits are drawn independently.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_interbert.command_line import run_command
from megatron_interbert.config.options import Flags, option
from megatron_interbert.errors import imports_of
from megatron_interbert.files import check_writable


@dataclass
class Options(Flags):
    """Hold the flags of make-shop."""

    GROUP: ClassVar[str] = "data"

    output: str = option("sample_shop", "folder for train/ and test/")
    train_products: int = option(8000, "products to train on", least=2)
    test_products: int = option(500, "unseen products", least=2)
    train_queries: int = option(16000, "queries to train on", least=2)
    test_queries: int = option(400, "unseen queries", least=2)
    train_topics: int = option(3200, "topics to train on", least=2)
    test_topics: int = option(40, "unseen topics", least=2)
    noise: float = option(0.3, "noise of the features, against prototypes of norm 1 per entry")
    seed: int = option(0, "the same seed gives the same shop", least=0)


def run(options: Options) -> None:
    """Generate both splits."""
    folder = Path(options.output)
    check_writable(folder, "--output")
    with imports_of("features", "make-shop"):
        from megatron_interbert.sample.shop import SPLITS, write_split
        from megatron_interbert.sample.shop_world import ShopWorld

    world = ShopWorld(options.seed, options.noise)

    for split in SPLITS:
        kinds = ("products", "queries", "topics")
        sizes = [getattr(options, f"{split}_{kind}") for kind in kinds]
        write_split(world, folder, split, *sizes, options.seed, pictures=split == "test")

    print(
        f"generated shop in {options.output}: {options.train_products} products to train on and"
        f" {options.test_products} unseen ones"
    )


def main() -> None:
    """Run the command."""
    run_command(Options, __doc__, run)
