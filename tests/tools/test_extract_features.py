"""Test extraction from photos to a region store with small random detectors, against the detectors'
own outputs and processors.
"""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.photos import detect_regions
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import (
    DetectorChoice,
    TransformersDetector,
    class_distribution,
    pixel_boxes,
)
from megatron_interbert.preparation.building.sources.base import Dropped, Record
from megatron_interbert.preparation.building.sources.decoding import open_photo
from megatron_interbert.preparation.building.sources.photo_files import open_photos
from megatron_interbert.preparation.building.sources.photos import PhotoSource
from tests.launching import launch
from tests.shared import SHARED, needs_shared

PHOTOS = SHARED / "data" / "photos"
NAMES = ("cat", "dog", "cup", "tree", "car")
QUERIES = 20
KINDS = ("detr", "yolos", "rt_detr", "deformable_detr")
SOFTMAX = ("detr", "yolos")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a detector of each kind with its image processor; return their folders."""
    place = tmp_path_factory.mktemp("detectors")

    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        model, processor = make_detector(kind)

        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "class" in name or "bbox" in name:
                    weight.mul_(8)  # new heads give all queries almost the same scores and boxes
                elif "query_position" in name or "detection_tokens" in name:
                    # and so do new queries, whose order would depend on rounding
                    weight.normal_(std=10)
                elif kind in ("detr", "yolos") and weight.dim() == 2:
                    weight.mul_(8)

        model.save_pretrained(place / kind)
        processor.save_pretrained(place / kind)

    return {kind: place / kind for kind in KINDS}


def make_detector(kind, features=32):
    """Return (model, image processor) with few features and 20 queries, for pictures of about 100
    pixels.
    """
    import transformers as t

    labels = {
        "id2label": dict(enumerate(NAMES)),
        "label2id": {name: number for number, name in enumerate(NAMES)},
    }
    backbone = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16, 32],
        "depths": [1] * 4,
        "layer_type": "basic",
    }
    levels = ["stage2", "stage3", "stage4"]
    heads = {
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    size = {"shortest_edge": 96, "longest_edge": 160}

    if kind == "rt_detr":
        config = t.RTDetrConfig(
            backbone_config=t.RTDetrResNetConfig(**backbone, out_features=levels),
            d_model=features,
            encoder_hidden_dim=features,
            decoder_layers=2,
            encoder_in_channels=[16, 16, 32],
            decoder_in_channels=[features] * 3,
            num_queries=QUERIES,
            num_denoising=0,
            **heads,
            **labels,
        )
        return t.RTDetrForObjectDetection(config), t.RTDetrImageProcessorPil(
            size={"height": 96, "width": 96}
        )

    if kind == "yolos":
        config = t.YolosConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=[96, 160],
            num_detection_tokens=QUERIES,
            **labels,
        )
        return t.YolosForObjectDetection(config), t.YolosImageProcessorPil(size=size)

    common = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": QUERIES,
        **heads,
        **labels,
    }
    if kind == "detr":
        config = t.DetrConfig(
            backbone_config=t.ResNetConfig(**backbone, out_features=["stage4"]), **common
        )
        return t.DetrForObjectDetection(config), t.DetrImageProcessorPil(size=size)

    config = t.DeformableDetrConfig(
        backbone_config=t.ResNetConfig(**backbone, out_features=levels), **common
    )

    return t.DeformableDetrForObjectDetection(config), t.DeformableDetrImageProcessorPil(size=size)


def choice(folder, **options):
    return DetectorChoice(str(folder), device="cpu", **options)


def extract(*flags):
    return launch(sys.executable, "tools/extract_features.py", *flags, "--device", "cpu")


def some_photos(count=6):
    """Return paths of photos of at least three different sizes."""
    paths = sorted(PHOTOS.glob("*.jpg"))[:count]
    assert len({open_photo(path).size for path in paths}) >= 3
    return paths


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_the_models_own(folders, kind):
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(folders[kind]).eval()
    processor = AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    detector = load_detector(choice(folders[kind], soft_labels=6))
    assert (detector.feature_dim, detector.num_classes, detector.class_names) == (
        32,
        6,
        ("background", *NAMES),
    )

    for path in some_photos(4):
        image = open_photo(path)
        (found,) = detector.detect([image])
        with torch.no_grad():
            output = model(**processor(images=[image], return_tensors="pt"))

        check_distributions(found, output, softmax=kind in SOFTMAX)
        whole = processor.post_process_object_detection(
            output, threshold=0.0, target_sizes=[image.size[::-1]]
        )[0]
        best = whole["scores"].argmax()
        limit = torch.tensor([*image.size, *image.size])
        torch.testing.assert_close(torch.tensor(found.scores[0]), whole["scores"][best])
        torch.testing.assert_close(
            torch.tensor(found.boxes[0]), whole["boxes"][best].clamp(min=0).minimum(limit)
        )
        assert np.where(found.class_ids[0] > 0)[0][0] == list(found.class_ids[0]).index(
            whole["labels"][best] + 1
        )


def check_distributions(found, output, softmax):
    """Compare rows of `found` with the model's logits and states, computed here in float64."""
    logits = output.logits[0].double().numpy()

    if softmax:
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        scores = probs[:, :-1].max(1)
        dense = np.roll(probs, 1, axis=1)
    else:
        probs = 1 / (1 + np.exp(-logits))
        scores = probs.max(1)
        total = probs.sum(1, keepdims=True)
        dense = np.concatenate([np.maximum(1 - total, 0), probs / np.maximum(total, 1)], axis=1)

    order = np.argsort(-scores, kind="stable")
    assert len(found.scores) == QUERIES, "each query once, however many of its classes score"
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-6)
    np.testing.assert_allclose(
        found.features, output.last_hidden_state[0, -QUERIES:].numpy()[order], atol=1e-5
    )

    for row, query in enumerate(order):
        np.testing.assert_allclose(
            found.class_probs[row], dense[query][found.class_ids[row]], atol=1e-6
        )
        assert sorted(found.class_ids[row]) == list(range(6))
        assert (np.diff(found.class_probs[row]) <= 0).all(), "most likely first"

    np.testing.assert_allclose(found.class_probs.sum(1), 1, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_a_batch_change_nothing(folders, kind):
    detector = load_detector(choice(folders[kind]))
    images = [open_photo(path) for path in some_photos(8)]
    alone = [detector.detect([image])[0] for image in images]

    for size in (4, 8):
        together = [
            found
            for start in range(0, 8, size)
            for found in detector.detect(images[start : start + size])
        ]

        for one, other in zip(alone, together, strict=True):
            for name in ("features", "scores", "class_probs", "boxes"):
                np.testing.assert_allclose(
                    getattr(other, name), getattr(one, name), atol=1e-3 if name == "boxes" else 1e-5
                )


@needs_shared
def test_number_and_order_of_regions(folders):
    source = PhotoSource(
        *open_photos(PHOTOS),
        choice(folders["rt_detr"]),
        batch_size=4,
        max_regions=9,
        min_regions=3,
        min_score=0.55,
    )
    unit = source.units(12)[1]
    assert unit == sorted(path.name for path in PHOTOS.glob("*.jpg"))[12:24]
    records = list(source.read(unit))
    assert [record.regions.image_id + ".jpg" for record in records] == unit
    detector = load_detector(choice(folders["rt_detr"]))
    counts = set()

    for record, name in zip(records, unit, strict=True):
        (found,) = detector.detect([open_photo(PHOTOS / name)])
        passing = sum(score >= 0.55 for score in found.scores)
        assert len(record.regions.features) == min(max(passing, 3), 9)
        counts.add(len(record.regions.features))
        np.testing.assert_allclose(
            record.regions.features, found.features[: len(record.regions.features)], atol=4e-3
        )
        boxes, (width, height) = record.regions.boxes, record.regions.size
        assert boxes.min() >= 0
        assert (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()

    assert len(counts) > 1, "the limits must have been tried"


def test_boxes_end_at_the_edges():
    boxes = pixel_boxes(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.4, 0.4]]), (200, 100))
    torch.testing.assert_close(
        boxes, torch.tensor([[50.0, 25.0, 150.0, 75.0], [140.0, 0.0, 200.0, 30.0]])
    )


def test_class_distributions_worked_out_by_hand():
    logits = torch.tensor([[2.0, 0.0, 1.0]])
    dist, score = class_distribution(logits, softmax=True)
    torch.testing.assert_close(dist, logits.softmax(-1)[:, [2, 0, 1]])
    torch.testing.assert_close(score, logits.softmax(-1)[:, 0])
    dist, score = class_distribution(torch.tensor([[-1.0, -2.0]]), softmax=False)
    p = torch.tensor([-1.0, -2.0]).sigmoid()
    torch.testing.assert_close(dist[0], torch.stack([1 - p.sum(), *p]))
    torch.testing.assert_close(score[0], p[0])
    dist, _ = class_distribution(torch.tensor([[3.0, 3.0]]), softmax=False)
    torch.testing.assert_close(dist[0], torch.tensor([0.0, 0.5, 0.5]))


def write_captions(path):
    rows = map(json.loads, (PHOTOS / "meta.jsonl").read_text().splitlines())
    path.write_text(
        "".join(
            json.dumps({"image_id": row["file"], "caption": text}) + "\n"
            for row in rows
            for text in row["captions"]
        )
    )
    return path


def spoil(folder):
    """Add photos that cannot be used; return {image id: part of the reason}."""
    from PIL import Image

    good = sorted(folder.glob("*.jpg"))[0]
    (folder / "cut.jpg").write_bytes(good.read_bytes()[:4000])
    (folder / "text.jpg").write_text("not a picture at all")
    (folder / "nothing.png").write_bytes(b"")
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    (folder / "again").mkdir()
    shutil.copy(good, folder / "again" / good.name)
    (folder / "notes.txt").write_text("no photo")

    return {
        "cut": "decoded",
        "text": "not a picture",
        "nothing": "empty file",
        "huge": "too many pixels",
        f"again/{good.stem}": "no caption",
    }


@needs_shared
def test_whole_folder_with_one_process_and_with_two(folders, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(PHOTOS, photos)
    bad = spoil(photos)
    captions = write_captions(tmp_path / "captions.jsonl")
    flags = (
        photos,
        "--detector",
        folders["detr"],
        "--images-per-shard",
        20,
        "--batch-size",
        4,
        "--captions",
        captions,
    )

    for workers, decoders in ((1, 2), (2, 0)):
        more = ("--workers", workers, "--decoders", decoders)
        code, out, err = extract(*flags, "--output", tmp_path / f"store{workers}", *more)
        assert code == 0, out + err
        assert "51 images, " in out, out
        assert "255 captions, 5 photos dropped" in out, out
        assert re.search(r"\n  model +\d+\.\d s +\d+\.\d %\n", out), "where the time went"

    one, two = (RegionStore(str(tmp_path / f"store{workers}")) for workers in (1, 2))
    assert one.manifest == two.manifest, "hashes of all files are in it"
    detector = one.manifest["detector"]
    assert (detector["name"], detector["revision"], detector["model"]) == (
        "detr",
        "",
        "DetrForObjectDetection",
    )
    assert detector["size"] == {"shortest_edge": 96, "longest_edge": 160}
    assert detector["weights_sha256"] == sha256(folders["detr"] / "model.safetensors")
    assert one.manifest["class_names"] == ["background", *NAMES]
    assert len(one.manifest["shards"]) == 3
    report = [
        json.loads(line)
        for line in (tmp_path / "store1" / "dropped.jsonl").read_text().splitlines()
    ]
    assert len(report) == len(bad)
    for row in report:
        assert bad[row["image_id"]] in row["reason"], row
    for number in range(one.num_images):
        assert 10 <= len(one.read(number).features) <= QUERIES


def sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_turned_and_unusual_pictures(folders, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture must be rotated by 90 degrees
    upright.save(tmp_path / "turned.png", exif=exif)
    upright.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "plain.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    upright.convert("CMYK").save(tmp_path / "print.jpeg")
    upright.convert("L").save(tmp_path / "grey.webp", lossless=True)
    np.testing.assert_array_equal(
        np.asarray(open_photo(tmp_path / "deep.png"))[..., 1], pixels[..., 0]
    )
    found = {
        r.regions.image_id: r.regions
        for r in PhotoSource(*open_photos(tmp_path), choice(folders["detr"])).read(
            sorted(p.name for p in tmp_path.iterdir())
        )
    }
    assert len(found) == 5
    assert found["turned"].size == (60.0, 90.0)
    np.testing.assert_array_equal(found["turned"].features, found["plain"].features)


def test_links_to_photos_are_photos_and_pipes_are_not(folders, tmp_path):
    """Check a folder of links, by which people select some of their photos."""
    from PIL import Image

    photos = tmp_path / "photos"
    others = tmp_path / "others"
    for folder in (photos, others):
        folder.mkdir()

    Image.new("RGB", (100, 80)).save(others / "own.png")
    (photos / "chosen.png").symlink_to("../others/own.png")
    (photos / "nowhere.png").symlink_to("absent.png")
    os.mkfifo(photos / "pipe.png")

    source = PhotoSource(*open_photos(photos), choice(folders["detr"]))
    results = dict(zip(source.files.names, source.read(source.files.names), strict=True))

    assert isinstance(results["chosen.png"], Record)
    for name in ("nowhere.png", "pipe.png"):
        assert results[name].reason == "picture cannot be read", name


def test_a_photo_that_the_detector_cannot_take_does_not_stop_the_others(
    folders, tmp_path, monkeypatch
):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (100 + number, 80)).save(tmp_path / f"{number}.png")

    source = PhotoSource(*open_photos(tmp_path), choice(folders["detr"]))
    original = TransformersDetector.prepare

    def fail(self, image):
        if image.size[0] == 102:
            raise RuntimeError("kernel size is greater than the picture")
        return original(self, image)

    source.facts()
    monkeypatch.setattr(TransformersDetector, "prepare", fail)
    results = list(source.read(source.files.names))
    assert [type(result) for result in results] == [Record, Record, Dropped, Record]
    assert results[2].reason == "detector failed"


def test_wrong_use_is_one_line(folders, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    with pytest.raises(UsageError, match="no such file or folder"):
        open_photos(tmp_path / "absent")
    with pytest.raises(
        UsageError, match=r"no photos there \(it is empty\); expected files such as"
    ):
        open_photos(tmp_path)
    with pytest.raises(UsageError, match="not an object detection model"):
        load_detector(choice(tmp_path))

    classifier = tmp_path / "classifier"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(classifier)
    shutil.copy(folders["detr"] / "preprocessor_config.json", classifier)
    with pytest.raises(UsageError, match="not an object detection model"):
        load_detector(choice(classifier))
    with pytest.raises(UsageError, match="only for torchvision detectors"):
        load_detector(choice(folders["detr"], weights="x.pth"))

    code, out, err = extract(
        tmp_path, "--detector", folders["detr"], "--output", tmp_path / "store"
    )
    assert (code, out, err.count("\n")) == (2, "", 1), out + err
    assert err.startswith("error: ")
    assert not (tmp_path / "store").exists()


def test_weights_that_are_missing_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folders["detr"], broken)
    state = load_file(broken / "model.safetensors")
    del state["class_labels_classifier.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(
        UsageError, match=r"1 parameters are missing .* first class_labels_classifier.weight"
    ):
        load_detector(choice(broken))


def test_torchvision_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="torchvision cannot be imported beside torch"):
        load_detector(choice("torchvision:fasterrcnn_resnet50_fpn"))


@needs_shared
def test_torchvision_boxes_and_features(tmp_path):
    try:
        from torchvision.models import get_model
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision for this torch: {str(error).splitlines()[0]}")

    torch.manual_seed(0)
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=11,
        box_score_thresh=0.0,
        box_detections_per_img=10000,
    )
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.05)
    torch.save(model.eval().state_dict(), tmp_path / "weights.pth")
    detector = load_detector(
        choice(f"torchvision:{name}", weights=str(tmp_path / "weights.pth"), soft_labels=11)
    )
    assert (detector.feature_dim, detector.num_classes, detector.class_names) == (1024, 11, ())
    seen = {}
    model.roi_heads.box_head.register_forward_hook(
        lambda module, inputs, output: seen.update(states=output)
    )
    model.roi_heads.box_predictor.register_forward_hook(
        lambda module, inputs, output: seen.update(logits=output[0])
    )
    images = [open_photo(path) for path in some_photos(4)]

    for image, found in zip(images, detector.detect(images), strict=True):
        with torch.no_grad():
            output = model([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255])[0]
        check_faster_rcnn(found, seen["states"], seen["logits"].softmax(-1), output)


def check_faster_rcnn(found, states, probs, output):
    """Compare rows of `found` with what hooks saw in the model (states [P, F], probs [P, C]), and
    with its own detections.
    """
    assert len(found.scores) > 5

    for row in range(5):
        proposal = (states - torch.from_numpy(found.features[row])).abs().amax(1).argmin()
        np.testing.assert_allclose(found.features[row], states[proposal], atol=1e-4)
        np.testing.assert_allclose(
            found.class_probs[row], probs[proposal][found.class_ids[row]], atol=1e-5
        )
        label = probs[proposal, 1:].argmax() + 1
        same_class = output["boxes"][output["labels"] == label]
        assert (same_class - torch.from_numpy(found.boxes[row])).abs().amax(1).min() < 0.01


@needs_shared
def test_regions_of_a_photo_are_those_of_a_build(folders, tmp_path):
    photos = some_photos()
    place = tmp_path / "photos"
    place.mkdir()
    for photo in photos:
        shutil.copy(photo, place)
    source = PhotoSource(*open_photos(place), choice(folders["rt_detr"]))
    stored = {record.regions.image_id: record.regions for record in source.read(source.files.names)}
    for regions in detect_regions(photos, folders["rt_detr"], device="cpu"):
        same = stored[regions.image_id]
        assert regions.size == same.size
        # Batches differ in size, so rounding differs too.
        np.testing.assert_allclose(regions.features, same.features, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(regions.boxes, same.boxes, rtol=1e-4, atol=1e-2)

    (tmp_path / "broken.jpg").write_bytes(b"no jpeg")
    with pytest.raises(UsageError, match=r"broken\.jpg: cannot be read as a photo"):
        detect_regions(tmp_path / "broken.jpg", folders["rt_detr"], device="cpu")
    with pytest.raises(UsageError, match="max_regions is 0"):
        detect_regions(photos[0], folders["rt_detr"], max_regions=0, device="cpu")

    (few,) = detect_regions(photos[0], folders["rt_detr"], max_regions=5, device="cpu")
    assert len(few.features) == 5


@needs_shared
def test_a_photo_that_the_detector_fails_on_is_named(folders, monkeypatch):
    def fails(self, pictures):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(TransformersDetector, "detect", fails)
    photo = some_photos()[0]
    with pytest.raises(UsageError, match=f"{photo.name}: the detector failed"):
        detect_regions(photo, folders["rt_detr"], device="cpu")
