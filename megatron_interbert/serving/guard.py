"""Guard the application: check Host headers, limit requests, add security headers to answers, and
log a line for each request.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.connections import Crowd
from megatron_interbert.serving.hosts import AllowedHosts

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
log = logging.getLogger("megatron_interbert.serving.requests")

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        (
            b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
            b" frame-ancestors 'none'"
        ),
    ),
]
CLOSE = {"connection": "close"}  # the rest of a body is not read
HEALTH = ("/healthz", "/readyz", "/metrics")  # answered even when too many requests are under way


class Guard:
    """Wrap an ASGI application with limits: a Host header that is ours, else 400; bodies of at most
    `max_body` bytes, else 413, within `body_seconds`, else 408; no more requests at once than
    --max-connections, else 503.

    A request whose client goes away is cancelled (499 in log and metrics). The log line of a
    request has method, route, status and milliseconds: no query, body, key or address.
    """

    def __init__(
        self,
        app: Any,
        config: ServeConfig,
        hosts: AllowedHosts,
        crowd: Crowd,
        count: Callable[[str, int, float], None],
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.crowd = crowd
        self.count = count
        self.max_body = config.max_body
        self.body_seconds = config.body_seconds

    def refusal(self, scope: Message) -> JSONResponse | None:
        """Return the answer to a request that is refused; None if it is accepted."""
        sent = next((value for name, value in scope["headers"] if name == b"host"), None)
        if sent is not None and not self.hosts.allow(sent.decode("latin-1")):
            return JSONResponse(
                {"error": "Host: not a name of this service; start it with --allowed-hosts NAME"},
                400,
                CLOSE,
            )

        if self.crowd.too_busy and scope["path"] not in HEALTH:
            return JSONResponse(
                {"error": "too many requests at once; try again later"},
                503,
                {"retry-after": "1", **CLOSE},
            )

        return None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        answer = self.refusal(scope) or self.app
        exchange = Exchange(receive, send, self.max_body, self.body_seconds)
        try:
            await answer(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            if not exchange.client_is_gone:
                raise
            exchange.end_without_client()
        finally:
            exchange.close()
            route = getattr(scope.get("route"), "path", "other")
            took = time.monotonic() - exchange.started
            self.count(route, exchange.status, took)
            log.info("%s %s %d %.1f ms", scope["method"], route, exchange.status, 1000 * took)


class Exchange:
    """Receive a request and send its answer: the body within its limits, our headers on the answer.

    Once the whole body has arrived, the client is watched, so that nothing is computed for one that
    has gone.
    """

    def __init__(self, receive: Receive, send: Send, max_body: int, body_seconds: float) -> None:
        self.started = time.monotonic()
        self.status = 500
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._body_seconds = body_seconds
        self._read = 0
        self._whole = False
        self._answered = False
        self.client_is_gone = False
        self._request = asyncio.current_task()
        self._watching: asyncio.Task | None = None

    async def receive(self) -> Message:
        """Receive a message; raises HTTPException 408 or 413 beyond the limits."""
        if self._whole:  # the next message can only say that the client has gone
            return await self._receive()

        left = self.started + self._body_seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, left))
        except TimeoutError:
            raise HTTPException(
                408, f"the body took more than {self._body_seconds:g} s", CLOSE
            ) from None

        self._read += len(message.get("body", b""))
        if self._read > self._max_body:
            raise HTTPException(413, f"a body of more than {self._max_body} bytes", CLOSE)

        self._whole = not message.get("more_body")
        if self._whole and message["type"] == "http.request":
            self._watching = asyncio.create_task(self._until_gone())
        return message

    async def _until_gone(self) -> None:
        """Cancel the request if its client goes before it is answered."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._answered:
            self.client_is_gone = True
            self._request.cancel()

    async def send(self, message: Message) -> None:
        """Send a message, with our headers at the start, and note status and end of the answer."""
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._answered = True
        if message["type"] == "http.response.start":
            self.status = message["status"]
            known = {name for name, _ in message["headers"]}
            ours = [header for header in HEADERS if header[0] not in known]
            message = {**message, "headers": [*message["headers"], *ours]}
        await self._send(message)

    def end_without_client(self) -> None:
        """Undo the cancellation, and record status 499."""
        self._request.uncancel()
        self.status = 499

    def close(self) -> None:
        """Stop watching the client."""
        if self._watching is not None:
            self._watching.cancel()
