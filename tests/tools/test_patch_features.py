"""Test patch and grid features: cells of every kind of backbone against the models themselves,
boxes that cover the photo exactly, features pooled over boxes, masks by blocks, pretraining.
"""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_interbert.data.masking import mask_blocks
from megatron_interbert.data.store import RegionStore
from megatron_interbert.errors import UsageError
from megatron_interbert.hf.scorer import InterBertScorer
from megatron_interbert.photos import detect_regions, read_photo
from megatron_interbert.preparation.building.choosing import load_detector
from megatron_interbert.preparation.building.detectors import DetectorChoice
from megatron_interbert.preparation.building.extents import (
    Extent,
    cropped,
    padded,
    visible_cells,
)
from megatron_interbert.preparation.building.grids import pooled_boxes
from tests.launching import launch, pretrain, ran, records
from tests.shared import SHARED, needs_shared
from tests.tools.test_extract_features import make_detector

PHOTOS = SHARED / "data" / "photos"
KINDS = ("dinov2", "registers", "vit", "siglip", "resnet", "convnext", "swin")
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
COLOURS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_backbone(kind):
    """Return (model, image processor) with random weights, for inputs of about 64 pixels."""
    import transformers as t

    def side(pixels):
        return {"height": pixels, "width": pixels}

    if kind in ("dinov2", "registers"):
        processor = t.BitImageProcessorPil(
            size={"shortest_edge": 64}, crop_size=side(56), **COLOURS
        )
        if kind == "dinov2":
            config = t.Dinov2Config(image_size=56, patch_size=14, **SIZES)
            return t.Dinov2Model(config), processor
        config = t.Dinov2WithRegistersConfig(
            image_size=56, patch_size=14, num_register_tokens=4, **SIZES
        )
        return t.Dinov2WithRegistersModel(config), processor

    if kind == "vit":
        config = t.ViTConfig(image_size=64, patch_size=16, **SIZES)
        return t.ViTModel(config), t.ViTImageProcessorPil(size=side(64), **COLOURS)

    if kind == "siglip":
        seeing = t.SiglipVisionConfig(image_size=64, patch_size=16, **SIZES)
        reading = t.SiglipTextConfig(vocab_size=50, bos_token_id=1, eos_token_id=2, **SIZES)
        config = t.SiglipConfig(vision_config=seeing.to_dict(), text_config=reading.to_dict())
        return t.SiglipModel(config), t.SiglipImageProcessorPil(size=side(64), **COLOURS)

    if kind == "convnext":  # whose `patch_size` is that of the stem
        config = t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4)
        processor = t.ConvNextImageProcessorPil(size={"shortest_edge": 128}, **COLOURS)
        return t.ConvNextModel(config), processor

    if kind == "swin":  # which joins patches of 4 pixels in three stages
        config = t.SwinConfig(
            image_size=128, embed_dim=4, depths=[1] * 4, num_heads=[1] * 4, window_size=4
        )
        return t.SwinModel(config), t.ViTImageProcessorPil(size=side(128), **COLOURS)

    if kind == "mae":
        config = t.ViTMAEConfig(image_size=64, patch_size=16, **SIZES)
        return t.ViTMAEModel(config), t.ViTImageProcessorPil(size=side(64), **COLOURS)

    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, layer_type="basic"
    )
    return t.ResNetModel(config), t.ConvNextImageProcessorPil(size={"shortest_edge": 96}, **COLOURS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Save a backbone of each kind with its image processor; return their folders."""
    place = tmp_path_factory.mktemp("backbones")
    for seed, kind in enumerate((*KINDS, "mae")):
        torch.manual_seed(seed)
        model, processor = make_backbone(kind)
        model.save_pretrained(place / kind)
        processor.save_pretrained(place / kind)

    torch.manual_seed(9)
    detector, processor = make_detector("rt_detr")
    detector.save_pretrained(place / "rt_detr")
    processor.save_pretrained(place / "rt_detr")

    return place


def photo(width=120, height=60):
    """Make a picture of smooth colours."""
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2)
    return Image.fromarray(colours.astype(np.uint8))


def cells_by_hand(folder, pixels, kind):
    """Run the saved model on an input, and return its cells as a map [D, h, w]."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / kind).eval()
    model = getattr(model, "vision_model", model)
    with torch.inference_mode():
        states = model(pixel_values=pixels[None]).last_hidden_state[0]
    if kind in ("resnet", "convnext"):
        return states
    first = {"dinov2": 1, "registers": 5, "vit": 1, "siglip": 0, "swin": 0}[kind]
    return states[first:].T.reshape(-1, 4, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_those_of_the_model_alone(folders, kind):
    choice = DetectorChoice("", backbone=str(folders / kind), device="cpu")
    detector = load_detector(choice)
    image = photo()
    pixels, _ = detector.backbone.prepare(image)
    expected = cells_by_hand(folders, pixels, kind)
    (found,) = detector.detect([image])
    rows, columns = expected.shape[1:]
    assert detector.backbone.grid == (rows, columns)
    np.testing.assert_allclose(found.features, expected.flatten(1).T, atol=1e-5)
    boxes = found.boxes.reshape(rows, columns, 4)
    np.testing.assert_allclose(boxes[0, 0], [0, 0, 120 / columns, 60 / rows], atol=1e-4)
    np.testing.assert_allclose(boxes[-1, -1, 2:], [120, 60], atol=1e-4)

    pooled = (
        load_detector(DetectorChoice("", backbone=str(folders / kind), device="cpu", pool=2))
        if rows % 2 == 0
        else None
    )
    if pooled is not None:
        (fewer,) = pooled.detect([image])
        means = F.avg_pool2d(expected, 2).flatten(1).T
        np.testing.assert_allclose(fewer.features, means, atol=1e-5)
        assert len(fewer.boxes) == rows * columns // 4

    grid = (4, 8) if kind == "swin" else (2, 3)  # windows of swin have 4 cells a side
    wanted = load_detector(
        DetectorChoice("", backbone=str(folders / kind), device="cpu", grid=grid)
    )
    (other,) = wanted.detect([image])
    assert len(other.boxes) == grid[0] * grid[1]
    assert wanted.describe()["grid"] == list(grid)


@pytest.mark.parametrize("resize", ["whole", "pad", "crop"])
@pytest.mark.parametrize("size", [(120, 60), (50, 97), (64, 64), (300, 7), (3, 211)])
def test_boxes_cover_what_is_seen_exactly_once(folders, resize, size):
    choice = DetectorChoice("", backbone=str(folders / "vit"), device="cpu", resize=resize)
    (found,) = load_detector(choice).detect([photo(*size)])
    boxes = found.boxes.astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    assert (areas > 0).all()
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    if resize != "crop":
        np.testing.assert_allclose(low, [0, 0], atol=1e-4)
        np.testing.assert_allclose(high, size, rtol=1e-5)
    else:
        np.testing.assert_allclose((low + high) / 2, np.array(size) / 2, atol=max(size) / 30)
        assert (high - low).max() <= max(size) + 1e-3

    assert areas.sum() == pytest.approx((high - low).prod(), rel=1e-4)
    for box in boxes:
        shared = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
        overlap = np.clip(shared, 0, None).prod(axis=1).sum()
        assert overlap == pytest.approx((box[2:] - box[:2]).prod(), rel=1e-3)


def test_padded_and_cropped_inputs_show_the_right_part():
    image = photo(100, 40)
    whole, extent = padded(image, (64, 64), 2)
    seen = np.asarray(whole)
    assert not seen[30:].any(), "black below"
    assert extent == Extent(right=1.0, bottom=64 / 26)
    middle = seen[10, 32, 0] / 255
    assert middle == pytest.approx(0.5, abs=0.03)

    part, extent = cropped(image, (64, 64), 2)
    seen = np.asarray(part)[:, :, 0] / 255
    assert extent.left == pytest.approx(0.3, abs=0.01)
    assert extent.right == pytest.approx(0.7, abs=0.01)
    assert seen[5, 2] == pytest.approx(extent.left, abs=0.03)
    assert seen[5, -3] == pytest.approx(extent.right, abs=0.03)


def test_cells_in_the_border_are_left_out():
    shown, boxes = visible_cells(Extent(right=1.0, bottom=2.0), 4, 2)
    assert shown.tolist() == [0, 1, 2, 3]
    assert boxes[:, 3].tolist() == [0.5, 0.5, 1, 1]
    shown, boxes = visible_cells(Extent(right=1.6, bottom=1.0), 1, 4)
    assert shown.tolist() == [0, 1, 2]
    np.testing.assert_allclose(boxes[2], [0.8, 0, 1.0, 1])


def test_features_of_boxes_are_means_of_a_linear_map():
    rows, columns = 6, 8
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    features = torch.stack([x / columns, y / rows])
    boxes = np.array([[0.2, 0.3, 0.6, 0.9], [0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.5, 0.5]])
    found = pooled_boxes(features, boxes)
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(found, middles, atol=0.01)


def test_boxes_of_a_detector_over_a_grid(folders):
    image = photo()
    boxes = load_detector(DetectorChoice(str(folders / "rt_detr"), device="cpu"))
    both = load_detector(
        DetectorChoice(str(folders / "rt_detr"), device="cpu", backbone=str(folders / "vit"))
    )
    (alone,), (pooled,) = boxes.detect([image]), both.detect([image])
    np.testing.assert_array_equal(alone.boxes, pooled.boxes)
    np.testing.assert_array_equal(alone.class_ids, pooled.class_ids)
    assert pooled.features.shape == (len(alone.boxes), 32)
    assert both.describe()["boxes"]["model"] == "RTDetrForObjectDetection"
    pixels, _ = both.backbone.prepare(image)
    maps = cells_by_hand(folders, pixels, "vit")
    shares = alone.boxes / np.array([120, 60, 120, 60])
    np.testing.assert_allclose(pooled.features, pooled_boxes(maps, shares), atol=1e-5)


def extract(folders, *flags):
    """Return the command line of extract-features on the photos."""
    return (sys.executable, "tools/extract_features.py", PHOTOS, "--workers", 1, *flags)


@needs_shared
def test_photos_become_a_store_without_labels_that_can_be_learnt(folders, tmp_path):
    """Extract the 51 photos with their captions, by padding, and overfit on them."""
    captions = tmp_path / "captions.jsonl"
    entries = [json.loads(line) for line in open(PHOTOS / "meta.jsonl", encoding="utf-8")]
    lines = [
        json.dumps({"image": entry["file"], "caption": text}) + "\n"
        for entry in entries
        for text in entry["captions"][:1]
    ]
    captions.write_text("".join(lines))
    vocabulary = ("--vocab-file", SHARED / "data" / "vocab" / "bert-base-uncased-vocab.txt")
    store = tmp_path / "store"
    flags = ("--backbone", folders / "vit", "--resize", "pad", "--captions", captions, *vocabulary)
    out = ran(*extract(folders, *flags, "--output", store))
    assert "51 images, 636 regions" in out
    opened = RegionStore(str(store))
    assert opened.manifest["soft_labels"] == "none"
    assert opened.manifest["detector"]["resize"] == "pad"
    for number in range(51):
        regions = opened.read(number)
        np.testing.assert_allclose(regions.boxes[:, 2:].max(axis=0), regions.size, rtol=1e-5)

    name = opened.image_id(0)
    path = next(PHOTOS.glob(f"{name}.*"))
    (again,) = detect_regions(path, backbone=folders / "vit", resize="pad", device="cpu")
    np.testing.assert_allclose(again.features, opened.read(0).features, atol=2e-3)
    np.testing.assert_allclose(again.boxes, opened.read(0).boxes, atol=1e-3)
    assert read_photo(path).size == tuple(int(side) for side in opened.read(0).size)

    out = ran(
        *pretrain("--model", "tiny", "--data-path", store, "--save", tmp_path / "run"),
        *("--train-iters", 60, "--micro-batch-size", 51, "--lr", "5e-3", "--no-dropout"),
        *("--region-masking", "blocks", "--mrfr-normalise", "--num-workers", 0),
        *("--log-interval", 10, "--data-partitions", 1, "--max-tokens", 20),
    )
    assert "--objectives msm,mrfr,itm instead of msm,mrm,itm: the regions have no class" in out
    lines = list(records(tmp_path / "run", "train").values())
    assert "mrm_loss" not in lines[0]
    assert lines[-1]["msm_loss"] < 0.7 * lines[0]["msm_loss"]
    assert lines[-1]["mrfr_loss"] < lines[0]["mrfr_loss"]

    python = (sys.executable,)
    convert = ("tools/convert_checkpoint.py", tmp_path / "run", "--to", "huggingface")
    ran(*python, *convert, "--output", tmp_path / "hf")
    scorer = InterBertScorer.from_pretrained(tmp_path / "hf", "cpu")
    texts = [opened.caption(number) for number in range(3)]
    scores = scorer.score([opened.read(0), opened.read(1)], texts)
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scorer.score(again, texts)[0], scores[0], atol=2e-2)
    serve = ("-m", "megatron_interbert.serve", "--load", tmp_path / "run", "--data-path", store)
    assert "index " in ran(*python, *serve, "--image-folder", PHOTOS, "--build-only")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--grid", "14"), "'14', expected rows x columns, such as 14x14"),
        ((), "--detector and --backbone are both missing"),
        (("--detector", "x/y", "--pool", "2"), "--pool 2: a setting of a --backbone"),
        (("--detector", "x/y", "--resize", "pad"), "--resize pad: a setting of a --backbone"),
        (("--backbone", "x/y", "--max-regions", "50"), "--max-regions 50: a setting of a --det"),
        (("--backbone", "x/y", "--revision", "a"), "--revision a: a setting of a --detector"),
        (
            ("--detector", "x/y", "--backbone", "z/y", "--resize", "crop"),
            "--resize crop leaves out a part of each photo",
        ),
        (("--backbone", "nowhere"), "--backbone nowhere: no"),
    ],
)
@needs_shared
def test_backbones_that_cannot_be_used(folders, tmp_path, flags, message):
    code, _, err = launch(*extract(folders, *flags, "--output", tmp_path / "s"))
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "s").exists()


def test_a_model_that_hides_patches_at_random_is_refused(folders):
    choice = DetectorChoice("", backbone=str(folders / "mae"), device="cpu")
    with pytest.raises(UsageError, match=r"ViTMAEModel (fails on a small|gives other features)"):
        load_detector(choice)


def test_boxes_of_a_photo_without_any(folders):
    maps = torch.rand(5, 4, 4)
    assert pooled_boxes(maps, np.zeros((0, 4))).shape == (0, 5)
    many = np.random.default_rng(0).uniform(size=(150, 4))
    parts = torch.cat([pooled_boxes(maps, many[n : n + 1]) for n in range(150)])
    torch.testing.assert_close(pooled_boxes(maps, many), parts)


def test_grids_that_do_not_divide(folders):
    choice = DetectorChoice("", backbone=str(folders / "vit"), device="cpu", pool=3)
    with pytest.raises(UsageError, match="does not divide into cells of 16 pixels, 3 a") as ended:
        load_detector(choice)
    assert "fails on" not in str(ended.value)


def test_blocks_hide_what_lies_in_one_rectangle():
    random = np.random.default_rng(0)
    counts = np.array([196, 1, 36, 9])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    sizes = np.array([[640, 480], [100, 100], [60, 90], [30, 30]], float)
    boxes = []
    for count, (width, height) in zip(counts, sizes, strict=True):
        side = round(count**0.5)
        cells = Extent().cells(side, side) * np.array([width, height] * 2)
        boxes.append(cells)
    boxes = np.concatenate(boxes)
    shares = []
    for _ in range(300):
        hidden = mask_blocks(boxes, sizes, offsets, random.random((4, 4)))
        for sample in range(4):
            own = hidden[offsets[sample] : offsets[sample + 1]]
            assert own.any()
            side = round(len(own) ** 0.5)
            table = own.reshape(side, side)
            rows, columns = table.any(axis=1), table.any(axis=0)
            assert (table == rows[:, None] & columns[None]).all(), "a rectangle of cells"
        shares.append(hidden[:196].mean())

    assert 0.15 < np.mean(shares) < 0.25
