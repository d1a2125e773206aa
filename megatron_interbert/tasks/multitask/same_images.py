"""Tell which images of Visual Genome are COCO's, so that none is trained on under one name and
evaluated on under the other.
"""

from collections.abc import Iterable

from megatron_interbert.data.image_names import ImageName
from megatron_interbert.errors import UsageError
from megatron_interbert.reading import read_json_value
from megatron_interbert.tasks.image_finder import coco_name
from megatron_interbert.tasks.records import check_entry

SUBSETS = ("train2014", "val2014")  # of COCO, of which Visual Genome has images


class SameImages:
    """Hold the number of each of Visual Genome's images in COCO, from its image_data.json."""

    def __init__(self, path: str) -> None:
        entries = read_json_value(path, "--image-data")
        if not isinstance(entries, list):
            raise UsageError(f"--image-data {path}: expected image_data.json of Visual Genome")

        self.coco_of: dict[str, int] = {}
        for number, entry in enumerate(entries):
            where = f"--image-data {path}: image {number}"
            key = "id" if isinstance(entry, dict) and "image_id" not in entry else "image_id"
            check_entry(entry, {key: int}, where)  # `id` in the first version
            coco = entry.get("coco_id")
            if type(coco) is int:
                self.coco_of[str(entry[key])] = coco
            elif coco is not None:
                raise UsageError(f"{where}: 'coco_id' is {coco!r:.60}, expected a number or null")

        self.genome_of = {str(coco): genome for genome, coco in self.coco_of.items()}

    def others(self, names: Iterable[str]) -> set[str]:
        """Return the names under which the images with these names go in the other data set: plain
        numbers are Visual Genome's, those with COCO's prefix COCO's.
        """
        found: set[str] = set()
        for text in names:
            name = ImageName(text)
            if name.is_coco and name.number in self.genome_of:
                found.add(self.genome_of[name.number])
            elif not name.is_coco and name.number in self.coco_of:
                found |= {coco_name(self.coco_of[name.number], subset) for subset in SUBSETS}

        return found
