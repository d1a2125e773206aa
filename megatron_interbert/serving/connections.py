"""Limit the service's connections: how many may be open, how long one may keep the service waiting,
and what is accepted as a request.
"""

import json
import logging
import math
import os
import re
import resource
from asyncio import Transport
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.config import ServeConfig

log = logging.getLogger("megatron_interbert.serving.connections")

SPARE = 16  # connections beyond the limit, for health checks while all others are at work
ACCEPTED_AT_ONCE = 8  # asyncio accepts this many before it serves any; each needs a descriptor
# descriptors for SPARE, for connections that are being accepted or closed, and for files
RESERVE = 64
FEWEST = 8
SEND_SECONDS = 60.0  # within which a client must read some of an answer
LARGEST_HEAD = 32768  # bytes of a request's headers
BARE_LF = re.compile(rb"(?<!\r)\n")
PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
}
REASONS = {
    431: f"headers of more than {LARGEST_HEAD} bytes",
    501: "a transfer-encoding other than chunked",
}


def fit_connections(config: ServeConfig) -> None:
    """Lower the default of --max-connections to the process's limit on descriptors, and note it.

    A connection may need two descriptors, one for its socket and one for a photo. Raises UsageError
    if the flag was given and does not fit, or if fewer than FEWEST connections would.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return

    taken = len(os.listdir("/dev/fd")) + RESERVE
    room = (most - taken) // 2
    needed = 2 * config.max_connections + taken
    if room >= config.max_connections:
        return
    if room < FEWEST or not config.is_default("max_connections"):
        less = f" or give at most {room}" if room >= FEWEST else ""
        raise UsageError(
            f"{config.told('max_connections')}: needs {needed} descriptors, but the process may"
            f" have {most}; raise the limit (ulimit -n {needed}){less}"
        )

    config.fit(
        "max_connections",
        room,
        f"the process may have {most} descriptors (ulimit -n {needed} allows all)",
    )


class Crowd:
    """Hold all connections: those `waiting` for their clients, longest first, with the time since
    when; and those `at_work`.

    `ended` counts those that the service has closed, by reason. Times are those of the event loop.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.most = config.max_connections
        self.header_seconds = config.header_timeout
        self.keep_alive_seconds = config.keep_alive_timeout
        self.open = 0
        self.ended = Counter(crowded=0, slow=0, malformed=0)
        self.waiting: dict[Connection, float] = {}
        self.at_work: set[Connection] = set()

    @property
    def too_busy(self) -> bool:
        """Return whether more requests are being answered than --max-connections."""
        return len(self.at_work) > self.most

    def make_room(self, newest: "Connection") -> None:
        """Close the connection that has waited longest for its client.

        If none is waiting, the newest is closed once SPARE is used up too.
        """
        log.warning(
            "more than %d connections are open: closing those that have waited longest for their"
            " clients",
            self.most,
        )

        if self.waiting:
            leaving = next(iter(self.waiting))
        elif self.open > self.most + SPARE:
            leaving = newest
        else:
            return

        self.ended["crowded"] += 1
        leaving.leave()

    def look(self, now: float) -> None:
        """Close the connections that have kept the service waiting too long."""
        for connection, since in list(self.waiting.items()):
            if connection.moves():
                del self.waiting[connection]
                self.waiting[connection] = now
            elif now - since > connection.patience():
                self.ended["slow"] += 1
                connection.give_up()


class Connection(H11Protocol):
    """Extend uvicorn's protocol by the limits of a crowd."""

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self.crowd = crowd
        self.unread = 0  # bytes of an answer that the client had not read at the last look
        self.conn = Requests(h11.SERVER, LARGEST_HEAD)

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self.crowd.open += 1
        if self.crowd.open > self.crowd.most:
            self.crowd.make_room(self)
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.crowd.open -= 1
        self.crowd.waiting.pop(self, None)
        self.crowd.at_work.discard(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        self.crowd.waiting.pop(self, None)
        super().on_response_complete()
        self._note()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._note()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._note()

    def send_400_response(self, msg: str) -> None:
        self.crowd.ended["malformed"] += 1
        self.refuse(*self.conn.wrong)

    def moves(self) -> bool:
        """Check whether the unread part of an answer has changed since the last call."""
        before = self.unread
        self.unread = self.transport.get_write_buffer_size()

        return self.unread != before

    def patience(self) -> float:
        """Return how many seconds to wait for the client; `Guard` limits the time for a body."""
        if self.unread:
            return SEND_SECONDS
        if self._asked():
            return math.inf
        return self.crowd.header_seconds + (self.crowd.keep_alive_seconds if self.cycle else 0)

    def give_up(self) -> None:
        """Close a connection that is out of time; answer 408 if part of a request has arrived."""
        if self.unread or self.transport.is_closing():
            self.leave()
        elif self.conn.trailing_data[0]:
            self.refuse(408, f"the headers took more than {self.crowd.header_seconds:g} s")
        else:
            self.transport.close()

    def refuse(self, status: int, reason: str) -> None:
        """Answer with one line, unless another answer has begun, and close."""
        if not (self._asked() and self.cycle.response_started):
            body = json.dumps({"error": reason}).encode()
            head = (
                f"HTTP/1.1 {status} {PHRASES[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)

        self.transport.close()

    def leave(self) -> None:
        """Close at once, whatever is under way."""
        self.crowd.waiting.pop(self, None)
        self.transport.abort()

    def _asked(self) -> bool:
        """Check whether a request has begun that is not fully answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _note(self) -> None:
        """Record whether it is the client's turn now, and since when."""
        if self not in self.connections:
            return

        if self._asked() and not self.cycle.more_body and not self.flow.write_paused:
            self.crowd.at_work.add(self)
            self.crowd.waiting.pop(self, None)
        else:
            self.crowd.at_work.discard(self)
            self.crowd.waiting.setdefault(self, self.loop.time())


class Ambiguous(h11.RemoteProtocolError):
    """Represent a request that a proxy might read differently from us."""


class Requests(h11.Connection):
    """Read requests as h11 does, but more strictly.

    `wrong` is (status, reason) of a refusal; the reason repeats nothing that was sent.
    """

    wrong = (400, "not a valid HTTP request")

    def next_event(self) -> Any:
        """Return the next event, as h11 does.

        Raises h11.RemoteProtocolError also for bare line feeds and for two lengths.
        """
        try:
            if self.their_state is h11.IDLE:
                check_lines(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                check_length(event)
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            reason = (
                str(error) if isinstance(error, Ambiguous) else REASONS.get(status, self.wrong[1])
            )
            self.wrong = (status, reason)
            raise

        return event


def check_lines(received: bytes) -> None:
    """Raise Ambiguous if a line of the headers ends with LF alone."""
    head, _, _ = received.partition(b"\r\n\r\n")
    if BARE_LF.search(head):
        raise Ambiguous("a line of the headers ends with LF alone; expected CR LF")


def check_length(request: h11.Request) -> None:
    """Raise Ambiguous if the end of the body could be found in two ways."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return

    if b"content-length" in names:
        raise Ambiguous("both content-length and transfer-encoding; expected one of them")
    if request.http_version < b"1.1":
        raise Ambiguous("transfer-encoding in HTTP/1.0; expected content-length")
