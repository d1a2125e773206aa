"""Evaluation of a checkpoint: `python -m megatron_interbert.evaluate retrieval --zero-shot --load DIR --data-path STORE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_interbert.config import option, parse
from megatron_interbert.data.corpus import Corpus, check_detector
from megatron_interbert.data.manifest import MANIFEST, file_sha256
from megatron_interbert.data.pretraining import trainable_captions
from megatron_interbert.data.store import RegionStore
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError, run_entry
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.presets import fit_to_data
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.tasks.retrieval import caption_ids, image_examples, retrieval_metrics, score_matrix
from megatron_interbert.tasks.retrieval_page import result_page
from megatron_interbert.weights.files import write_json, write_text
from megatron_interbert.weights.sources import Source, open_source

TASKS = ("retrieval",)


@dataclass
class EvaluateConfig:
    """Flags of an evaluation."""

    load: str = option("", "a run's folder (its newest checkpoint), one global_stepN, a Hugging Face folder or an official .bin")
    data_path: str = option("sample_corpus/test", "region store to evaluate on")
    vocab_file: str = option("", "WordPiece vocabulary; default: vocab.txt in the region store")
    output: str = option("", "folder for result.json and result.html; default: evaluation/retrieval in the run's folder")
    zero_shot: bool = option(False, "label the result as zero-shot: the pretrained matching head, no finetuning")
    language: str = option("", "only captions of this language tag; default: all")
    max_images: int = option(0, "only the first images of the store; 0: all")
    max_regions: int = option(36, "regions per image")
    max_tokens: int = option(36, "tokens per caption with [CLS] and [SEP]")
    batch_pairs: int = option(512, "pairs per forward pass")
    kernels: str = option("auto", "fused kernels", ("auto", "torch", "triton", "apex"))
    allow_other_detector: bool = option(False, "accept features of another detector than the model was trained on")
    image_folder: str = option("", "photos named IMAGE_ID.jpg to show on the page")

    def __post_init__(self) -> None:
        self.given: set[str] = set()


def load_model(load: str, heads: tuple[str, ...], kernels: str, device: torch.device) -> tuple[InterBert, Source]:
    """A model for inference on one device from weights of any format and layout, and where they came from."""
    if not load:
        raise UsageError("--load is missing; give the folder of a checkpoint")
    source = open_source(load)
    model = InterBert(source.config, heads, kernels=choose_kernels(kernels, device))
    load_full_state(model, source.state(), ParallelState(), load)
    return model.to(device).eval(), source


def evaluate_retrieval(config: EvaluateConfig) -> dict[str, Any]:
    """All pairs of a store's images and captions; writes result.json and result.html and gives the result."""
    device = this_device()
    model, source = load_model(config.load, ("itm",), config.kernels, device)
    model_config = source.config
    store = RegionStore(config.data_path)
    tokenizer = CaptionTokenizer(config.vocab_file or str(Path(config.data_path) / "vocab.txt"))
    fit_to_data(model_config, tokenizer.vocab_size, store.feature_dim, store.num_classes, config.data_path)
    check_detector(
        source.facts.get("detector"), store.manifest["detector"], f"--data-path {store.path}", config.allow_other_detector
    )
    vocabulary = source.facts.get("vocabulary")
    if vocabulary and vocabulary != file_sha256(tokenizer.vocab_file):
        raise UsageError(f"{tokenizer.vocab_file}: not the vocabulary of {config.load}; give that one by --vocab-file")

    if config.max_tokens > model_config.max_position_embeddings:
        raise UsageError(
            f"--max-tokens {config.max_tokens} is more than the model's {model_config.max_position_embeddings} positions"
        )
    captions = trainable_captions(Corpus([config.data_path]), config.language)
    if config.max_images:
        captions = captions[store.caption_image[captions] < config.max_images]
    images = np.unique(store.caption_image[captions])
    with tqdm(
        total=len(images) * len(captions), unit="pair", unit_scale=True, desc="scoring", mininterval=1.0, disable=None
    ) as bar:
        scores = score_matrix(
            model,
            image_examples(store, images, config.max_regions),
            caption_ids(store, captions, tokenizer, config.max_tokens),
            store.feature_dim,
            device,
            config.batch_pairs,
            bar.update,
        )
    result = {
        "task": "retrieval",
        "protocol": "zero-shot" if config.zero_shot else "matching head as loaded",
        "images": len(images),
        "captions": len(captions),
        "chance_R@1": 100.0 / len(images),
        "metrics": retrieval_metrics(scores, np.searchsorted(images, store.caption_image[captions])),
        "checkpoint": {
            "path": str(source.path),
            "format": source.kind,
            "iteration": source.facts.get("iteration"),
            "weights_sha256": source.facts.get("files"),
        },
        "data": {
            "path": config.data_path,
            "manifest_sha256": file_sha256(store.path / MANIFEST),
            "detector": store.manifest["detector"],
            "generated": bool(store.manifest.get("generated")),
        },
        "ties": "a wrong candidate with an equal score ranks before the right one",
        "language": config.language or "all",
    }
    run = source.path.parent if source.kind == "checkpoint" or source.path.is_file() else source.path  # not into a checkpoint
    output = Path(config.output) if config.output else run / "evaluation" / "retrieval"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "result.json", result)
    photos = Path(config.image_folder) if config.image_folder else None
    write_text(output / "result.html", result_page(result, scores, store, captions, images, photos))
    print_table(result, output)
    return result


def print_table(result: dict[str, Any], output: Path) -> None:
    """The result for people."""
    origin = " (generated scenes)" if result["data"]["generated"] else ""
    print(f"{result['protocol']} retrieval, {result['captions']} captions x {result['images']} images{origin}")
    print(f"{'direction':<16}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>14}")
    for direction, m in result["metrics"].items():
        print(f"{direction.replace('_', ' '):<16}{m['R@1']:>8.1f}{m['R@5']:>8.1f}{m['R@10']:>8.1f}{m['median_rank']:>14.1f}")
    chance = result["chance_R@1"]
    print(f"{'chance, to image':<16}{chance:>8.1f}{5 * chance:>8.1f}{10 * chance:>8.1f}{(result['images'] + 1) / 2:>14.1f}")
    print(f"text to image R@1 is {result['metrics']['text_to_image']['R@1'] / chance:.1f} times chance")
    print(f"result: {output / 'result.json'}\npage:   {output / 'result.html'}")


def run() -> None:
    """`evaluate TASK FLAGS`."""
    task, *rest = sys.argv[1:] or [""]
    if task in ("-h", "--help"):
        rest = ["--help"]
    elif task not in TASKS:
        raise UsageError(
            f"evaluate: task '{task}', expected one of {', '.join(TASKS)}: evaluate retrieval --load DIR --data-path STORE"
        )
    evaluate_retrieval(parse(EvaluateConfig, "Evaluate a checkpoint: retrieval over all pairs of a store.", rest))


def main() -> None:
    """Entry point: one-line errors, exit code 2 for wrong use."""
    run_entry(run)


if __name__ == "__main__":
    main()
