"""What the service is told."""

import os
from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import ABOVE_0, option
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import LoadConfig, photos, store
from megatron_interbert.tasks.shop.config import ItemReading


@dataclass
class ServeConfig(ItemReading, LoadConfig):
    """Product search and topic-based recommendation over HTTP: a model, an index of items, a page.

    The API key comes from the environment (INTERBERT_API_KEY): a command line can be read by
    others.
    """

    GROUP: ClassVar[str] = "service"

    data_path: str = store(
        "sample_shop/test", "region stores with the items' pictures; several: A,B,C"
    )
    items: str = option(
        "",
        "jsonl of item_id, image_id (default: item_id), title and attributes to begin with;"
        " default: all images",
        group="data",
    )
    topics: str = option(
        "",
        "jsonl of topic_id, name, description, keywords that can be asked for by their ids",
        group="data",
    )
    image_folder: str = photos("photos named IMAGE_ID.jpg; default: drawings of the regions")
    load_recommendation: str = option(
        "",
        "weights that answer topics, finetuned from clicks; default: those of --load do",
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
        "exact compares with all vectors, hnsw walks a graph: for millions of items",
        ("exact", "hnsw"),
        group="index",
    )
    rebuild: bool = option(
        False, "make a new version of the index, even if there is one", group="index"
    )
    build_only: bool = option(
        False,
        "make a new version of the index and end; a running service takes it over",
        group="index",
    )

    host: str = option(
        "127.0.0.1", "address to listen at; put it behind a proxy before others reach it"
    )
    port: int = option(8080, "port to listen at; 0: any free one", least=0, most=65535)
    allowed_hosts: str = option(
        "", "names that Host headers may have besides this machine's own: A,*.B; *: any"
    )
    protect_reads: bool = option(False, "searches need the API key too")
    max_connections: int = option(
        1000,
        "connections open at once; beyond, those that wait longest for their clients are ended",
        least=1,
    )
    header_timeout: float = option(
        10.0, "seconds within which the headers of a request must come", least=ABOVE_0
    )
    keep_alive_timeout: float = option(
        5.0, "seconds that a connection is kept for another request", least=ABOVE_0
    )
    queue_size: int = option(
        256, "questions that may wait; what comes beyond is answered 429", least=1
    )
    batch_pairs: int = option(
        2048,
        "pairs of texts and items that are scored together",
        least=1,
        old_names=("--pairs-at-once",),
    )
    deadline: float = option(
        5.0, "seconds that a question may wait; then it is answered 503", least=ABOVE_0
    )
    max_body: int = option(65536, "bytes of a request's body", least=1)
    body_seconds: float = option(10.0, "seconds within which a body must come", least=ABOVE_0)
    drain_seconds: int = option(
        30, "seconds for what is under way when the service is told to end", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api_key = os.environ.get("INTERBERT_API_KEY", "")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()

        if self.recommendation_index and not self.load_recommendation:
            raise UsageError(
                "--recommendation-index needs --load-recommendation: without it topics are answered"
                " by --load"
            )

        key = self.api_key
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise UsageError(
                "INTERBERT_API_KEY: a header cannot carry it; take printable ASCII characters, no"
                " space at its ends"
            )

        if self.protect_reads and not key:
            raise UsageError(
                "--protect-reads needs a key: export INTERBERT_API_KEY=.. before the service is"
                " started"
            )
