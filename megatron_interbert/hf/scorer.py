"""Score images, given as detected regions, against captions by the matching head.

Legend: I images, C captions, R most regions of an image, F feature size, P pooled size.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_interbert.data.manifest import VOCABULARY
from megatron_interbert.data.packing import Example, normalised_locations, pack
from megatron_interbert.data.regions import Regions, repair_boxes
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.hf.modeling import InterBertForImageTextRetrieval, InterBertForPreTraining
from megatron_interbert.model.pair_scorer import PairScorer

Image = Regions | Mapping[str, Any]


class ImageTensors(NamedTuple):
    """Hold all images on the device, sent there once, however many captions each is scored with."""

    visual_feats: torch.Tensor  # [I, R, F]
    visual_pos: torch.Tensor  # [I, R, 5]
    visual_attention_mask: torch.Tensor  # [I, R]


class Ranked(NamedTuple):
    """Hold a candidate of `InterBertScorer.rank`: its index in the given list, and its score."""

    index: int
    score: float


class InterBertScorer:
    """Score images and texts, encode each side alone, and rank one side for the other.

    Scores are margins of the matching head, logit(matched) - logit(mismatched): the higher, the
    better the fit.
    """

    def __init__(
        self,
        model: InterBertForImageTextRetrieval | InterBertForPreTraining,
        tokenizer: CaptionTokenizer,
        max_tokens: int | None = None,
    ) -> None:
        """Take a model with a matching head; captions are cut to `max_tokens` with [CLS] and [SEP],
        by default to the model's positions.

        Raises UsageError for a model without that head, or a vocabulary of another size.
        """
        if "itm" not in model.heads:
            raise UsageError(
                f"InterBertScorer: {type(model).__name__} has no matching head; give an"
                " InterBertForImageTextRetrieval"
            )

        if tokenizer.vocab_size != model.config.vocab_size:
            raise UsageError(
                f"{tokenizer.vocab_file}: {tokenizer.vocab_size} entries, the model has"
                f" {model.config.vocab_size}; give the vocabulary that it was trained with"
            )

        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens or model.config.max_position_embeddings

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str | None = None
    ) -> "InterBertScorer":
        """Load model and vocab.txt of a folder onto a device (default: a GPU if there is one)."""
        if not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such folder; give one that `convert` exported")
        if not (Path(folder) / VOCABULARY).is_file():
            raise UsageError(
                f"{folder}: has no {VOCABULARY}; copy the vocabulary of the model into the folder"
            )

        vocabulary = str(Path(folder) / VOCABULARY)
        CaptionTokenizer(vocabulary)  # raises if there is none, before the weights are read
        model = InterBertForImageTextRetrieval.from_pretrained(folder)
        tokenizer = CaptionTokenizer(vocabulary, model.config.text_normalisation)

        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)

    def score(
        self,
        image_regions: Image | Sequence[Image],
        captions: str | Sequence[str],
        batch_size: int = 64,
        paired: bool = False,
    ) -> np.ndarray:
        """Return the scores of all pairs, float32 [I, C], or [I] of image i with caption i if
        `paired`.

        An image is a `Regions` of a store or a dict of features [R, F], boxes [R, 4] (pixels x1 y1
        x2 y2) and size (width, height); a single image or caption needs no list. Raises UsageError
        that names a wrong image or caption.
        """
        check_positive("batch_size", batch_size)
        images = (
            [image_regions]
            if isinstance(image_regions, (Regions, Mapping))
            else list(image_regions)
        )
        texts = [
            self.token_ids(i, text)
            for i, text in enumerate([captions] if isinstance(captions, str) else captions)
        ]
        if paired and len(images) != len(texts):
            raise UsageError(
                f"paired: {len(images)} images and {len(texts)} captions, expected equal numbers of"
                " both"
            )

        shape = (len(images),) if paired else (len(images), len(texts))
        scores = np.empty(shape, dtype=np.float32).reshape(-1)
        if not scores.size:
            return scores.reshape(shape)

        tensors = self.image_tensors(images)
        # image and caption of each score
        pairs = np.indices(shape).reshape(len(shape), -1)[[0, -1]]
        # similar lengths share a batch, so there is little padding
        by_length = np.argsort([len(texts[c]) for c in pairs[1]], kind="stable")
        for start in range(0, len(by_length), batch_size):
            chunk = by_length[start : start + batch_size]
            scores[chunk] = self.margins(
                tensors, pairs[0][chunk], [texts[c] for c in pairs[1][chunk]]
            )

        return scores.reshape(shape)

    def rank(
        self,
        image_regions: Image | Sequence[Image],
        captions: str | Sequence[str],
        top_k: int | None = None,
        batch_size: int = 64,
    ) -> list[Ranked]:
        """Rank the captions for one image, or the images for one caption, best first.

        The whole model judges each pair, as a cross-encoder does. Raises UsageError unless one side
        is single.
        """
        if top_k is not None:
            check_positive("top_k", top_k)

        scores = self.score(image_regions, captions, batch_size)
        if 1 not in scores.shape:
            raise UsageError(
                f"rank: {scores.shape[0]} images and {scores.shape[1]} captions, expected one image"
                " or one caption"
            )
        flat = scores.reshape(-1)
        best = np.argsort(-flat, kind="stable")[:top_k]
        return [Ranked(int(index), float(flat[index])) for index in best]

    def encode_text(self, captions: str | Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Encode captions alone: pooled vectors, float32 [C, P], for the first stage of a search.

        With product fusion, the margin of a pair is roughly the sum over (w_matched - w_mismatched)
        of the matching head x both vectors. The model was not trained on either side alone.
        """
        texts = [captions] if isinstance(captions, str) else list(captions)
        examples = []
        for number, text in enumerate(texts):
            ids = self.token_ids(number, text).numpy()
            examples.append(Example(ids, np.zeros_like(ids)))
        return self._encode(examples, batch_size, images=False)

    def encode_image(
        self, image_regions: Image | Sequence[Image], batch_size: int = 64
    ) -> np.ndarray:
        """Encode images alone: pooled vectors, float32 [I, P]; see `encode_text`."""
        single = isinstance(image_regions, (Regions, Mapping))
        images = [image_regions] if single else list(image_regions)
        start = np.array([self.tokenizer.cls])
        examples = []
        for number, image in enumerate(images):
            features, locations = read_image(number, image, self.model.config.feature_dim)
            examples.append(Example(start, np.zeros_like(start), features, locations))
        return self._encode(examples, batch_size, images=True)

    @torch.inference_mode()
    def _encode(self, examples: list[Example], batch_size: int, images: bool) -> np.ndarray:
        """Return the pooled vectors of one side of the examples, float32 [examples, P]."""
        check_positive("batch_size", batch_size)
        inner = self.model.interbert
        device = self.model.device
        scorer = PairScorer(inner)
        found = [np.zeros((0, inner.config.pooled_size), np.float32)]
        for start in range(0, len(examples), batch_size):
            batch = pack(examples[start : start + batch_size], inner.config.feature_dim)
            side = scorer.images(batch, device) if images else scorer.captions(batch, device)
            found.append(scorer.encode_side(side, images).float().cpu().numpy())
        return np.concatenate(found)

    @torch.inference_mode()
    def margins(
        self, images: ImageTensors, chosen: np.ndarray, texts: list[torch.Tensor]
    ) -> np.ndarray:
        """Return scores, float32 [pairs], of image `chosen[i]` with token ids `texts[i]`."""
        device = images.visual_feats.device
        lengths = torch.tensor([len(ids) for ids in texts])
        input_ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        chosen = torch.from_numpy(chosen).to(device)
        regions = {name: tensor[chosen] for name, tensor in images._asdict().items()}
        logits = self.model(input_ids.to(device), mask.to(device), **regions).itm_logits

        return (logits[:, 0] - logits[:, 1]).cpu().numpy()

    def token_ids(self, number: int, caption: str) -> torch.Tensor:
        """Return the token ids of caption `number` with [CLS] and [SEP], int64 [tokens]."""
        if not isinstance(caption, str):
            raise UsageError(f"caption {number} is of type {type(caption).__name__}, expected text")
        ids = self.tokenizer.encode(caption, self.max_tokens).ids
        return torch.from_numpy(np.concatenate([[self.tokenizer.cls], ids, [self.tokenizer.sep]]))

    def image_tensors(self, images: Sequence[Image]) -> ImageTensors:
        """Return features and locations of all images, padded to the one with most regions."""
        parts = [
            read_image(number, image, self.model.config.feature_dim)
            for number, image in enumerate(images)
        ]
        features, locations = ([torch.from_numpy(part[i]) for part in parts] for i in (0, 1))
        counts = torch.tensor([len(part) for part in features])
        pad = torch.nn.utils.rnn.pad_sequence
        mask = torch.arange(int(counts.max())) < counts[:, None]
        tensors = (pad(features, batch_first=True), pad(locations, batch_first=True), mask)

        return ImageTensors(*(tensor.to(self.model.device) for tensor in tensors))


def check_positive(name: str, value: int) -> None:
    """Raise UsageError unless an argument is 1 or more."""
    if value < 1:
        raise UsageError(f"{name} is {value}, expected 1 or more")


def read_image(number: int, image: Image, feature_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features [R, F] and locations [R, 5] of one image, float32; boxes are clipped to it,
    as in a store.

    Raises UsageError that names the image and what is wrong with it.
    """
    values = image if isinstance(image, Mapping) else getattr(image, "__dict__", {})
    for name in ("features", "boxes", "size"):
        if name not in values:
            raise UsageError(f"image {number}: no '{name}', expected features, boxes and size")

    features, boxes = (np.asarray(values[name], dtype=np.float32) for name in ("features", "boxes"))
    size = np.asarray(values["size"], dtype=np.float32)

    if features.ndim != 2 or not len(features) or features.shape[1] != feature_dim:
        raise UsageError(
            f"image {number}: features have shape {list(features.shape)}, expected [regions,"
            f" {feature_dim}]"
        )

    if boxes.shape != (len(features), 4):
        raise UsageError(
            f"image {number}: boxes have shape {list(boxes.shape)}, expected [{len(features)}, 4]"
        )

    if size.shape != (2,) or not np.isfinite(size).all() or size.min() <= 0:
        raise UsageError(
            f"image {number}: size is {values['size']}, expected width and height above 0"
        )

    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise UsageError(f"image {number}: features or boxes hold NaN or infinity")

    repaired, _ = repair_boxes(boxes, tuple(size))

    return features, normalised_locations(repaired, tuple(size))
