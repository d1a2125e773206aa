"""Build the HTTP application from guard, keys, metrics and routes, and make errors uniform."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route

from megatron_interbert.serving.connections import Crowd
from megatron_interbert.serving.guard import Guard
from megatron_interbert.serving.hosts import AllowedHosts
from megatron_interbert.serving.journal import NotKept
from megatron_interbert.serving.keys import Keys
from megatron_interbert.serving.messages import ErrorAnswer
from megatron_interbert.serving.metrics import Metrics
from megatron_interbert.serving.routes import (
    add_facts,
    add_items,
    add_page,
    add_pictures,
    add_questions,
)
from megatron_interbert.serving.service import KeptInPart, Service

log = logging.getLogger("megatron_interbert.serving")


def make_app(service: Service, hosts: AllowedHosts, crowd: Crowd) -> FastAPI:
    """Build the application around a service, for requests to these hosts.

    Its metrics include those of the connections in `crowd`.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        for thread in service.threads:
            await asyncio.to_thread(thread.close)

    errors = {status: {"model": ErrorAnswer} for status in (400, 408, 413, 422, 429, 503)}
    app = FastAPI(
        title="InterBERT product search",
        version="1",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses=errors,
    )
    app.state.service = service
    metrics = Metrics(service, crowd)
    config = service.config
    app.add_middleware(Guard, config=config, hosts=hosts, crowd=crowd, count=metrics.count)

    answer_errors_alike(app)
    keys = Keys(config)
    add_questions(app, service, [Depends(keys.may_read)])
    add_items(app, service, [Depends(keys.may_read)], [Depends(keys.may_write)])
    add_pictures(app, service, [Depends(keys.may_read)])
    add_facts(app, service, metrics)
    add_page(app, service)
    answer_heads(app)

    return app


def answer_heads(app: FastAPI) -> None:
    """Answer HEAD wherever GET is answered: the server then leaves out the body."""
    app.openapi()  # cached before HEAD is added, because a schema with the GETs is enough
    for route in app.routes:
        if isinstance(route, Route) and "GET" in route.methods:
            route.methods.add("HEAD")


def answer_errors_alike(app: FastAPI) -> None:
    """Make every error answer {"error": one line}, without repeating anything that was sent."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{where or 'body'}: {first['msg'].removeprefix('Value error, ')}"

        if first["type"] == "json_invalid":
            text = f"body: not valid JSON from byte {where} on"
        elif not where:
            text = "body: not a JSON object; send one, with content-type: application/json"

        return JSONResponse({"error": text[:300]}, 422)

    @app.exception_handler(NotKept)
    async def not_kept(request: Request, error: NotKept) -> JSONResponse:
        log.error("%s", error)
        return JSONResponse(
            {"error": "the change cannot be saved and was not made; the reason is in the log"}, 503
        )

    @app.exception_handler(KeptInPart)
    async def kept_in_part(request: Request, error: KeptInPart) -> JSONResponse:
        log.error("a change was made for searches but not for recommendations: %s", error)
        told = "the change was made for searches but not for recommendations; send it again"
        return JSONResponse({"error": told}, 503, headers={"retry-after": "1"})

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(
            {"error": "this request failed in the service; the reason is in its log"}, 500
        )

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)
