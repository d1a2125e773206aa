"""Judge the figures of an inspection: ok, warning or problem, with what, where, and what to do."""

from collections.abc import Iterator, Sequence

from megatron_interbert.preparation.building.joining import NOT_WANTED, OF_DROPPED
from megatron_interbert.preparation.inspection import boxes as box_formats
from megatron_interbert.preparation.inspection import class_ids
from megatron_interbert.preparation.inspection.counts import SHOWN, Finding
from megatron_interbert.preparation.inspection.findings import Report, Verdict

OK = "ok"
WARNING = "warning"
PROBLEM = "problem"
REBUILD = "extract them again or leave them out, and rebuild with interbert build-features"
SOME = 0.1
# finding -> (what is counted, out of what, share up to which it is ok, share above which it is a
# problem, what to do)
SIMPLE = {
    "zero_features": (
        "regions have features of zeros only",
        "regions",
        0.0,
        0.01,
        "extraction failed there: " + REBUILD,
    ),
    "repeated_features": (
        "regions repeat the features of another region of their image",
        "regions",
        0.01,
        0.5,
        "are they padding? " + REBUILD,
    ),
    "boxes_in_features": (
        "images have their boxes once more as the last columns of the features",
        "images",
        0.0,
        0.01,
        "rebuild from the source with interbert build-features, which cuts them off",
    ),
    "no_area": (
        "boxes have no area inside their image",
        "regions",
        0.01,
        0.05,
        "see the verdict on box format; else " + REBUILD,
    ),
    "empty_captions": (
        "captions hold no word",
        "captions",
        0.0,
        0.05,
        "fix the caption file and rebuild",
    ),
    "odd_captions": (
        "captions are addresses, names of files or numbers",
        "captions",
        0.001,
        0.05,
        "another column of the caption file holds the texts: name the columns in its first line,"
        " and rebuild",
    ),
    "unreadable_captions": (
        "images have captions that are not UTF-8",
        "images",
        0.0,
        0.0,
        "restore captions.h5 or rebuild",
    ),
    "repeated_captions": (
        "captions repeat another caption of their image",
        "captions",
        0.01,
        1.0,
        "drop repeated lines of the caption file",
    ),
    "without_captions": (
        "images have no caption, so training does not draw them",
        "images",
        0.0,
        1.0,
        "add captions or drop the images",
    ),
}


def judge(
    report: Report,
    findings: dict[str, Finding],
    repeated: tuple[int, list[str]],
    wrong_hashes: Sequence[str] | None,
) -> list[Verdict]:
    """Return all verdicts, the worst first."""
    verdicts = [
        *_records(report, findings),
        *_files(report, wrong_hashes),
        *_simple(report, findings),
        *_repeats(report, repeated),
        *_boxes(report),
        *_labels(report),
        *_pairs(report),
        *_left_out(report),
        *_layout(report),
    ]
    return sorted(verdicts, key=lambda verdict: (PROBLEM, WARNING, OK).index(verdict.level))


def _records(report: Report, findings: dict[str, Finding]) -> Iterator[Verdict]:
    seen = report.counts["inspected"]
    bad = findings.get("unreadable")
    if bad:
        what = f"{bad.count} of {seen['images']} images cannot be read"
        yield Verdict(PROBLEM, "records", what, REBUILD, bad.places, bad.count - len(bad.places))
    elif seen["images"] == 0:
        yield Verdict(
            PROBLEM,
            "records",
            "the store has no images",
            "rebuild it with interbert build-features",
        )
    else:
        what = (
            f"all {seen['images']} images read are valid: no NaN or infinity, ids and ranges within"
            " bounds"
        )
        yield Verdict(OK, "records", what)


def _files(report: Report, wrong_hashes: Sequence[str] | None) -> Iterator[Verdict]:
    broken = [f"{shard['file']}: {shard['error']}" for shard in report.shards if "error" in shard]
    if broken:
        what = f"{len(broken)} of {len(report.shards)} shards cannot be opened"
        yield Verdict(
            PROBLEM,
            "files",
            what,
            "restore them or rebuild",
            broken[:SHOWN],
            max(len(broken) - SHOWN, 0),
        )

    if wrong_hashes:
        what = f"the sha256 of {len(wrong_hashes)} files differs from manifest.json"
        yield Verdict(
            PROBLEM,
            "hashes",
            what,
            "restore them",
            list(wrong_hashes[:SHOWN]),
            max(len(wrong_hashes) - SHOWN, 0),
        )
    elif wrong_hashes is not None:
        yield Verdict(OK, "hashes", "every file has the sha256 of manifest.json")


def _simple(report: Report, findings: dict[str, Finding]) -> Iterator[Verdict]:
    seen = report.counts["inspected"]
    for name, (what, unit, harmless, bearable, mend) in SIMPLE.items():
        found = findings.get(name, Finding())
        if name == "no_area" and report.box_format["found"]:
            continue  # a consequence of the wrong format
        if found.count:
            share = found.count / max(seen[unit], 1)
            level = OK if share <= harmless else WARNING if share <= bearable else PROBLEM
            text = f"{found.count} of {seen[unit]} {what}"
            mend = mend if level != OK else ""
            yield Verdict(
                level,
                name.replace("_", " "),
                text,
                mend,
                found.places,
                max(found.count - len(found.places), 0),
            )

    if not any(name in findings for name in SIMPLE):
        yield Verdict(
            OK,
            "content",
            "no empty or repeated features, boxes or captions, and every image has a caption",
        )


def _repeats(report: Report, repeated: tuple[int, list[str]]) -> Iterator[Verdict]:
    count, places = repeated
    if count:
        what = (
            f"{count} of {report.counts['inspected']['read']} images have the features of another"
            " image"
        )
        mend = (
            "the same picture twice, or under two names: drop one, above all if one is for testing"
        )
        yield Verdict(WARNING, "repeated images", what, mend, places, count - len(places))

    texts = report.counts["repeated_texts"]
    captions = report.counts["inspected"]["captions"]
    if texts > 0.2 * captions:
        what = f"{texts} of {captions} captions have the same text as another caption"
        yield Verdict(
            WARNING,
            "repeated texts",
            what,
            "an image cannot be told from others by such captions: check where they come from",
        )


def _boxes(report: Report) -> Iterator[Verdict]:
    boxes = report.box_format
    counts = report.counts

    if boxes["found"]:
        yield Verdict(PROBLEM, "box format", boxes["said"], box_formats.MENDING[boxes["found"]])
    elif boxes["found"] is None:
        yield Verdict(WARNING, "box format", boxes["said"], "look at the examples on the page")
    else:
        yield Verdict(OK, "box format", boxes["said"])

    clipped = counts["repaired_when_built"] or 0
    if clipped > SOME * counts["regions"] and not boxes["found"]:
        what = (
            f"{clipped} of {counts['regions']} boxes reached outside their image or were inverted,"
            " and were clipped when the store was built"
        )
        yield Verdict(
            WARNING,
            "clipped boxes",
            what,
            "check --box-format, and that image sizes are those that the boxes refer to",
        )

    if counts["repaired_when_read"]:
        what = (
            f"{counts['repaired_when_read']} stored boxes reach outside their image or are"
            " inverted; they are clipped when read"
        )
        yield Verdict(
            WARNING,
            "stored boxes",
            what,
            "rebuild with interbert build-features STORE --output NEW",
        )


def _labels(report: Report) -> Iterator[Verdict]:
    shift = report.class_shift
    classes = report.classes
    if classes["mean_probability"] is None and "clusters" in report.facts:
        yield Verdict(OK, "labels", f"{report.facts['clusters']} clusters stand for classes")
        return

    if classes["mean_probability"] is None:
        mend = (
            "train on words, features and matching (--objectives msm,mrfr,itm), find clusters with"
            " interbert cluster-features, or build a store from features with labels"
        )
        yield Verdict(WARNING, "labels", "no region has a label", mend)
        return

    if shift["shift"]:
        mend = class_ids.MENDING.get(
            shift["shift"], "rebuild with the right --class-ids and --class-names"
        )
        yield Verdict(PROBLEM, "class ids", shift["said"], mend)
    elif shift["shift"] is None:
        yield Verdict(
            WARNING, "class ids", shift["said"], "look at the names in the examples on the page"
        )
    else:
        yield Verdict(OK, "class ids", shift["said"])

    yield from _background(report)
    names = len(report.class_names)
    expected = report.facts["num_classes"]
    if names not in (0, expected):
        yield Verdict(
            WARNING,
            "class names",
            f"{names} names for {expected} classes",
            "rebuild with the right --class-names",
        )


def _pairs(report: Report) -> Iterator[Verdict]:
    """Judge whether captions are of their images; class ids that fit places are not at fault."""
    fit = report.class_shift["captions_fit"]
    if fit is None:
        return
    if fit:
        yield Verdict(OK, "pairs", "class names fit the captions of their own images")
        return

    yield Verdict(
        PROBLEM if report.class_shift["evidence"] == "places" else WARNING,
        "pairs",
        "class names fit the captions of their own images no better than those of other images",
        "captions may be of other images: compare names in the caption file with the ids of the"
        " features, and look at the examples on the page",
    )


def _left_out(report: Report) -> Iterator[Verdict]:
    """Judge what a build has left out without being asked to, by reason."""
    for unit in ("images", "captions"):
        reasons = {
            reason: count
            for reason, count in report.counts[f"{unit}_left_out"].items()
            if reason not in (NOT_WANTED, OF_DROPPED)
        }
        left_out = sum(reasons.values())
        if left_out > SOME * (left_out + report.counts[unit]):
            why = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
            yield Verdict(
                WARNING,
                f"{unit} left out",
                f"{left_out} {unit} were left out when the store was built: {why}",
                "see dropped.jsonl in the store; rebuild if they should be in it",
            )


def _background(report: Report) -> Iterator[Verdict]:
    classes = report.classes
    share = classes["background_share"]
    what = f"background is the top label of {share:.1%} of regions"
    # Whole distributions often have background on top if the detector was unsure. Otherwise it
    # means that ids are wrong, which captions or places, if known, show better.
    explained = (
        report.class_shift["shift"] is not None or report.facts.get("soft_labels") == "dense"
    )

    if classes["background_is_commonest"] and not explained:
        mend = "ids may count from a class other than background: see --class-ids"
        yield Verdict(PROBLEM, "background", f"{what}, more than any other class", mend)
    elif share > SOME:
        yield Verdict(
            WARNING,
            "background",
            what,
            "normal for whole distributions of unsure regions; otherwise leave such regions out",
        )

    total = f"probabilities of a soft label add up to {classes['mean_probability']:.2f} on average"
    if report.facts.get("soft_labels") == "dense" and classes["mean_probability"] < 0.2:
        yield Verdict(
            WARNING,
            "soft labels",
            f"{total}, though they are dense",
            "keep more entries: --soft-labels",
        )
    else:
        yield Verdict(OK, "labels", total)


def _layout(report: Report) -> Iterator[Verdict]:
    slow = report.layout["slow"]
    measured = report.layout["measured"]
    speed = (
        f"{measured['images_per_second']:,.0f} images/s read here by one process,"
        f" {measured['images']} in random order"
    )
    if not slow:
        yield Verdict(OK, "layout", f"contiguous and uncompressed: one image is one read ({speed})")
        return

    file, reasons = next(iter(slow.items()))
    what = (
        f"{len(slow)} of {len(report.shards)} shards are slow to read ({speed}):"
        f" {'; '.join(reasons)}"
    )
    yield Verdict(
        WARNING,
        "layout",
        what,
        f"interbert build-features {report.store} --output NEW",
        [file],
        len(slow) - 1,
    )
