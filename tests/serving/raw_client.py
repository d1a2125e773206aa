"""Send raw bytes over sockets, for what no client library would send, and hold many connections."""

import contextlib
import socket
import time


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url):
    return socket.create_connection(address_of(url), 20)


def read_to_end(line, seconds=20):
    """Return everything received until the service closes the connection.

    Raises AssertionError if it does not within `seconds`.
    """
    found = b""
    deadline = time.monotonic() + seconds

    while True:
        line.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = line.recv(65536)
        except TimeoutError:
            raise AssertionError(f"still open after {seconds} s: {found[:200]}") from None
        except ConnectionResetError:
            return found

        if not piece:
            return found

        found += piece


def exchange(url, sent, seconds=20):
    """Send bytes on a new connection; return what comes until the service closes it by itself."""
    with connect(url) as line:
        line.sendall(sent)
        return read_to_end(line, seconds)


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


@contextlib.contextmanager
def held(url, count, sent=b""):
    """Hold `count` connections open that have sent some bytes and then stay silent."""
    lines = []

    try:
        for _ in range(count):
            line = connect(url)
            line.sendall(sent)
            lines.append(line)

        yield lines
    finally:
        for line in lines:
            line.close()
