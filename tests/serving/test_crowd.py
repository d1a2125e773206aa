"""Test connections that are all at work, and clients that do not read, with small applications in
place of the model.
"""

import asyncio
import socket
import threading
import time

import pytest

from megatron_interbert.serving import connections
from tests.launching import until
from tests.serving.raw_client import address_of, exchange, held, read_to_end, status_of
from tests.serving.small_server import small_server

REQUEST = b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n"
LAST = b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


async def respond(send, body):
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})


def test_all_at_work():
    """Check that new requests are answered 503, that health checks are answered, and that requests
    under way are not cut off.
    """
    go_on = threading.Event()

    async def answer(scope, receive, send):
        while scope["path"] == "/slow" and not go_on.is_set():
            await asyncio.sleep(0.02)
        await respond(send, b"whole")

    with (
        small_server(answer, max_connections=10, keep_alive_timeout=0.5) as (url, crowd),
        held(url, 10, REQUEST % b"/slow") as lines,
    ):
        until(lambda: len(crowd.at_work) == 10, "all at work")
        for _ in range(3):
            found = exchange(url, LAST % b"/search")
            assert status_of(found) == 503
            assert b"retry-after: 1\r\n" in found
            assert b'{"error":"too many requests at once; try again later"}' in found

        assert exchange(url, REQUEST % b"/healthz" + LAST % b"/readyz").count(b"HTTP/1.1 200") == 2

        with held(url, 100), held(url, 100, REQUEST % b"/slow"), held(url, 100, b"GET /he"):
            assert exchange(url, LAST % b"/healthz").count(b"HTTP/1.1 200") == 1
            assert crowd.open <= 10 + connections.SPARE

        go_on.set()
        for line in lines:
            assert read_to_end(line).endswith(b"whole"), (
                "the connection was kept for another request, for a while"
            )


def test_after_all_were_at_work_nothing_is_left_of_it():
    """Check that clients that leave while they are being answered are no longer counted."""

    async def answer(scope, receive, send):
        await asyncio.sleep(0.2)
        await respond(send, b"whole")

    with small_server(answer, max_connections=10, keep_alive_timeout=0.5) as (url, crowd):
        for _ in range(5):
            with held(url, 10, REQUEST % b"/slow"):
                until(lambda: crowd.at_work, "at work")

        until(lambda: not crowd.open, "all closed", 10)
        assert not crowd.at_work
        assert not crowd.waiting
        assert exchange(url, LAST % b"/search").endswith(b"whole")


def silent(url, sent, room=4096):
    """Connect a client that sends a request, reads nothing, and has little buffer space."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    line.connect(address_of(url))
    line.sendall(sent)

    return line


@pytest.mark.parametrize(
    "size", [20_000_000, 3_000_000], ids=["a large answer", "one that nearly fits the kernel"]
)
def test_clients_that_do_not_read_are_ended(size, monkeypatch):
    monkeypatch.setattr(connections, "SEND_SECONDS", 1.0)

    async def answer(scope, receive, send):
        await respond(send, b"x" * size if scope["path"] == "/large" else b"whole")

    with small_server(answer, header_timeout=1.0, keep_alive_timeout=1.0) as (url, crowd):
        lines = [
            silent(url, sent)
            for sent in (REQUEST % b"/large", REQUEST.replace(b"1.1", b"1.0") % b"/large")
        ]
        until(lambda: crowd.open == 2, "both are there")
        assert exchange(url, LAST % b"/search").endswith(b"whole")
        until(lambda: crowd.open == 0, "both are ended", 10)
        for line in lines:
            assert len(read_to_end(line)) < size
            line.close()


@pytest.mark.parametrize("request_", [REQUEST, LAST], ids=["kept", "closed"])
def test_a_client_that_reads_slowly_but_steadily_gets_all(request_, monkeypatch):
    monkeypatch.setattr(connections, "SEND_SECONDS", 1.5)
    size = 7_000_000

    async def answer(scope, receive, send):
        await respond(send, b"x" * size)

    with small_server(answer, header_timeout=0.5, keep_alive_timeout=0.5) as (url, _):
        line = silent(url, request_ % b"/large", 100_000)
        found = 0
        started = time.monotonic()
        while piece := line.recv(60_000):
            found += len(piece)
            time.sleep(0.02)

        assert found > size
        assert time.monotonic() - started > 2, "longer than a client may go without reading"
        line.close()
