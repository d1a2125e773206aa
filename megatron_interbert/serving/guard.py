"""What stands before the application: whom it answers to, limits of requests, headers for answers,
one line for each request.
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
HEALTH = ("/healthz", "/readyz", "/metrics")  # answered however many requests are under way


class Guard:
    """ASGI around an application: bodies of at most `max_body` bytes within `body_seconds`, else
    413 or 408; a Host that is ours, else 400; no more requests at once than there may be
    connections, else 503.

    A request whose client goes away is cancelled (499 in the log and the figures). The line of a
    request in the log has method, route, status and milliseconds: no query, no body, no key, no
    address.
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
        """Give the answer to a request that is not looked at further; None for all others."""
        sent = next((value for name, value in scope["headers"] if name == b"host"), None)
        if sent is not None and not self.hosts.allow(sent.decode("latin-1")):
            return JSONResponse(
                {
                    "error": (
                        "Host: not a name of this service; it is started with --allowed-hosts NAME"
                    )
                },
                400,
                CLOSE,
            )

        if self.crowd.too_busy and scope["path"] not in HEALTH:
            return JSONResponse(
                {"error": "too many requests at once; come again"},
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
    """One request and its answer: a body within its limits, headers that are always there.

    Once the whole body is there its client is watched, so that nothing is computed for one that has
    gone.
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
        """Receive within the limits; HTTPException 408 or 413 beyond them."""
        if self._whole:  # what comes now is that the client has gone
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
        """Cancel the request when its client goes before it is answered."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._answered:
            self.client_is_gone = True
            self._request.cancel()

    async def send(self, message: Message) -> None:
        """Send with our headers, and note the status and the end of the answer."""
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._answered = True
        if message["type"] == "http.response.start":
            self.status = message["status"]
            known = {name for name, _ in message["headers"]}
            ours = [header for header in HEADERS if header[0] not in known]
            message = {**message, "headers": [*message["headers"], *ours]}
        await self._send(message)

    def end_without_client(self) -> None:
        """Take back the cancelling, and note it as status 499."""
        self._request.uncancel()
        self.status = 499

    def close(self) -> None:
        """Watch the client no longer."""
        if self._watching is not None:
            self._watching.cancel()
