"""Hold what all routes share, the model threads and the topics, and pass questions to them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException

from megatron_interbert.serving.batching import Answer, Late, ModelThread, QueueFull
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.shop import Find, Hit, Score, Shop


class KeptInPart(RuntimeError):
    """Represent a change that was made for the first of two models but failed for the second."""


@dataclass
class Topic:
    """Represent a topic that can be requested by id."""

    topic_id: str
    name: str
    text: str


@dataclass
class Service:
    """Hold the threads that answer searches and topics, which may be the same, and the topics."""

    searcher: ModelThread
    recommender: ModelThread
    config: ServeConfig
    generated: bool
    topics: dict[str, Topic] = field(default_factory=dict)

    @property
    def threads(self) -> list[ModelThread]:
        """Return the different threads."""
        return (
            [self.searcher]
            if self.recommender is self.searcher
            else [self.searcher, self.recommender]
        )

    async def change(self, function: Callable[[Shop], bool]) -> list[bool]:
        """Make a change for all models, one after the other, and return their results.

        Raises NotKept if nothing was changed, because a journal cannot be written. Raises
        KeptInPart if only the first model has the change: sending it again completes it, and does
        no harm to what was done.
        """
        if len(self.threads) > 1:
            for thread in self.threads:
                await self.ask(Shop.check_journal, thread)

        results = []
        for thread in self.threads:
            try:
                answer = await self.ask(function, thread)
            except Exception as error:
                if not results:
                    raise
                raise KeptInPart(str(error)) from error

            results.append(answer.result)

        return results

    async def ask(self, asked: Find | Score | Callable[[Shop], Any], thread: ModelThread) -> Answer:
        """Ask a model's thread; raises HTTPException 429 if too many questions wait, 503 if this
        one waited too long.
        """
        try:
            return await thread.ask(asked, self.config.deadline)
        except QueueFull:
            raise HTTPException(
                429, "too many requests are waiting; try again later", {"retry-after": "1"}
            ) from None
        except Late:
            raise HTTPException(
                503,
                f"not answered within {self.config.deadline:g} s; try again later",
                {"retry-after": "1"},
            ) from None

    def results(self, answer: Answer, hits: list[Hit], **more: Any) -> dict[str, Any]:
        """Return an answer as a JSON object, with further fields in `more`."""
        return {
            "results": [{**hit.item.record(), "score": hit.score} for hit in hits],
            "model": answer.weights[:12],
            "index": answer.version,
            "timings": {
                "queue_ms": round(1000 * answer.queue_seconds, 2),
                "compute_ms": round(1000 * answer.compute_seconds, 2),
                "batch_size": answer.batch_size,
            },
            **more,
        }
