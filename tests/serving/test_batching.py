"""Test the model's thread: waiting questions are answered together, in order, and none fails due to
another.
"""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from megatron_interbert.serving.batching import Late, ModelThread, QueueFull
from megatron_interbert.serving.shop import Find, Score


class Pretended:
    """Stand in for a shop: answer a question with its text, once the gate is open, and fail for
    `poison`.
    """

    def __init__(self):
        self.version = SimpleNamespace(name="v1")
        self.weights = "sha256"
        self.batches = []
        self.gate = threading.Event()
        self.closed = False
        self.gate.set()
        self.entered = threading.Event()

    def answer(self, asked):
        self.entered.set()
        self.gate.wait(10)
        self.batches.append([question.text for question in asked])
        if any(question.text == "poison" for question in asked):
            raise ValueError("poison")
        return [question.text for question in asked]

    def close(self):
        self.closed = True


@pytest.fixture
def shop():
    return Pretended()


@pytest.fixture
def model(shop):
    thread = ModelThread(shop, queue_size=8, batch_pairs=25)
    yield thread
    shop.gate.set()
    thread.close()
    assert shop.closed


async def held(shop, model, *questions, seconds=10.0):
    """Ask questions while the thread is busy with another; return that one's task and theirs, in
    order.
    """
    shop.gate.clear()
    busy = asyncio.create_task(model.ask(Find("busy", 1, 1), 10.0))
    await asyncio.to_thread(shop.entered.wait, 10)
    tasks = [asyncio.create_task(model.ask(question, seconds)) for question in questions]
    await asyncio.sleep(0.1)

    return busy, tasks


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_what_waits_is_answered_together_up_to_its_size(shop, model):
    async def ask():
        _, tasks = await held(
            shop, model, *(Find(f"q{n}", 1, 10) for n in range(5)), Score("s", ["1", "2", "3"])
        )
        shop.gate.set()
        return await asyncio.gather(*tasks)

    answers = run(ask())
    assert [answer.result for answer in answers] == ["q0", "q1", "q2", "q3", "q4", "s"]
    assert shop.batches == [["busy"], ["q0", "q1"], ["q2", "q3"], ["q4", "s"]]
    assert [answer.batch_size for answer in answers] == [2] * 6
    assert all(answer.queue_seconds > 0.05 for answer in answers)


def test_changes_keep_their_place(shop, model):
    seen = []

    async def ask():
        change = lambda shop: seen.append(len(shop.batches))  # noqa: E731
        _, tasks = await held(shop, model, Find("before", 1, 1), change, Find("after", 1, 1))
        shop.gate.set()
        await asyncio.gather(*tasks)

    run(ask())
    assert shop.batches == [["busy"], ["before"], ["after"]]
    assert seen == [2]


def test_a_question_that_fails_fails_alone(shop, model):
    async def ask():
        _, tasks = await held(shop, model, Find("a", 1, 1), Find("poison", 1, 1), Find("b", 1, 1))
        shop.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    a, poison, b = run(ask())
    assert (a.result, b.result) == ("a", "b")
    assert isinstance(poison, ValueError)


def test_full_late_and_gone(shop, model):
    async def ask():
        busy, tasks = await held(shop, model, *(Find(f"q{n}", 1, 1) for n in range(8)), seconds=0.4)
        with pytest.raises(QueueFull):
            await model.ask(Find("one too many", 1, 1), 10.0)

        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert not busy.done(), "they were late while another question was still computed"
        gone = asyncio.create_task(model.ask(Find("gone", 1, 1), 10.0))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        shop.gate.set()
        await busy

        return outcomes

    outcomes = run(ask())
    assert all(isinstance(outcome, Late) for outcome in outcomes)
    assert shop.batches == [["busy"]], "nothing was computed for them"
    assert model.answered["full"] == 1
    assert model.answered["late"] == 8
    assert model.answered["gone"] == 1


def test_a_new_shop_answers_what_waits(shop, model):
    newer = Pretended()
    newer.version = SimpleNamespace(name="v2")

    async def ask():
        _, tasks = await held(shop, model, Find("q", 1, 1))
        swapping = asyncio.create_task(asyncio.to_thread(model.change, lambda _: model.swap(newer)))
        await asyncio.sleep(0.1)
        shop.gate.set()
        await swapping
        shop.close()

        return await asyncio.gather(*tasks)

    (answer,) = run(ask())
    assert (answer.result, answer.version) == ("q", "v2"), "changes of the whole shop come first"
    assert newer.batches == [["q"]]


def test_a_closed_thread_answers_what_waits_and_takes_no_more(shop):
    thread = ModelThread(shop, 8, 25)

    async def ask():
        _, tasks = await held(shop, thread, Find("q", 1, 1))
        closing = asyncio.create_task(asyncio.to_thread(thread.close))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull):
            await thread.ask(Find("late", 1, 1), 1.0)

        shop.gate.set()
        await closing

        return await asyncio.gather(*tasks)

    (answer,) = run(ask())
    assert answer.result == "q"
