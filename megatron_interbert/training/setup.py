"""From a configuration to a Trainer: data, model, first weights, engine, checkpoint."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import AUTO
from megatron_interbert.config.training import RunConfig, TrainConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.order import check_partitions
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.files import file_sha256, is_there
from megatron_interbert.kernels.choice import Kernels, choose_kernels
from megatron_interbert.machines.host import same_bits_every_time
from megatron_interbert.machines.processes import describe_launch, start_processes
from megatron_interbert.machines.watchdog import Watchdog
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBert
from megatron_interbert.parallel.agreement import check_alike, together
from megatron_interbert.parallel.launch import read_launch
from megatron_interbert.parallel.rng import RandomStreams
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    validation_digest,
    verify_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.precision import choose_precision
from megatron_interbert.tasks.pretraining import PretrainingTask
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.checkpoint import Checkpoints, Judge, Progress
from megatron_interbert.training.deepspeed_config import agree_with_json, merge
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.evaluation import DownstreamEvaluation, Evaluation, LossEvaluation
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.training.loop import Trainer
from megatron_interbert.training.micro_batch import Trial, choose_micro_batch, still_fits
from megatron_interbert.training.resume import (
    find_checkpoint,
    keep_fitted,
    resumed_batch,
    resumed_micro_batch,
)
from megatron_interbert.training.run_facts import facts_of_run
from megatron_interbert.training.run_folder import Claim, claim_folder
from megatron_interbert.training.stopping import Stopping


def pretraining_job(config: RunConfig, state: ParallelState) -> Job:
    """Pretraining on the region stores of --data-path."""
    corpus = open_stores(config.stores(), config)
    tokenizer = vocabulary_of_run(config, config.stores())
    sizes = fitted_sizes(config, tokenizer, corpus)
    samples, valid = PretrainingSet(corpus, tokenizer, config), None
    if config.valid_data_path:
        valid_corpus = open_stores([config.valid_data_path], config)
        corpus.check_alike(valid_corpus.stores[0], config.allow_other_detector, "--valid-data-path")
        valid = PretrainingSet(valid_corpus, tokenizer, config_of_validation(config))
    task = PretrainingTask(config.objective_names())
    data = describe_data(tokenizer, corpus)
    data["mined"] = mined_negatives(corpus) if config.hard_negatives and samples.has_hard_negatives else []
    return Job(task, samples, sizes, PRETRAINING_HEADS, data, tokenizer.vocab_file, valid_samples=valid)


def mined_negatives(corpus: Corpus) -> list[str]:
    """Give the hashes of the tables of mined negatives, on which the samples depend."""
    tables = [store.path / HARD_NEGATIVES for store in corpus.stores]
    return [file_sha256(path) for path in tables if path.is_file()]


def config_of_validation(config: RunConfig) -> RunConfig:
    """The same settings for one other store, which has partitions of its own."""
    own = copy.copy(config)
    own.data_epochs = own.data_weights = ""
    own.given = config.given - {"data_partitions"}
    own.origins = {name: of for name, of in config.origins.items() if name != "data_partitions"}
    own.notes = []
    return own


def prepare(config: TrainConfig, make_job: Callable[[Any, ParallelState], Job] = pretraining_job) -> Trainer:
    """Everything a run needs, checked in the order in which it is cheap to fail."""
    config.check()
    agree_with_json(config)
    if config.deterministic:
        same_bits_every_time()
    device = start_processes()
    state = ParallelState(config.tensor_model_parallel_size, config.sequence_parallel)
    if config.print_launch:
        text = describe_launch(read_launch(), state, device)
        if state.is_main:
            print(text, flush=True)
        raise SystemExit
    watchdog, stopping = Watchdog(state, config.hang_timeout), Stopping(config, state)
    config.data_parallel_size = state.data_size
    config.fit_zero_stage(state.world_size)
    keep_fitted(config, state)
    job = together(state, lambda: make_job(config, state))
    begun = state.gather(together(state, lambda: is_there(Path(config.save))))[0]
    claim = claim_folder(config.save, state) if begun else Claim()
    resume = find_checkpoint(config, state, claim.locked)
    integrity = verify_stores(config, state)
    check_partitions(config.told("data_partitions"), config.data_partitions, state.data_size)
    job.model_config.check_tensor_parallel(state.tensor_size)
    config.check_float8(job.model_config)
    kernels, streams, make_model = parts_of_model(config, job, state, device)
    parts = {"state": state, "kernels": kernels, **job.model_options}

    if config.micro_batch_size == AUTO:
        check_alike(state, facts_of_run(config, job))  # before ranks that differ wait for one another in a trial
        settle_micro_batch(Trial(config, job, state, device, kernels), make_model, resume, watchdog)
    merge(config, state.data_size, resumed_batch(resume))
    if job.valid_samples is not None:
        job.valid_samples.config.micro_batch_size = config.micro_batch_size  # a DeepSpeed JSON may have said it
    settle_length(config, job)
    check_alike(state, facts_of_run(config, job))
    model = make_model()
    pretrained = set()
    if config.init_from:  # also on resume: which weights came from BERT decides the parameter groups
        pretrained = load_initial_weights(model, job.model_config, config.init_from, state, job.data, config.allow_other_detector)
    engine = Engine(model.to(device), config, state, pretrained)
    if not begun:  # not before everything else has been found right: wrong use leaves nothing behind
        claim = claim_folder(config.save, state)
    digest = together(state, lambda: validation_digest(config) if job.metric else "")
    judge = Judge(job.metric, state.gather(digest)[0])
    checkpoints = Checkpoints(config, job.model_config, state, job.data, job.vocabulary, claim, judge)
    progress = checkpoints.load(engine, resume) if resume else Progress()
    if state.is_main:
        print(*config.notes, sep="\n", end="\n" * bool(config.notes))
        print(describe_run(config, job.model_config, model, state, engine, kernels.describe(), resume), flush=True)
    return Trainer(
        engine,
        job.task,
        config,
        job.model_config,
        batches=batches(job.samples, progress.consumed_samples, config.global_batch_size, state, device),
        evaluation=make_evaluation(config, job, parts, state, device),
        patience=job.patience,
        state=state,
        streams=streams,
        device=device,
        checkpoints=checkpoints,
        progress=progress,
        stopping=stopping,
        watchdog=watchdog,
        integrity=integrity,
    )


def parts_of_model(
    config: TrainConfig, job: Job, state: ParallelState, device: torch.device
) -> tuple[Kernels, RandomStreams, Callable[[], InterBert]]:
    """(The kernels of a run, its streams of random numbers, what makes its model with first weights)."""
    sizes = job.model_config
    dropout = max(sizes.attention_dropout, sizes.image_attention_dropout) > 0
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32
    kernels = choose_kernels(
        config.kernels,
        device,
        dropout,
        config.deterministic,
        config.fp8,
        sizes.head_sizes,
        dtype,
    )
    streams = RandomStreams(
        config.seed,
        state.data_rank,
        state.tensor_rank,
        device,
        alone=state.tensor_size == 1,
    )

    def make_model() -> InterBert:
        model = InterBert(
            sizes,
            job.heads,
            state=state,
            kernels=kernels,
            streams=streams,
            recompute=config.recompute_activations,
            **job.model_options,
        )
        initialise(model, sizes, config.seed, state)
        return model

    return kernels, streams, make_model


def say(state: ParallelState, line: str) -> None:
    """A line of rank 0."""
    if state.is_main:
        print(line, flush=True)


def make_evaluation(
    config: TrainConfig, job: Job, parts: dict[str, Any], state: ParallelState, device: torch.device
) -> Evaluation | None:
    """Losses on unseen samples, or the figures of a downstream task by a model of its own made of `parts`; None where there is neither."""
    if job.valid_samples is not None:
        stream = functools.partial(batches, job.valid_samples, 0, config.global_batch_size, state, device, workers=0)
        return LossEvaluation(job.task, stream, config.eval_iters, state, device)
    if job.evaluate is None:
        return None
    parts = {**parts, "state": state.with_replicated_rows()}  # evaluations go through layers one by one
    precision = choose_precision(config.eval_precision, device)
    say(state, f"evaluations: {precision}")
    return DownstreamEvaluation(InterBert(job.model_config, job.heads, **parts), job.evaluate, state, device, precision)


def settle_micro_batch(trial: Trial, make_model: Callable[[], InterBert], resume: Path | None, watchdog: Watchdog) -> None:
    """What the run before chose, as long as it fits, else by trial."""
    config, state = trial.config, trial.state
    global_batch = config.global_batch_size or resumed_batch(resume)
    before = resumed_micro_batch(resume, global_batch // state.data_size)
    if before and still_fits(trial, before):
        config.micro_batch_size = before
        say(state, f"micro-batch size {before}, as the run before chose; --micro-batch-size N changes it")
        return
    if before:
        say(state, f"micro-batch size {before}, which the run before chose, does not fit here")
    config.micro_batch_size = choose_micro_batch(trial, make_model, global_batch, lambda: watchdog.enter("start", 0))
    watchdog.enter("start", 0)


def settle_length(config: TrainConfig, job: Job) -> None:
    """Steps from --epochs, and an evaluation at the end of each, where nothing else is said."""
    epoch = job.samples.order.epoch_length / config.global_batch_size
    if not config.train_iters:
        config.train_iters = max(1, round(config.epochs * epoch))
    if job.evaluate is not None and not config.eval_interval:
        config.eval_interval = max(1, round(epoch))


def batches(
    samples: TrainingSet, consumed: int, global_batch: int, state: ParallelState, device: torch.device, workers: int | None = None
) -> Iterator[PackedBatch]:
    """This rank's endless micro-batches after `consumed` samples."""
    pin = device.type == "cuda"
    return iter(BatchStream(samples, consumed, global_batch, state.data_rank, state.data_size, pin_memory=pin, workers=workers))


def describe_run(
    config: TrainConfig,
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
    name = config.model or f"of {config.init_from}"
    start = f"resumed from {resume}" if resume else "starting anew"
    if not config.save:
        start += "; no --save: nothing will be kept"
    shared = " with sequence parallelism" if state.placement.shared else ""
    if config.sequence_parallel and not shared:
        shared = " (--sequence-parallel has nothing to share)"
    ranks = f"{state.world_size} rank{'s' * (state.world_size > 1)}"
    lines = [
        f"model {name}: {parameters / 1e6:.1f} M parameters, hidden {sizes.hidden_size}, layers {sizes.interaction_layers} +"
        f" {sizes.text_layers} + {sizes.image_layers}, vocabulary {sizes.vocab_size}, features {sizes.feature_dim},"
        f" classes {sizes.num_classes}",
        f"layout: DP{state.data_size} x TP{state.tensor_size}{shared} ({ranks}, {dist.get_backend()}),"
        f" ZeRO-{config.zero_stage}, {engine.precision}",
        f"batch: {config.global_batch_size} = micro {config.micro_batch_size} x DP {state.data_size} x accumulation {engine.accumulation}",
        f"kernels: {kernels}",
        start,
    ]
    return "\n".join(lines)
