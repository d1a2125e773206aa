"""Build a Trainer from a configuration: ranks, data, settings, model, checkpoint."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.data.integrity import Integrity
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.order import check_partitions
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.training_set import TrainingSet
from megatron_interbert.machines.host import give_back_memory
from megatron_interbert.model.initialise import FirstWeights
from megatron_interbert.model.partition import full_shape, place_of
from megatron_interbert.parallel.agreement import together
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.reading import is_there
from megatron_interbert.tasks.parts import validation_digest, verify_stores
from megatron_interbert.tasks.precision import choose_precision
from megatron_interbert.tasks.pretraining.job import pretraining_job
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.checkpoint import Checkpoints, Judge, Progress
from megatron_interbert.training.deepspeed_config import described_offload
from megatron_interbert.training.engine import Engine, engine_settings
from megatron_interbert.training.evaluation import DownstreamEvaluation, Evaluation, LossEvaluation
from megatron_interbert.training.evaluation_copy import copy_for_evaluation
from megatron_interbert.training.first_weights import InitialWeights, open_initial_weights
from megatron_interbert.training.loop import Trainer
from megatron_interbert.training.micro_batch import Trial
from megatron_interbert.training.model_plan import ModelPlan, build_engine, plan_model
from megatron_interbert.training.optimizer import elements
from megatron_interbert.training.resume import find_checkpoint, keep_fitted
from megatron_interbert.training.room import check_memory
from megatron_interbert.training.run import Run, meet
from megatron_interbert.training.run_folder import Claim, claim_folder
from megatron_interbert.training.settling import settle
from megatron_interbert.training.swap import prepare_swap
from megatron_interbert.weights.manifest import read_manifest

MakeJob = Callable[[Any, ParallelState], Job]


@dataclass
class Start:
    """Hold what a run starts from: its claim on --save, the checkpoint to resume from, and the
    running check of its stores.
    """

    # None: --save does not exist yet, and is made as late as possible
    claim: Claim | None
    resume: Path | None
    integrity: Integrity


def prepare(config: TrainConfig, make_job: MakeJob = pretraining_job) -> Trainer:
    """Put a run together; what is cheap to check is checked first."""
    run = meet(config)
    job, start = open_data(run, make_job)
    plan = plan_model(config, job, run.state, run.device)
    settle(run, job, plan, start.resume)
    if isinstance(config, RunConfig):
        config.check_routing_groups()
    check_memory(Trial(config, job, run.state, run.device, plan.kernels))
    # before the model exists: loader processes are forks, which would keep its memory alive
    stream = open_stream(run, job, start.resume)
    engine = start_engine(run, job, plan, start.resume)

    return begin(run, job, plan, engine, start, stream)


def open_data(run: Run, make_job: MakeJob) -> tuple[Job, Start]:
    """Open the data and find the checkpoint to resume from; call it on all ranks."""
    config = run.config
    state = run.state
    keep_fitted(config, state)
    job = together(state, lambda: make_job(config, state))

    begun = state.gather(together(state, lambda: is_there(Path(config.save))))[0]
    claim = claim_folder(config.save, state) if begun else None
    resume = find_checkpoint(config, state, claim is not None and claim.locked)
    integrity = verify_stores(config, state)
    check_partitions(config.told("data_partitions"), config.data_partitions, state.data_size)

    return job, Start(claim, resume, integrity)


def open_stream(run: Run, job: Job, resume: Path | None) -> Iterator[PackedBatch]:
    """Open the stream of micro-batches to train on, and start its loader processes."""
    consumed = read_manifest(resume)["consumed_samples"] if resume else 0
    return batches(job.samples, consumed, run.config.global_batch_size, run.state, run.device)


def start_engine(run: Run, job: Job, plan: ModelPlan, resume: Path | None = None) -> Engine:
    """Build the engine with the weights to start from; a run that resumes reads its own later."""
    config = run.config
    state = run.state
    names = plan.without_memory()
    weights: FirstWeights | InitialWeights = plan.first_weights

    if config.init_from:  # also on resume: parameter groups depend on what came from BERT
        weights = open_initial_weights(
            names,
            plan.first_weights,
            config.init_from,
            state,
            job.data,
            config.allow_other_detector,
        )

    settings = engine_settings(config, state, names)
    count = elements(names.parameters())
    settings = together(state, lambda: prepare_swap(settings, count, state.data_size))
    engine = build_engine(
        plan, config, run.streams, run.device, weights, settings, fill=resume is None
    )
    give_back_memory()

    return engine


def begin(
    run: Run,
    job: Job,
    plan: ModelPlan,
    engine: Engine,
    start: Start,
    stream: Iterator[PackedBatch],
) -> Trainer:
    """Claim the folder, load the checkpoint, describe the run, and return the Trainer."""
    config = run.config
    state = run.state
    claim = start.claim or claim_folder(config.save, state)  # only once all checks have passed
    judged_by = job.valid_configs or [config]
    digest = together(state, lambda: validation_digest(judged_by) if job.metric else "")
    judge = Judge(job.metric, state.gather(digest)[0])
    checkpoints = Checkpoints(
        config, job.model_config, state, job.data, job.vocabulary, claim, judge
    )
    progress = checkpoints.load(engine, start.resume) if start.resume else Progress()
    if job.note_evaluation:
        for step, values in progress.evaluations:
            job.note_evaluation(step, values)

    run.say(*config.notes)
    run.say(*describe_run(run, job, plan, engine, start.resume))

    return Trainer(
        run,
        job,
        engine,
        batches=stream,
        evaluation=make_evaluation(run, job, plan, engine),
        checkpoints=checkpoints,
        progress=progress,
        integrity=start.integrity,
    )


def make_evaluation(run: Run, job: Job, plan: ModelPlan, engine: Engine) -> Evaluation | None:
    """Build the evaluation: losses on unseen samples, or a downstream task's metrics; or None."""
    config = run.config
    state = run.state
    device = run.device

    if job.valid_samples is not None:
        batch = config.global_batch_size
        stream = functools.partial(batches, job.valid_samples, 0, batch, state, device, workers=0)
        return LossEvaluation(job.task, stream, config.eval_iters, state, device)

    if job.evaluate is None:
        return None

    precision = choose_precision(config.eval_precision, device)
    run.say(f"evaluations: {precision}")

    model = precision.convert(plan.for_evaluation())
    copy = copy_for_evaluation(model, engine, device)

    return DownstreamEvaluation(copy, job.evaluate, device, precision)


def batches(
    samples: TrainingSet,
    consumed: int,
    global_batch: int,
    state: ParallelState,
    device: torch.device,
    workers: int | None = None,
) -> Iterator[PackedBatch]:
    """Iterate over this rank's endless micro-batches, from after `consumed` samples on."""
    return iter(
        BatchStream(
            samples,
            consumed,
            global_batch,
            state.data_rank,
            state.data_size,
            pin_memory=device.type == "cuda",
            workers=workers,
        )
    )


def describe_run(
    run: Run, job: Job, plan: ModelPlan, engine: Engine, resume: Path | None
) -> list[str]:
    """Build the lines that are printed once at the start."""
    config = run.config
    state = run.state
    sizes = job.model_config
    name = config.model or f"of {config.init_from}"
    start = f"resumed from {resume}" if resume else "starting anew"
    if not config.save:
        start += "; no --save: nothing will be kept"

    shared = " with sequence parallelism" if state.placement.shared else ""
    if config.sequence_parallel and not shared:
        shared = " (--sequence-parallel has nothing to share)"

    divided = f", EP{state.expert_size}" if sizes.experts else ""
    ranks = f"{state.world_size} rank{'s' * (state.world_size > 1)}"

    return [
        (
            f"model {name}: {count_parameters(engine, state) / 1e6:.1f} M parameters, hidden"
            f" {sizes.hidden_size}, layers {sizes.interaction_layers} + {sizes.text_layers} +"
            f" {sizes.image_layers}{described_experts(sizes)}, vocabulary {sizes.vocab_size},"
            f" features {sizes.feature_dim}, classes {sizes.num_classes}"
        ),
        (
            f"layout: DP{state.data_size} x TP{state.tensor_size}{shared}{divided}"
            f" ({ranks}, {dist.get_backend()}), ZeRO-{config.zero_stage}"
            f"{described_offload(engine.deepspeed_config)}, {engine.precision}"
        ),
        (
            f"batch: {config.global_batch_size} = micro {config.micro_batch_size} x"
            f" DP {state.data_size} x accumulation {engine.accumulation}"
        ),
        f"kernels: {plan.kernels.describe()}",
        start,
    ]


def count_parameters(engine: Engine, state: ParallelState) -> int:
    """Count the parameters of the whole model, over all its shards."""
    total = 0
    for name, parameter in engine.model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        total += math.prod(full_shape(name, shape, place_of(name, state)[1]))

    return total


def described_experts(sizes: ModelConfig) -> str:
    """Return the experts of a model and how its layers are shared, as an addition to a line."""
    said = ""
    if sizes.experts:
        said = f" of {sizes.described_experts()}"
    if sizes.share_layers:
        said += ", shared within each stack"

    return said
