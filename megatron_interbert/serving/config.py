"""Declare the flags of the service."""

import os
from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import ABOVE_0, option
from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import LoadConfig, photos, store
from megatron_interbert.tasks.shop.config import ItemReading


@dataclass
class ServeConfig(ItemReading, LoadConfig):
    """Serve product search and topic-based recommendation over HTTP, with a page.

    The API key comes from the environment (INTERBERT_API_KEY), because others can read a command
    line.
    """

    GROUP: ClassVar[str] = "service"

    data_path: str = store(
        "sample_shop/test", "region store with the items' pictures, or several, comma-separated"
    )
    items: str = option(
        "",
        "jsonl of item_id, image_id (default: item_id), title and attributes, for a new index;"
        " default: all images",
        group="data",
    )
    topics: str = option(
        "",
        "jsonl of topic_id, name, description, keywords; requests name topics by id",
        group="data",
    )
    image_folder: str = photos("photos named IMAGE_ID.jpg; default: drawings of the regions")
    load_recommendation: str = option(
        "",
        "weights that answer topics, finetuned on clicks; default: those of --load",
        group="model",
    )

    index: str = option(
        "", "folder of the index; default: `index` in the run's folder", group="index"
    )
    recommendation_index: str = option(
        "",
        "folder of the index for topics; default: `index` in the folder of that run",
        group="index",
    )
    index_kind: str = option(
        "exact",
        "exact: compare with all vectors; hnsw: search a graph, for millions of items",
        ("exact", "hnsw"),
        group="index",
    )
    rebuild: bool = option(
        False, "build a new version of the index, even if there is one", group="index"
    )
    build_only: bool = option(
        False,
        "build a new version of the index and end; a running service switches to it",
        group="index",
    )

    host: str = option(
        "127.0.0.1", "address to listen on; put a proxy in front before others can reach it"
    )
    port: int = option(8080, "port to listen on; 0: any free one", least=0, most=65535)
    allowed_hosts: str = option(
        "", "names accepted in Host headers besides this machine's own: A,*.B; *: any"
    )
    protect_reads: bool = option(False, "require the API key for searches too")
    max_connections: int = option(
        1000,
        "open connections; beyond this, those that have waited longest for a client are closed",
        least=1,
    )
    header_timeout: float = option(
        10.0, "seconds within which the headers of a request must arrive", least=ABOVE_0
    )
    keep_alive_timeout: float = option(
        5.0, "seconds that an idle connection stays open for another request", least=ABOVE_0
    )
    queue_size: int = option(256, "questions that may wait; beyond this the answer is 429", least=1)
    batch_pairs: int = option(
        2048,
        "pairs of texts and items scored in one batch",
        least=1,
        old_names=("--pairs-at-once",),
    )
    deadline: float = option(
        5.0, "seconds that a question may wait; after that the answer is 503", least=ABOVE_0
    )
    max_body: int = option(65536, "largest body of a request, in bytes", least=1)
    body_seconds: float = option(10.0, "seconds within which a body must arrive", least=ABOVE_0)
    drain_seconds: int = option(
        30, "seconds to finish requests under way when the service is told to end", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api_key = os.environ.get("INTERBERT_API_KEY", "")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()

        if not split_paths(self.data_path):
            raise UsageError("--data-path is missing; give the region store of the items' pictures")

        if self.recommendation_index and not self.load_recommendation:
            raise UsageError(
                "--recommendation-index needs --load-recommendation: without it the weights of"
                " --load answer topics"
            )

        key = self.api_key
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise UsageError(
                "INTERBERT_API_KEY: an HTTP header cannot carry it; use printable ASCII characters,"
                " without spaces at either end"
            )

        if self.protect_reads and not key:
            raise UsageError(
                "--protect-reads needs a key: export INTERBERT_API_KEY=.. before starting the"
                " service"
            )
