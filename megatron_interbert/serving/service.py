"""What all routes share: the model threads, the topics, and how they are asked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException

from megatron_interbert.serving.batching import Answer, Late, ModelThread, QueueFull
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.shop import Find, Hit, Score, Shop


class KeptInPart(RuntimeError):
    """A change that one of two models has, and the other could not take."""


@dataclass
class Topic:
    """One that can be asked for by its id."""

    topic_id: str
    name: str
    text: str


@dataclass
class Service:
    """What the routes share: what answers searches and what answers topics, which may be the
    same.
    """

    searcher: ModelThread
    recommender: ModelThread
    config: ServeConfig
    generated: bool
    topics: dict[str, Topic] = field(default_factory=dict)

    @property
    def threads(self) -> list[ModelThread]:
        """Each once."""
        return (
            [self.searcher]
            if self.recommender is self.searcher
            else [self.searcher, self.recommender]
        )

    async def change(self, function: Callable[[Shop], bool]) -> list[bool]:
        """Of all models, one after the other, as soon as all can keep it.

        NotKept where nothing was changed. KeptInPart where the first model alone has the change:
        who sends it again completes it, and what was done does no harm then.
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
        """By a model's thread; HTTPException 429 when too many wait, 503 when it took too long."""
        try:
            return await thread.ask(asked, self.config.deadline)
        except QueueFull:
            raise HTTPException(
                429, "too many requests wait; come again", {"retry-after": "1"}
            ) from None
        except Late:
            raise HTTPException(
                503,
                f"not answered within {self.config.deadline:g} s; come again",
                {"retry-after": "1"},
            ) from None

    def results(self, answer: Answer, hits: list[Hit], **more: Any) -> dict[str, Any]:
        """Give an answer as JSON."""
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
