"""The connections of the service: how many there may be, how long one may keep the service waiting,
what is taken for a request.
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

SPARE = 16  # connections beyond the limit: health checks are answered when all others are at work
ACCEPTED_AT_ONCE = 8  # asyncio accepts so many before it looks at any; they need descriptors
# descriptors for SPARE, for connections that are being accepted or closed, and for files
RESERVE = 64
FEWEST = 8
SEND_SECONDS = 60.0  # in which a client must read something of an answer
LARGEST_HEAD = 32768  # bytes of a request before its body
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
    """Lower --max-connections to what the process may have descriptors for, and note it.

    A connection may need two, one for its socket and one for a photo. UsageError where it was given
    and does not fit, or where hardly any connection would.
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
            f"{config.told('max_connections')}: that takes {needed} descriptors and the process may"
            f" have {most}; raise the limit (ulimit -n {needed}){less}"
        )

    config.fit(
        "max_connections",
        room,
        f"the process may have {most} descriptors (ulimit -n {needed} allows all)",
    )


class Crowd:
    """All connections together: `waiting` for their clients, the longest first, with the time since
    when; or `at_work`.

    `ended` counts those that the service has ended, by reason. Seconds are those of the event loop.
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
        """Whether more requests are being answered than --max-connections."""
        return len(self.at_work) > self.most

    def make_room(self, newest: "Connection") -> None:
        """End the connection that has waited longest: of those that only wait there can always be
        one less.
        """
        log.warning(
            "more than %d connections are open: those that wait longest for their clients are"
            " ended",
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
        """End the connections that have kept the service waiting too long."""
        for connection, since in list(self.waiting.items()):
            if connection.moves():
                del self.waiting[connection]
                self.waiting[connection] = now
            elif now - since > connection.patience():
                self.ended["slow"] += 1
                connection.give_up()


class Connection(H11Protocol):
    """uvicorn's protocol, one of a crowd."""

    def __init__(self, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self.crowd = crowd
        self.unread = 0  # bytes of an answer, when it was last looked at
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
        """Say whether the client has taken some of an answer, or there is more of it, since this
        was last asked.
        """
        before = self.unread
        self.unread = self.transport.get_write_buffer_size()

        return self.unread != before

    def patience(self) -> float:
        """Say how many seconds the client may be waited for; a body has its own time in `Guard`."""
        if self.unread:
            return SEND_SECONDS
        if self._asked():
            return math.inf
        return self.crowd.header_seconds + (self.crowd.keep_alive_seconds if self.cycle else 0)

    def give_up(self) -> None:
        """End a connection that is out of time, with an answer where it had begun to ask."""
        if self.unread or self.transport.is_closing():
            self.leave()
        elif self.conn.trailing_data[0]:
            self.refuse(408, f"the headers took more than {self.crowd.header_seconds:g} s")
        else:
            self.transport.close()

    def refuse(self, status: int, reason: str) -> None:
        """Answer one line, unless an answer is half sent, and close."""
        if not (self._asked() and self.cycle.response_started):
            body = json.dumps({"error": reason}).encode()
            head = (
                f"HTTP/1.1 {status} {PHRASES[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)

        self.transport.close()

    def leave(self) -> None:
        """End at once, whatever is under way."""
        self.crowd.waiting.pop(self, None)
        self.transport.abort()

    def _asked(self) -> bool:
        """Tell whether a request has begun that is not answered in full."""
        return self.cycle is not None and not self.cycle.response_complete

    def _note(self) -> None:
        """Keep in mind whether it is the client's turn now, and since when."""
        if self not in self.connections:
            return

        if self._asked() and not self.cycle.more_body and not self.flow.write_paused:
            self.crowd.at_work.add(self)
            self.crowd.waiting.pop(self, None)
        else:
            self.crowd.at_work.discard(self)
            self.crowd.waiting.setdefault(self, self.loop.time())


class Ambiguous(h11.RemoteProtocolError):
    """A request that a proxy may read in another way than we do."""


class Requests(h11.Connection):
    """h11's reader of requests, without its leniency.

    `wrong` is the status and the reason of a refusal; nothing that was sent.
    """

    wrong = (400, "not a valid HTTP request")

    def next_event(self) -> Any:
        """Read on, as h11 does.

        H11.RemoteProtocolError also for bare line feeds and two lengths.
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
    """Refuse a head with a line that ends with LF alone."""
    head, _, _ = received.partition(b"\r\n\r\n")
    if BARE_LF.search(head):
        raise Ambiguous("a line of the headers ends with LF alone; expected CR LF")


def check_length(request: h11.Request) -> None:
    """Refuse a body whose end can be found in two ways."""
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" not in names:
        return

    if b"content-length" in names:
        raise Ambiguous("both content-length and transfer-encoding; expected one of them")
    if request.http_version < b"1.1":
        raise Ambiguous("transfer-encoding in HTTP/1.0; expected content-length")
