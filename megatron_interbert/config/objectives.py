"""Read the flags that say which losses pretraining trains on."""

from collections.abc import Mapping

from megatron_interbert.config.options import nearest
from megatron_interbert.errors import UsageError

# what each objective is, in the order in which they are reported
OBJECTIVES = {
    "msm": "masked segments of words",
    "mrm": "classes of masked regions, as the detector's whole distribution (KL)",
    "mrc": "classes of masked regions, as the detector's most likely one",
    "attributes": "attributes of masked regions, weighted by the detector's confidence",
    "mrfr": "features of masked regions",
    "itm": "image-text matching",
    "vqa": "answers to questions about images",
    "wra": "alignment of words and regions by optimal transport",
}
ANSWER_HEAD = "vqa"  # under which a checkpoint keeps the head of vqa, so that evaluate vqa finds it
USUAL = ("msm", "mrm", "itm")
WITHOUT_LABELS = ("msm", "mrfr", "itm")  # for stores whose regions have no classes
OF_CLASSES = ("mrm", "mrc")
OF_REGIONS = (*OF_CLASSES, "attributes", "mrfr")
WITH_MATCHING = ("wra", "vqa")  # objectives that a mix trains in the steps of itm
USUAL_WEIGHTS = {"wra": 0.1}  # of the loss; others 1


def read_objectives(text: str) -> tuple[str, ...]:
    """Read `msm,mrfr`; raises UsageError for an unknown name."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        check_name(name, "--objectives")

    return names


def check_name(name: str, flag: str) -> None:
    """Raise UsageError unless a name is an objective's."""
    if name not in OBJECTIVES:
        near = nearest(name, OBJECTIVES)
        raise UsageError(f"{flag}: unknown '{name}'{near}, expected some of {','.join(OBJECTIVES)}")


def check_mix(mix: Mapping[str, float], objectives: tuple[str, ...]) -> None:
    """Raise UsageError unless a mix draws each objective, and only those; WITH_MATCHING have no
    steps of their own, but join those of itm.
    """
    for name in WITH_MATCHING:
        if name in mix:
            raise UsageError(
                f"--objective-mix: {name} has no steps of its own, but joins those of itm; leave it"
                " out of the mix, and name it in --objectives"
            )
        if name in objectives and "itm" not in mix:
            raise UsageError(f"--objective-mix: {name} needs itm, whose steps it joins")

    drawn = {name for name in objectives if name not in WITH_MATCHING}
    if set(mix) != drawn:
        raise UsageError(
            f"--objective-mix draws {','.join(mix)}, but --objectives are {','.join(objectives)};"
            " name the same ones"
        )
