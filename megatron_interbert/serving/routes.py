"""Add the routes: searches, recommendations, scores, items and their pictures, state, page."""

import asyncio
import html
import json
import logging
from importlib import resources
from typing import Any

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse, JSONResponse, Response

from megatron_interbert.errors import UsageError
from megatron_interbert.pages.drawing import draw_image
from megatron_interbert.pages.photo_folder import photos_in
from megatron_interbert.serving.items import Item
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
from megatron_interbert.serving.metrics import Metrics
from megatron_interbert.serving.service import Service, Topic
from megatron_interbert.serving.shop import Find, Score, Shop
from megatron_interbert.tasks.shop.topic_samples import topic_text


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe, for the schema, that these statuses come with an error in JSON."""
    return {status: {"model": ErrorAnswer} for status in statuses}


def add_questions(app: FastAPI, service: Service, reads: list[Any]) -> None:
    """Add searches, recommendations, scores and topics."""

    @app.post("/search", dependencies=reads, response_model=Results)
    async def search(body: SearchRequest) -> dict[str, Any]:
        """Find the items that match a query best."""
        answer = await service.ask(
            Find(body.query, body.k, max(body.k, body.candidates)), service.searcher
        )
        return service.results(answer, answer.result)

    @app.post("/recommend", dependencies=reads, response_model=Results, responses=refusals(404))
    async def recommend(body: RecommendRequest) -> dict[str, Any]:
        """Find the items that match a topic best: one of /topics, or your own."""
        text = text_of(body, service.topics)
        answer = await service.ask(
            Find(text, body.k, max(body.k, body.candidates)), service.recommender
        )

        return service.results(answer, answer.result)

    @app.post("/score", dependencies=reads, response_model=Scores, responses=refusals(404))
    async def score(body: ScoreRequest) -> dict[str, Any]:
        """Score how well a text matches some items, in the order given."""
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
        """List the topics that can be requested by id."""
        return [
            {"topic_id": topic.topic_id, "name": topic.name, "text": topic.text}
            for topic in service.topics.values()
        ]


def text_of(body: RecommendRequest, topics: dict[str, Topic]) -> str:
    """Return the text of the requested topic; raises HTTPException 422 unless one is named, 404 if
    it is unknown.
    """
    if (body.topic_id is None) == (body.topic is None):
        raise HTTPException(422, "give either topic_id or topic")
    if body.topic is not None:
        return topic_text(body.topic.name, body.topic.description or "", body.topic.keywords)
    if body.topic_id not in topics:
        raise HTTPException(404, "no such topic")

    return topics[body.topic_id].text


def add_items(app: FastAPI, service: Service, reads: list[Any], writes: list[Any]) -> None:
    """Add reading, changing and removing items."""

    @app.get(
        "/items/{item_id:path}",
        dependencies=reads,
        response_model=ItemAnswer,
        responses=refusals(404),
    )
    async def read_item(item_id: str) -> dict[str, Any]:
        """Return one item."""
        return found_item(service.searcher.shop, item_id).record()

    @app.put(
        "/items/{item_id:path}",
        dependencies=writes,
        response_model=ItemAnswer,
        responses={201: {"model": ItemAnswer}, **refusals(401, 403)},
    )
    async def put_item(item_id: str, body: ItemBody, response: Response) -> dict[str, Any]:
        """Add an item (201) or change it (200); searches find it as soon as this is answered."""
        item = item_of(item_id, body)
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
        responses=refusals(401, 403, 404),
    )
    async def delete_item(item_id: str) -> Response:
        """Remove an item; no search finds it once this is answered."""
        if not any(await service.change(lambda shop: shop.remove(item_id))):
            raise HTTPException(404, "no such item")
        return Response(status_code=204)


def found_item(shop: Shop, item_id: str) -> Item:
    """Return an item of a shop; raises HTTPException 404 if there is no such item."""
    place = shop.items.place(item_id)
    if place is None:
        raise HTTPException(404, "no such item")

    return shop.items.item(place)


def item_of(item_id: str, body: ItemBody) -> Item:
    """Build the item that a client sent; raises HTTPException 422 for an unusable id or title."""
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

    return item


def add_pictures(app: FastAPI, service: Service, reads: list[Any]) -> None:
    """Add the pictures of items."""

    @app.get(
        "/pictures/{item_id:path}",
        dependencies=reads,
        response_class=Response,
        responses=refusals(404),
    )
    async def picture(item_id: str) -> Response:
        """Return the photo of an item, or a drawing of its regions if it has none."""
        shop = service.searcher.shop  # held, because it may be replaced at any moment
        item = found_item(shop, item_id)
        number = shop.items.image_numbers[item.image_id]

        try:
            return await asyncio.to_thread(picture_of, shop, number, service.config.image_folder)
        except OSError:  # the id cannot be a file name, for example because it is too long
            return await asyncio.to_thread(picture_of, shop, number, "")


def add_facts(app: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add health, readiness and metrics."""

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
    """Return the photo named by the image's id in the folder, else a drawing as SVG.

    The photo is sent from memory, because a response that opens its path again could be led to
    another file by then. Raises HTTPException 503 if it cannot be read now.
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

    cached = {"cache-control": "private, max-age=60"}  # short: an item may get another picture
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
