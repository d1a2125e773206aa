"""Find the images that annotations name in region stores."""

from collections.abc import Iterable, Sequence

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.image_names import match_names


def image_numbers(corpus: Corpus) -> dict[str, int]:
    """Return the number of each image of a corpus by its id; the first one of an id counts."""
    numbers: dict[str, int] = {}
    for store, first in zip(corpus.stores, corpus.first_image, strict=False):
        for number in range(store.num_images):
            numbers.setdefault(store.image_id(number), int(first) + number)

    return numbers


def find_images(corpus: Corpus, names: Iterable[str]) -> dict[str, int]:
    """Return the numbers of images by the names that annotations use, in any spelling that means
    one image (data/image_names.py); images that are not there are left out.
    """
    return match_names(names, image_numbers(corpus))


def coco_name(number: object, subset: str) -> str:
    """Return COCO's file name, without ending, of an image: `COCO_train2014_000000000009`."""
    return f"COCO_{subset}_{int(str(number)):012d}"


def shown_ids(corpus: Corpus, images: Sequence[int]) -> list[str]:
    """Return the ids of some images of a corpus."""
    found = []
    for image in images:
        store, number = store_of(corpus, image)
        found.append(corpus.stores[store].image_id(number))

    return found


def image_size(corpus: Corpus, image: int) -> tuple[float, float]:
    """Return the width and height of an image of a corpus in pixels."""
    store, number = store_of(corpus, image)
    return corpus.stores[store].image_size(number)


def store_of(corpus: Corpus, image: int) -> tuple[int, int]:
    """Return (which store, number within it) of an image of a corpus."""
    store = next(n for n, first in enumerate(corpus.first_image[1:]) if image < first)
    return store, int(image - corpus.first_image[store])
