"""What the service is told."""

import os
from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config import flag, option
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.config import TWO_TEXTS, LoadConfig


@dataclass
class ServeConfig(LoadConfig):
    """Product search and topic-based recommendation over HTTP: a model, an index of items, a page. The API key comes from the environment
    (INTERBERT_API_KEY): a command line can be read by others."""

    data_path: str = option("sample_shop/test", "region stores with the items' pictures; several: A,B,C")
    topics: str = option("", "jsonl of topic_id, name, description, keywords that can be asked for by their ids")
    items: str = option(
        "", "jsonl of item_id, image_id (default: item_id), title and attributes to begin with; default: all images"
    )
    load_recommendation: str = option("", "weights that answer topics, finetuned from clicks; default: those of --load do")
    index: str = option("", "folder of the index; default: `index` in the run's folder")
    recommendation_index: str = option("", "folder of the index for topics; default: `index` in the folder of that run")
    index_kind: str = option(
        "exact", "exact compares with all vectors, hnsw walks a graph: for millions of items", ("exact", "hnsw")
    )
    rebuild: bool = option(False, "make a new version of the index, even if there is one")
    build_only: bool = option(False, "make a new version of the index and end; a running service takes it over")
    titles: bool = option(True, "read the items' titles; --no-titles sees their images only; default: as the weights were trained")
    max_regions: int = option(0, "regions per image; default: as the weights were trained, else 36")
    max_tokens: int = option(0, "tokens of a text and a title; default: as the weights were trained, else 64")
    image_folder: str = option("", "photos named IMAGE_ID.jpg; default: drawings of the regions")
    host: str = option("127.0.0.1", "address to listen at; put it behind a proxy before others reach it")
    port: int = option(8080, "port to listen at; 0: any free one")
    allowed_hosts: str = option("", "names that Host headers may have besides this machine's own: A,*.B; *: any")
    protect_reads: bool = option(False, "searches need the API key too")
    max_connections: int = option(1000, "connections open at once; beyond, those that wait longest for their clients are ended")
    header_timeout: float = option(10.0, "seconds within which the headers of a request must come")
    keep_alive_timeout: float = option(5.0, "seconds that a connection is kept for another request")
    queue_size: int = option(256, "questions that may wait; what comes beyond is answered 429")
    pairs_at_once: int = option(2048, "pairs of texts and items that are scored together")
    deadline: float = option(5.0, "seconds that a question may wait; then it is answered 503")
    max_body: int = option(65536, "bytes of a request's body")
    body_seconds: float = option(10.0, "seconds within which a body must come")
    drain_seconds: int = option(30, "seconds for what is under way when the service is told to end")

    POSITIVE: ClassVar[tuple[str, ...]] = ("queue_size", "pairs_at_once", "max_body", "max_connections")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("max_regions", "max_tokens", "port", "drain_seconds")
    SHORTEST: ClassVar[str] = TWO_TEXTS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.api_key = os.environ.get("INTERBERT_API_KEY", "")

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        for name in ("deadline", "body_seconds", "header_timeout", "keep_alive_timeout"):
            if not getattr(self, name) > 0:  # nor NaN
                raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected more than 0")
        if self.recommendation_index and not self.load_recommendation:
            raise UsageError("--recommendation-index needs --load-recommendation: without it topics are answered by --load")
        if self.port > 65535:
            raise UsageError(f"--port is {self.port}, expected 65535 or less")
        if not self.api_key.isascii() or not self.api_key.isprintable() or self.api_key != self.api_key.strip():
            raise UsageError("INTERBERT_API_KEY: a header cannot carry it; take printable ASCII characters, no space at its ends")
        if self.protect_reads and not self.api_key:
            raise UsageError("--protect-reads needs a key: export INTERBERT_API_KEY=.. before the service is started")
