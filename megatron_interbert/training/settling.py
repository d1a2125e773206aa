"""Settle the settings of a run that follow from its data, its ranks and its checkpoint."""

from pathlib import Path

import torch

from megatron_interbert.config.options import AUTO
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.machines.host import give_back_memory
from megatron_interbert.parallel.agreement import check_alike
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.deepspeed_config import merge
from megatron_interbert.training.micro_batch import Trial, choose_micro_batch, still_fits
from megatron_interbert.training.model_plan import TRIED_LAYERS, ModelPlan
from megatron_interbert.training.resume import resumed_batch, resumed_micro_batch
from megatron_interbert.training.run import Run
from megatron_interbert.training.run_facts import facts_of_run


def settle(run: Run, job: Job, plan: ModelPlan, resume: Path | None) -> None:
    """Settle batch sizes, length and intervals alike on all ranks, and freeze the configuration.

    Raises UsageError if settings contradict each other or ranks differ.
    """
    config = run.config
    state = run.state
    if config.micro_batch_size == AUTO:
        check_alike(state, facts_of_run(config, job))  # ranks that differ would hang in a trial
        settle_micro_batch(run, job, plan, resume)

    merge(config, state.data_size, resumed_batch(resume))
    settle_length(config, job)
    check_alike(state, facts_of_run(config, job))

    config.freeze()
    if job.valid_samples is not None:
        own = job.valid_samples.config
        own.settle("micro_batch_size", config.micro_batch_size, "the run")
        own.freeze()


def settle_micro_batch(run: Run, job: Job, plan: ModelPlan, resume: Path | None) -> None:
    """Reuse the micro-batch size of the resumed run if it still fits, else find one by trial."""
    config = run.config
    state = run.state
    trial = Trial(config, job, state, run.device, plan.kernels)
    global_batch = config.global_batch_size or resumed_batch(resume)
    before = resumed_micro_batch(resume, global_batch // state.data_size)
    if before % config.micro_batch_multiple:
        before = 0

    if before and still_fits(trial, before):
        config.settle("micro_batch_size", before, str(resume))
        run.say(
            f"micro-batch size {before}, as the previous run chose; --micro-batch-size N changes it"
        )
        return

    if before:
        run.say(f"micro-batch size {before}, which the previous run chose, does not fit here")

    tried = plan
    if config.zero_stage == 3 and state.data_size > 1:
        tried = plan.shallow()
        run.say(f"trials take at most {TRIED_LAYERS} layers of each stack: no rank holds all")

    found = choose_micro_batch(
        trial,
        lambda: tried.filled(run.streams, run.device, trial.dtype),
        global_batch,
        lambda: run.watchdog.enter("start", 0),
    )
    config.settle("micro_batch_size", found, "a trial")
    give_back_memory()  # of the trials: what is free is measured next
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    run.watchdog.enter("start", 0)


def settle_length(config: TrainConfig, job: Job) -> None:
    """Turn --epochs into steps; evaluate after each epoch, unless --eval-interval is given."""
    epoch = job.samples.order.epoch_length / config.global_batch_size
    if not config.train_iters:
        config.settle("train_iters", max(1, round(config.epochs * epoch)), "--epochs")
    if job.evaluate is not None and not config.eval_interval:
        config.settle("eval_interval", max(1, round(epoch)), "an epoch")
