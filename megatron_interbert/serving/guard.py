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
        started = time.monotonic()
        status = 500
        read = 0
        whole = False
        answered = False
        gone = False
        request = asyncio.current_task()
        watching = None

        async def until_gone() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            if not answered:
                gone = True
                request.cancel()

        async def limited() -> Message:
            """`receive`, within the limits; when the whole body is there, its client is watched."""
            nonlocal read, whole, watching
            if whole:  # what comes now is that the client has gone
                return await receive()

            left = started + self.body_seconds - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except TimeoutError:
                raise HTTPException(
                    408, f"the body took more than {self.body_seconds:g} s", CLOSE
                ) from None

            read += len(message.get("body", b""))
            if read > self.max_body:
                raise HTTPException(413, f"a body of more than {self.max_body} bytes", CLOSE)

            whole = not message.get("more_body")
            if whole and message["type"] == "http.request":
                watching = asyncio.create_task(until_gone())

            return message

        async def noted(message: Message) -> None:
            nonlocal status, answered
            answered = answered or (
                message["type"] == "http.response.body" and not message.get("more_body")
            )

            if message["type"] == "http.response.start":
                status = message["status"]
                known = {name for name, _ in message["headers"]}
                message = {
                    **message,
                    "headers": [*message["headers"], *(h for h in HEADERS if h[0] not in known)],
                }

            await send(message)

        try:
            await answer(scope, limited, noted)
        except asyncio.CancelledError:
            if not gone:
                raise
            request.uncancel()
            status = 499
        finally:
            if watching is not None:
                watching.cancel()
            route = getattr(scope.get("route"), "path", "other")
            took = time.monotonic() - started
            self.count(route, status, took)
            log.info("%s %s %d %.1f ms", scope["method"], route, status, 1000 * took)
