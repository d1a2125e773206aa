"""From a configuration to a Trainer: data, model, first weights, engine, checkpoint."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.config import ModelConfig, RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.manifest import MANIFEST, VOCABULARY, file_sha256
from megatron_interbert.data.order import check_partitions
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.kernels.choice import choose_kernels
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.model.presets import fit_to_data, load_model_config
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining import PretrainingTask
from megatron_interbert.training.checkpoint import Checkpoints, Progress
from megatron_interbert.training.deepspeed_config import merge
from megatron_interbert.training.engine import Engine, start_processes
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.training.loop import Trainer
from megatron_interbert.training.resume import claim_folder, find_checkpoint, resumed_batch


def open_data(config: RunConfig, paths: str = "") -> tuple[Corpus, CaptionTokenizer]:
    """The stores and the vocabulary of a run; UsageError for what is missing."""
    stores = config.stores()
    corpus = Corpus([p for p in paths.split(",") if p] or stores, config.strict_boxes, config.allow_other_detector)
    return corpus, CaptionTokenizer(config.vocab_file or str(Path(stores[0]) / VOCABULARY))


def model_config_for(config: RunConfig, corpus: Corpus, tokenizer: CaptionTokenizer) -> ModelConfig:
    """The model's sizes, with those that come from the data filled in and checked."""
    model_config = fit_to_data(
        load_model_config(config.model),
        tokenizer.vocab_size,
        corpus.feature_dim,
        corpus.num_classes,
        f"{corpus.path} with {tokenizer.vocab_file}",
    )
    if config.max_tokens > model_config.max_position_embeddings:
        raise UsageError(
            f"--max-tokens {config.max_tokens} is more than the model's {model_config.max_position_embeddings} positions"
        )
    return model_config if config.dropout else model_config.without_dropout()


def prepare(config: RunConfig) -> Trainer:
    """Everything a run needs, checked in the order in which it is cheap to fail."""
    device = start_processes()
    config.check()
    state = ParallelState(config.tensor_model_parallel_size)
    corpus, tokenizer = open_data(config)
    model_config = model_config_for(config, corpus, tokenizer)
    begun = state.gather(Path(config.save).exists())[0]
    lock = claim_folder(config.save, state) if begun else None
    resume = find_checkpoint(config, state)
    merge(config, state.data_size, resumed_batch(resume))
    check_partitions(config.data_partitions, state.data_size)
    model_config.check_tensor_parallel(state.tensor_size)
    attention_dropout = max(model_config.attention_dropout, model_config.image_attention_dropout) > 0
    kernels = choose_kernels(config.kernels, device, attention_dropout)
    dataset = PretrainingSet(corpus, tokenizer, config)
    evaluation = None
    if config.valid_data_path:
        valid_corpus, _ = open_data(config, config.valid_data_path)
        corpus.check_alike(valid_corpus.stores[0], config.allow_other_detector, "--valid-data-path")
        one_each = dataclasses.replace(config, data_epochs="", data_weights="")
        one_each.given = config.given
        valid = PretrainingSet(valid_corpus, tokenizer, one_each)
        evaluation = lambda: batches(valid, 0, state, device, workers=0)  # noqa: E731

    streams = RandomStreams(config.seed, state.data_rank, state.tensor_rank, device)
    model = InterBert(
        model_config, PRETRAINING_HEADS, state=state, kernels=kernels, streams=streams, recompute=config.recompute_activations
    )
    initialise(model, model_config, config.seed, state)
    data = describe_data(corpus, tokenizer)
    pretrained = set()
    if config.init_from:  # also on resume: which weights came from BERT decides the parameter groups
        pretrained = load_initial_weights(model, model_config, config.init_from, state, data, config.allow_other_detector)
    engine = Engine(model.to(device), config, state, pretrained)
    if not begun:  # not before everything else has been found right: wrong use leaves nothing behind
        lock = claim_folder(config.save, state)
    checkpoints = Checkpoints(config, model_config, state, data, tokenizer.vocab_file, lock)
    progress = checkpoints.load(engine, resume) if resume else Progress()
    if state.is_main:
        print(describe_run(config, model_config, model, state, engine, kernels.describe(), resume), flush=True)
    return Trainer(
        engine,
        PretrainingTask(config.objective_names(), state.tensor_group),
        config,
        model_config,
        batches=batches(dataset, progress.consumed_samples, state, device),
        evaluation=evaluation,
        state=state,
        streams=streams,
        device=device,
        checkpoints=checkpoints,
        progress=progress,
    )


def batches(
    dataset: PretrainingSet, consumed: int, state: ParallelState, device: torch.device, workers: int | None = None
) -> Iterator[PackedBatch]:
    """This rank's endless micro-batches after `consumed` samples."""
    return iter(
        BatchStream(
            dataset,
            consumed,
            dataset.config.global_batch_size,
            state.data_rank,
            state.data_size,
            pin_memory=device.type == "cuda",
            workers=workers,
        )
    )


def describe_data(corpus: Corpus, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """What a checkpoint remembers of its data."""
    manifests = [file_sha256(store.path / MANIFEST) for store in corpus.stores]
    return {
        "store": corpus.path,
        "manifest_sha256": manifests[0] if len(manifests) == 1 else hashlib.sha256("".join(manifests).encode()).hexdigest(),
        "detector": corpus.stores[0].manifest["detector"],
        "vocabulary": tokenizer.sha256,
    }


def describe_run(
    config: RunConfig,
    sizes: ModelConfig,
    model: InterBert,
    state: ParallelState,
    engine: Engine,
    kernels: str,
    resume: Path | None,
) -> str:
    """The lines printed once at start."""
    parameters = sum(
        getattr(p, "ds_numel", p.numel()) * (state.tensor_size if hasattr(p, "tensor_model_parallel") else 1)
        for p in model.parameters()
    )
    start = f"resumed from {resume}" if resume else "starting anew"
    if not config.save:
        start += "; no --save: nothing will be kept"
    lines = [
        f"model {config.model}: {parameters / 1e6:.1f} M parameters, hidden {sizes.hidden_size}, layers {sizes.interaction_layers} +"
        f" {sizes.text_layers} + {sizes.image_layers}, vocabulary {sizes.vocab_size}, features {sizes.feature_dim},"
        f" classes {sizes.num_classes}",
        f"layout: DP{state.data_size} x TP{state.tensor_size} ({state.world_size} ranks, {dist.get_backend()}), ZeRO-{config.zero_stage},"
        f" {engine.precision}",
        f"batch: {config.global_batch_size} = micro {config.micro_batch_size} x DP {state.data_size} x accumulation {engine.accumulation}",
        f"kernels: {kernels}",
        start,
    ]
    return "\n".join(lines)
