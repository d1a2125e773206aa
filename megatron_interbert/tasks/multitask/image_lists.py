"""Read lists of images that no task may train on."""

from megatron_interbert.config.stores import split_paths
from megatron_interbert.errors import UsageError
from megatron_interbert.tasks.image_finder import coco_name
from megatron_interbert.tasks.name_lists import read_names

COCO = "coco:"  # before a file whose numbers are COCO's
SUBSETS = ("train2014", "val2014", "test2015")


def listed_images(files: str) -> set[str]:
    """Return the names of the images that comma-separated files list, a name on each line, a JSON
    list or NumPy's .npy. Numbers are Visual Genome's, or COCO's if `coco:` stands before the file.
    """
    found: set[str] = set()

    for file in split_paths(files):
        of_coco = file.startswith(COCO)
        names = read_names(file.removeprefix(COCO), "--exclude-images")
        found.update(named_by_coco(names, file) if of_coco else names)

    return found


def named_by_coco(numbers: list[str], file: str) -> list[str]:
    """Return the names that images of COCO, given by number, have in each of its parts."""
    other = next((n for n in numbers if not (n.isascii() and n.isdigit())), None)
    if other is not None:
        raise UsageError(f"--exclude-images {file}: '{other[:60]}' is not a number of COCO")

    return [coco_name(number, subset) for number in numbers for subset in SUBSETS]
