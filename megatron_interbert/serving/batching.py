"""Answer questions in batches, in one thread with a bounded queue before it.

A question has a deadline; one that is late, or whose client has gone, is dropped before it costs
anything. Once begun, a question is answered. Changes of items go through the same queue in order,
so that nothing is read while it is being written.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_interbert.serving.shop import Find, Hit, Score, Shop


class QueueFull(Exception):
    """Represent a question that was rejected because the queue is full, or is closing."""


class Late(Exception):
    """Represent a question whose deadline passed while it waited."""


@dataclass(eq=False)
class Question:
    """Hold a question, or a change (a function of the shop); `asked_at` is in time.monotonic()."""

    asked: Find | Score | Callable[[Shop], Any]
    loop: asyncio.AbstractEventLoop | None = None
    future: asyncio.Future | None = None  # None: no coroutine waits for it
    begun: bool = False
    asked_at: float = field(default_factory=time.monotonic)

    @property
    def pairs(self) -> int:
        """Return the approximate cost: the number of pairs to score, 1 for a change."""
        if isinstance(self.asked, Find):
            return self.asked.candidates
        return len(self.asked.item_ids) if isinstance(self.asked, Score) else 1

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        """Pass the result or the error to the waiting coroutine, if there still is one."""

        def tell() -> None:
            if not self.future.done():
                self.future.set_exception(error) if error else self.future.set_result(result)

        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # a closed loop: nobody waits any more
                self.loop.call_soon_threadsafe(tell)


@dataclass
class Answer:
    """Hold hits, or what a change returned, with its times and the number of questions in its
    batch.

    `version` (of the index) and `weights` (sha256) identify the shop that answered.
    """

    result: list[Hit] | Any
    queue_seconds: float
    compute_seconds: float
    batch_size: int
    version: str
    weights: str


class ModelThread:
    """Run a shop in a thread of its own; coroutines call `ask`.

    Up to `queue_size` questions may wait; up to `batch_pairs` pairs, or one question, are answered
    together.
    """

    def __init__(self, shop: Shop, queue_size: int, batch_pairs: int) -> None:
        self.shop = shop
        self.queue_size = queue_size
        self.batch_pairs = batch_pairs
        self.answered = collections.Counter()  # keys: batches, questions, late, gone, full
        self._waiting: collections.deque[Question] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of questions in the queue."""
        return len(self._waiting)

    async def ask(self, asked: Find | Score | Callable[[Shop], Any], seconds: float) -> Answer:
        """Return the answer to a question or a change.

        Raises QueueFull, Late if the question is not begun within `seconds`, or what the change
        raises.
        """
        loop = asyncio.get_running_loop()
        question = Question(asked, loop, loop.create_future())

        with self._changed:
            if len(self._waiting) >= self.queue_size or self._closing:
                self.answered["full"] += 1
                raise QueueFull

            self._waiting.append(question)
            self._changed.notify()

        try:
            await asyncio.wait({question.future}, timeout=seconds)
        except asyncio.CancelledError:
            self._drop(question, "gone")
            raise

        if not question.future.done() and self._drop(question, "late"):
            raise Late

        return await question.future

    def _drop(self, question: Question, why: str) -> bool:
        """Drop a question unless it has begun; return whether it was dropped."""
        with self._changed:
            if question.begun:
                return False
            self.answered[why] += 1
            if question in self._waiting:
                self._waiting.remove(question)
            return True

    @property
    def alive(self) -> bool:
        """Return whether the thread is running."""
        return self._thread.is_alive()

    def change(self, function: Callable[[Shop], Any]) -> None:
        """Call function(shop) in the model's thread, before everything that waits, and return when
        it is done; raises what it raises.
        """
        done = concurrent.futures.Future()

        def call(shop: Shop) -> None:
            try:
                done.set_result(function(shop))
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            self._waiting.appendleft(Question(call))
            self._changed.notify()

        done.result()

    def close(self) -> None:
        """Answer what is waiting, end the thread and close the shop."""
        with self._changed:
            self._closing = True
            self._changed.notify()

        self._thread.join()
        self.shop.close()

    def swap(self, shop: Shop) -> None:
        """Answer from another shop from now on; must be called in the model's thread, in a
        change.
        """
        self.shop = shop

    def _run(self) -> None:
        while questions := self._next():
            self._answer(questions)

    def _answer(self, questions: list[Question]) -> None:
        started = time.monotonic()
        try:
            results = (
                [questions[0].asked(self.shop)]
                if callable(questions[0].asked)
                else self.shop.answer([question.asked for question in questions])
            )
            took = time.monotonic() - started
            answers = [
                Answer(
                    result,
                    started - question.asked_at,
                    took,
                    len(questions),
                    self.shop.version.name,
                    self.shop.weights,
                )
                for question, result in zip(questions, results, strict=True)
            ]
        except Exception as error:
            if len(questions) == 1:
                questions[0].end(error=error)
            # one of them caused it: answer them one by one, so that the others do not fail
            for question in questions if len(questions) > 1 else ():
                self._answer([question])
            return

        self.answered.update(batches=1, questions=len(questions))
        for question, answer in zip(questions, answers, strict=True):
            question.end(answer)

    def _next(self) -> list[Question]:
        """Wait for work; return one change, or consecutive questions that fit a batch; empty when
        closing.
        """
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return []

            questions = [self._waiting.popleft()]
            while (
                self._waiting
                and not callable(questions[0].asked)
                and not callable(self._waiting[0].asked)
                and sum(question.pairs for question in questions) + self._waiting[0].pairs
                <= self.batch_pairs
            ):
                questions.append(self._waiting.popleft())

            for question in questions:
                question.begun = True

            return questions
