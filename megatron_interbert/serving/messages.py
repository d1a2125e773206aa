"""Define the requests and answers of the HTTP API: their schema, with limits and examples."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST = 50  # items in an answer


def speakable(text: str) -> str:
    """Return the text; raises ValueError for a lone surrogate, NUL, or nothing but whitespace."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate, which is not a character") from None

    if "\0" in text:
        raise ValueError("a NUL character")
    if not text.strip():
        raise ValueError("no text")

    return text


Text = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(speakable)]
Words = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(speakable)]
Id = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(speakable)]
K = Annotated[int, Field(ge=1, le=MOST, description="items wanted")]
Candidates = Annotated[
    int, Field(ge=1, le=1000, description="items that the first stage passes to the model")
]


class Body(BaseModel):
    """Refuse unknown keys, and values that would need conversion to the declared type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SearchRequest(Body):
    query: Text = Field(examples=["红色条纹连衣裙"])
    k: K = 10
    candidates: Candidates = 100


class TopicText(Body):
    name: Words = Field(examples=["清爽海滩系列"])
    description: Text | None = Field(None, examples=["在海滩拍的蓝色、白色，适合泳衣和凉鞋"])
    keywords: list[Words] = Field([], max_length=16, examples=[["泳衣", "凉鞋", "海滩"]])


class RecommendRequest(Body):
    topic_id: Id | None = Field(None, description="one of GET /topics")
    topic: TopicText | None = Field(None, description="or your own topic")
    k: K = 10
    candidates: Candidates = 100


class ScoreRequest(Body):
    text: Text = Field(examples=["红色条纹连衣裙"])
    task: Literal["search", "recommendation"] = Field(
        "search", description="whose model scores, if there are two"
    )
    item_ids: list[Id] = Field(
        min_length=1, max_length=100, examples=[["test-000000", "test-000001"]]
    )
    explain: bool = Field(
        False, description="also return how much each region speaks for the match; one item only"
    )


class ItemBody(Body):
    image_id: Id = Field(
        description="an image of the region stores that the service was started with",
        examples=["test-000003"],
    )
    title: Annotated[str, Field(max_length=256)] = Field(
        "", examples=["青禾2026夏季红色纯棉连衣裙"]
    )
    attributes: dict[Words, Words] = Field(
        {}, max_length=16, examples=[{"shop": "青禾旗舰店", "price": "99.9"}]
    )


class ItemFile(ItemBody):
    """Represent a line of --items."""

    item_id: Id


class ItemAnswer(BaseModel):
    item_id: str
    image_id: str
    title: str
    attributes: dict[str, str]


class Found(ItemAnswer):
    score: float = Field(
        description="margin of the matching head: higher is better, above 0 means a match"
    )


class Timings(BaseModel):
    queue_ms: float = Field(description="time in the queue, before the batch began")
    compute_ms: float = Field(description="time that the batch took to compute")
    batch_size: int = Field(description="questions in the batch")


class Results(BaseModel):
    results: list[Found]
    model: str = Field(description="first digits of the sha256 of the weights")
    index: str = Field(description="version of the index")
    timings: Timings


class RegionWeight(BaseModel):
    box: list[float] = Field(description="x1, y1, x2, y2 as shares of the picture")
    weight: float = Field(description="from -1 to 1; positive speaks for the match")


class Scores(Results):
    regions: list[RegionWeight] | None = None


class ErrorAnswer(BaseModel):
    error: str
