"""Test the limit on the log: what is written, what is counted, and that nothing goes missing."""

import io
import logging
import re
import threading
import time

import pytest

from megatron_interbert.serving.log_limit import (
    LONGEST,
    TRACEBACKS,
    USUAL,
    Allowance,
    LimitedHandler,
)
from tests.launching import until


@pytest.fixture
def written():
    """Yield (logger, function that returns its text), with its own handler, by which the logger
    `tests.busy` may write 50 lines in half a second.
    """
    handler = LimitedHandler({"tests.busy": Allowance(50, 0.5)})
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setStream(io.StringIO())
    logger = logging.getLogger("tests")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    yield logger, handler.stream.getvalue
    logger.removeHandler(handler)
    handler.close()


def say(logger, count, text="said %d"):
    for number in range(count):
        logger.info(text, number)


def told(text):
    """Return how many records a text accounts for, written or counted."""
    counts = [
        int(found) for found in re.findall(r"^\.\.\. (\d+) more like this in", text, re.MULTILINE)
    ]
    return len(text.splitlines()) - len(counts) + sum(counts)


def test_as_many_as_are_allowed_are_written_as_they_are(written):
    logger, text = written
    say(logger, USUAL.most)
    assert text() == "".join(f"said {number}\n" for number in range(USUAL.most))


def test_what_is_beyond_is_counted(written):
    """Check that the line comes at the end of the interval even if no further record comes."""
    busy = logging.getLogger("tests.busy")
    text = written[1]
    say(busy, 1000)
    assert len(text().splitlines()) == 50
    until(lambda: len(text().splitlines()) == 51, "the line", 5)
    assert text().splitlines()[-1] == "... 950 more like this in 0.5 s: said 999"
    say(busy, 3)
    assert text().splitlines()[-3:] == ["said 0", "said 1", "said 2"]


def test_others_are_heard_beside_one_that_shouts(written):
    logger, text = written
    say(logger, 10_000)
    logger.info("something else")
    logger.warning("and this")
    assert text().splitlines()[-2:] == ["something else", "and this"]
    assert len(text().splitlines()) == USUAL.most + 2


def test_the_end_tells_what_was_counted(written):
    logger, text = written
    say(logger, USUAL.most + 7)
    logger.handlers[0].close()
    assert text().splitlines()[-1] == f"... 7 more like this in 10 s: said {USUAL.most + 6}"
    logger.handlers[0].close()
    assert told(text()) == USUAL.most + 7, "once"


def test_many_threads_at_once_lose_nothing(written):
    busy = logging.getLogger("tests.busy")
    text = written[1]

    def shout():
        for number in range(2000):
            busy.info("said %d", number)
            if number % 500 == 0:
                time.sleep(0.2)

    threads = [threading.Thread(target=shout) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    written[0].handlers[0].close()
    assert told(text()) == 16_000
    assert len(text().splitlines()) < 1000


def broken(number):
    raise ValueError(f"broken {number}")


def test_tracebacks_of_one_place_are_few(written):
    """Check this whatever their messages are; another error, and the same one raised elsewhere, are
    written.
    """
    logger, text = written

    def meet(function, error):
        try:
            function()
        except error:
            logger.exception("met")

    for number in range(500):
        meet(lambda number=number: broken(number), ValueError)

    assert text().count("Traceback") == TRACEBACKS.most
    meet(lambda: {}["nothing"], KeyError)
    meet(lambda: int("x"), ValueError)
    assert text().count("Traceback") == TRACEBACKS.most + 2
    assert "KeyError: 'nothing'" in text()
    assert "invalid literal" in text()
    assert len(text()) < 20_000


def test_one_record_is_not_endless(written):
    logger, text = written
    logger.error("begins %s ends", "x" * 1_000_000)
    assert text().startswith("begins xxx")
    assert text().endswith("xxx ends\n")
    assert len(text()) < LONGEST + 100
