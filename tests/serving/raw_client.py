"""Bytes over sockets of our own, for what no client library would send; and a service beside a
limit of descriptors.
"""

import contextlib
import socket
import time


def address_of(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url):
    return socket.create_connection(address_of(url), 20)


def read_to_end(line, seconds=20):
    """All that comes until the service closes.

    AssertionError where it does not within so many seconds.
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
    """What comes until the service closes the connection by itself."""
    with connect(url) as line:
        line.sendall(sent)
        return read_to_end(line, seconds)


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


@contextlib.contextmanager
def held(url, count, sent=b""):
    """So many connections that have sent this and then say nothing."""
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
