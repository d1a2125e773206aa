"""The HTTP interface: search, recommendation, scores, items, health, metrics, page."""

import asyncio
import html
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any

import prometheus_client as prometheus
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route

from megatron_interbert.errors import UsageError
from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.serving.batching import Answer, Late, ModelThread, QueueFull
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.serving.connections import Crowd
from megatron_interbert.serving.guard import Guard
from megatron_interbert.serving.hosts import AllowedHosts
from megatron_interbert.serving.items import Item
from megatron_interbert.serving.journal import NotKept
from megatron_interbert.serving.messages import (
    ErrorAnswer,
    ItemAnswer,
    ItemBody,
    RecommendRequest,
    Results,
    ScoreRequest,
    Scores,
    SearchRequest,
    speakable,
)
from megatron_interbert.serving.shop import Find, Hit, Score, Shop
from megatron_interbert.tasks.shop.topic_samples import topic_text

log = logging.getLogger("megatron_interbert.serving")


class KeptInPart(RuntimeError):
    """A change that one of two models has, and the other could not take."""


class Metrics:
    """Prometheus figures of one application."""

    def __init__(self, service: "Service", crowd: Crowd) -> None:
        self.registry = prometheus.CollectorRegistry()
        make = {"registry": self.registry}
        self.requests = prometheus.Counter(
            "interbert_requests", "requests by route and status", ["route", "status"], **make
        )
        self.seconds = prometheus.Histogram(
            "interbert_request_seconds",
            "seconds of requests",
            ["route"],
            **make,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )

        for name, what in (
            ("batches", "passes"),
            ("questions", "answered"),
            ("late", "past their deadline"),
            ("gone", "left by clients"),
            ("full", "turned away"),
        ):
            gauge = prometheus.Gauge(f"interbert_{name}_total", f"questions: {what}", **make)
            gauge.set_function(
                lambda name=name: sum(thread.answered[name] for thread in service.threads)
            )

        waiting = prometheus.Gauge("interbert_waiting", "questions in the queue", **make)
        waiting.set_function(lambda: sum(thread.waiting for thread in service.threads))
        prometheus.Gauge("interbert_items", "items", **make).set_function(
            lambda: len(service.searcher.shop.items)
        )
        prometheus.Gauge("interbert_connections", "connections that are open", **make).set_function(
            lambda: crowd.open
        )
        ended = prometheus.Gauge(
            "interbert_connections_ended_total",
            "connections ended by the service",
            ["reason"],
            **make,
        )
        for reason in crowd.ended:
            ended.labels(reason).set_function(lambda reason=reason: crowd.ended[reason])

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)


@dataclass
class Topic:
    """One that can be asked for by its id."""

    topic_id: str
    name: str
    text: str


@dataclass
class Service:
    """What the routes share: what answers searches and what answers topics, which may be the
    same.
    """

    searcher: ModelThread
    recommender: ModelThread
    config: ServeConfig
    generated: bool
    topics: dict[str, Topic] = field(default_factory=dict)

    @property
    def threads(self) -> list[ModelThread]:
        """Each once."""
        return (
            [self.searcher]
            if self.recommender is self.searcher
            else [self.searcher, self.recommender]
        )

    async def change(self, function: Callable[[Shop], bool]) -> list[bool]:
        """Of all models, one after the other, as soon as all can keep it.

        NotKept where nothing was changed. KeptInPart where the first model alone has the change:
        who sends it again completes it, and what was done does no harm then.
        """
        if len(self.threads) > 1:
            for thread in self.threads:
                await self.ask(Shop.check_journal, thread)

        results = []
        for thread in self.threads:
            try:
                answer = await self.ask(function, thread)
            except Exception as error:
                if not results:
                    raise
                raise KeptInPart(str(error)) from error

            results.append(answer.result)

        return results

    async def ask(self, asked: Find | Score | Callable[[Shop], Any], thread: ModelThread) -> Answer:
        """By a model's thread; HTTPException 429 when too many wait, 503 when it took too long."""
        try:
            return await thread.ask(asked, self.config.deadline)
        except QueueFull:
            raise HTTPException(
                429, "too many requests wait; come again", {"retry-after": "1"}
            ) from None
        except Late:
            raise HTTPException(
                503,
                f"not answered within {self.config.deadline:g} s; come again",
                {"retry-after": "1"},
            ) from None

    def results(self, answer: Answer, hits: list[Hit], **more: Any) -> dict[str, Any]:
        """Give an answer as JSON."""
        return {
            "results": [{**hit.item.record(), "score": hit.score} for hit in hits],
            "model": answer.weights[:12],
            "index": answer.version,
            "timings": {
                "queue_ms": round(1000 * answer.queue_seconds, 2),
                "compute_ms": round(1000 * answer.compute_seconds, 2),
                "batch_size": answer.batch_size,
            },
            **more,
        }


def make_app(service: Service, hosts: AllowedHosts, crowd: Crowd) -> FastAPI:
    """Make the application around a service, for requests to these hosts; its figures are also of
    the connections.
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
    add_facts(app, service, metrics)
    add_page(app, service)
    answer_heads(app)

    return app


def answer_heads(app: FastAPI) -> None:
    """Answer HEAD wherever GET is answered: the same without a body, which the server leaves
    out.
    """
    app.openapi()  # made and kept before: a schema of GETs says it all
    for route in app.routes:
        if isinstance(route, Route) and "GET" in route.methods:
            route.methods.add("HEAD")


def answer_errors_alike(app: FastAPI) -> None:
    """{"error": one line}, which repeats nothing of what was sent."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = f"{where or 'body'}: {first['msg'].removeprefix('Value error, ')}"

        if first["type"] == "json_invalid":
            text = f"body: no JSON, from byte {where} on"
        elif not where:
            text = "body: no JSON object; send one, with content-type: application/json"

        return JSONResponse({"error": text[:300]}, 422)

    @app.exception_handler(NotKept)
    async def not_kept(request: Request, error: NotKept) -> JSONResponse:
        log.error("%s", error)
        return JSONResponse(
            {"error": "the change cannot be kept, and was not made; the reason is in the log"}, 503
        )

    @app.exception_handler(KeptInPart)
    async def kept_in_part(request: Request, error: KeptInPart) -> JSONResponse:
        log.error("a change was made for searches and not for recommendations: %s", error)
        told = "the change was made for searches and not for recommendations; send it again"
        return JSONResponse({"error": told}, 503, headers={"retry-after": "1"})

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(
            {"error": "the service has failed at this request; it is in its log"}, 500
        )

    @app.exception_handler(StarletteHTTPException)
    async def failed(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


Sent = Annotated[
    HTTPAuthorizationCredentials | None,
    Depends(HTTPBearer(auto_error=False, description="INTERBERT_API_KEY")),
]


class Keys:
    """Who may do what: the key of INTERBERT_API_KEY, compared in constant time."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config

    def may_write(self, sent: Sent = None) -> None:
        """HTTPException 403 where nobody may, 401 without the key."""
        if not self.config.api_key:
            raise HTTPException(
                403, "items cannot be changed: the service was started without INTERBERT_API_KEY"
            )

        self._compare(sent)

    def may_read(self, sent: Sent = None) -> None:
        """HTTPException 401 without the key, where it is asked for."""
        if self.config.protect_reads:
            self._compare(sent)

    def _compare(self, sent: HTTPAuthorizationCredentials | None) -> None:
        given = sent.credentials if sent else ""
        if not secrets.compare_digest(given.encode(), self.config.api_key.encode()):
            raise HTTPException(
                401,
                "a wrong key, or none: Authorization: Bearer KEY",
                {"www-authenticate": "Bearer"},
            )


def add_questions(app: FastAPI, service: Service, reads: list[Any]) -> None:
    """Search, recommendation, scores, topics."""

    @app.post("/search", dependencies=reads, response_model=Results)
    async def search(body: SearchRequest) -> dict[str, Any]:
        """The items that fit a query best."""
        answer = await service.ask(
            Find(body.query, body.k, max(body.k, body.candidates)), service.searcher
        )
        return service.results(answer, answer.result)

    @app.post(
        "/recommend",
        dependencies=reads,
        response_model=Results,
        responses={404: {"model": ErrorAnswer}},
    )
    async def recommend(body: RecommendRequest) -> dict[str, Any]:
        """The items that fit a topic best: one of /topics, or one of your own."""
        if (body.topic_id is None) == (body.topic is None):
            raise HTTPException(422, "give either topic_id or topic")
        if body.topic is not None:
            text = topic_text(body.topic.name, body.topic.description or "", body.topic.keywords)
        elif body.topic_id in service.topics:
            text = service.topics[body.topic_id].text
        else:
            raise HTTPException(404, "no such topic")

        answer = await service.ask(
            Find(text, body.k, max(body.k, body.candidates)), service.recommender
        )

        return service.results(answer, answer.result)

    @app.post(
        "/score", dependencies=reads, response_model=Scores, responses={404: {"model": ErrorAnswer}}
    )
    async def score(body: ScoreRequest) -> dict[str, Any]:
        """How well a text and some items match, in the order given."""
        if body.explain and len(body.item_ids) > 1:
            raise HTTPException(422, "explain: give one item")

        thread = service.recommender if body.task == "recommendation" else service.searcher
        explained = None

        try:
            answer = await service.ask(Score(body.text, body.item_ids), thread)
            if body.explain:
                explained = await service.ask(
                    lambda shop: shop.regions(body.text, body.item_ids[0]), thread
                )
        except KeyError as error:
            raise HTTPException(404, f"item {error.args[0]} of the list: no such item") from None

        regions = explained.result if explained else None

        return service.results(answer, answer.result, regions=regions)

    @app.get("/topics", dependencies=reads)
    async def topics() -> list[dict[str, str]]:
        """The topics that can be asked for by their ids."""
        return [
            {"topic_id": topic.topic_id, "name": topic.name, "text": topic.text}
            for topic in service.topics.values()
        ]


def add_items(app: FastAPI, service: Service, reads: list[Any], writes: list[Any]) -> None:
    """Add items and their pictures."""

    def found_item(item_id: str) -> Item:
        items = service.searcher.shop.items  # one shop: another may be served in the next moment
        place = items.place(item_id)
        if place is None:
            raise HTTPException(404, "no such item")
        return items.item(place)

    @app.get(
        "/items/{item_id:path}",
        dependencies=reads,
        response_model=ItemAnswer,
        responses={404: {"model": ErrorAnswer}},
    )
    async def read_item(item_id: str) -> dict[str, Any]:
        """One item."""
        return found_item(item_id).record()

    @app.put(
        "/items/{item_id:path}",
        dependencies=writes,
        response_model=ItemAnswer,
        responses={
            201: {"model": ItemAnswer},
            401: {"model": ErrorAnswer},
            403: {"model": ErrorAnswer},
        },
    )
    async def put_item(item_id: str, body: ItemBody, response: Response) -> dict[str, Any]:
        """Add an item (201) or change it (200); searches find it when this answers."""
        try:
            item = Item(
                speakable(item_id),
                body.image_id,
                body.title and speakable(body.title),
                dict(body.attributes),
            )
            if len(item_id) > 128:
                raise ValueError("more than 128 characters")
        except ValueError as error:
            raise HTTPException(422, f"item_id or title: {error}") from None

        try:
            added, *_ = await service.change(lambda shop: shop.put(item))
        except KeyError:
            raise HTTPException(422, "image_id: no such image in the region stores") from None

        response.status_code = 201 if added else 200

        return item.record()

    @app.delete(
        "/items/{item_id:path}",
        dependencies=writes,
        status_code=204,
        responses={
            401: {"model": ErrorAnswer},
            403: {"model": ErrorAnswer},
            404: {"model": ErrorAnswer},
        },
    )
    async def delete_item(item_id: str) -> Response:
        """Take an item out; no search finds it when this answers."""
        if not any(await service.change(lambda shop: shop.remove(item_id))):
            raise HTTPException(404, "no such item")
        return Response(status_code=204)

    @app.get(
        "/pictures/{item_id:path}",
        dependencies=reads,
        response_class=Response,
        responses={404: {"model": ErrorAnswer}},
    )
    async def picture(item_id: str) -> Response:
        """The photo of an item, or a drawing of its regions where there is none."""
        shop = service.searcher.shop
        item = found_item(item_id)
        number = shop.items.image_numbers[item.image_id]

        try:
            return await asyncio.to_thread(picture_of, shop, number, service.config.image_folder)
        except OSError:  # its id is not the name of any file: too long, say
            return await asyncio.to_thread(picture_of, shop, number, "")


def add_facts(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add what the service says of itself."""

    @app.get("/healthz", include_in_schema=False)
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", include_in_schema=False)
    async def readiness() -> Response:
        def of(shop: Shop) -> dict[str, Any]:
            return {
                "items": len(shop.items),
                "index": shop.version.name,
                "model": shop.weights[:12],
            }

        ready = all(thread.alive for thread in service.threads)
        facts = {
            "ready": ready,
            **of(service.searcher.shop),
            "recommendation": of(service.recommender.shop),
        }

        return JSONResponse(facts, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        return Response(
            prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page and its files."""
    page = resources.files("megatron_interbert.serving").joinpath("page")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        text = page.joinpath("index.html").read_text(encoding="utf-8")
        facts = {"generated": service.generated, "protected": service.config.protect_reads}
        return HTMLResponse(text.replace("{facts}", html.escape(json.dumps(facts))))

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        kinds = {"page.js": "text/javascript", "page.css": "text/css"}
        if name not in kinds:
            raise HTTPException(404, "no such file")

        return Response(
            page.joinpath(name).read_text(encoding="utf-8"),
            media_type=f"{kinds[name]}; charset=utf-8",
        )


def picture_of(shop: Shop, image: int, folder: str) -> Response:
    """Give a photo named by its image id in the folder, else an SVG.

    The photo goes out from memory: a response that opens its path again could be led elsewhere by
    then.
    """
    corpus = shop.items.corpus
    store = int((corpus.first_image[1:] <= image).sum())
    local = image - int(corpus.first_image[store])
    name = corpus.stores[store].image_id(local)
    photos = photos_in(folder)

    try:
        photo = photos.read(name) if photos else None
    except UsageError as error:
        logging.getLogger("uvicorn.error").warning("%s", error)
        raise HTTPException(503, "the photo cannot be read now; try again later") from None

    cached = {"cache-control": "private, max-age=60"}  # an item may be given another picture
    if photo is not None:
        return Response(photo.data, media_type=f"image/{photo.kind}", headers=cached)

    symbol = draw_image(corpus.stores[store], local, None)
    box = symbol[symbol.index("viewBox=") : symbol.index(">")]
    body = symbol[symbol.index(">") + 1 : symbol.rindex("</symbol>")]

    return Response(
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{body}</svg>',
        media_type="image/svg+xml",
        headers=cached,
    )
