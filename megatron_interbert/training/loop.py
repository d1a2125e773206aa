"""Run the training loop: load a step's micro-batches, count their targets, run the forward and
backward passes, update, vote, log, evaluate, save.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator

import torch

from megatron_interbert.data.integrity import Integrity
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import StoppedBySignal, TrainingStopped
from megatron_interbert.model.flops import training_flops
from megatron_interbert.tasks.task import Job
from megatron_interbert.training.checkpoint import Checkpoints, Progress
from megatron_interbert.training.engine import Engine
from megatron_interbert.training.evaluation import Evaluation
from megatron_interbert.training.fragments import FragmentedState
from megatron_interbert.training.metrics import MetricsWriter, memory_gib
from megatron_interbert.training.optimizer import learning_rate
from megatron_interbert.training.peaks import peak_tflops
from megatron_interbert.training.routing_health import RoutingHealth
from megatron_interbert.training.run import Run

SECONDS_TO_VERIFY = 10.0  # that a run waits at its end for hashing to finish


class Trainer:
    """Train the model of `engine` on a job, from an endless stream of micro-batches."""

    def __init__(
        self,
        run: Run,
        job: Job,
        engine: Engine,
        *,
        batches: Iterator[PackedBatch],
        evaluation: Evaluation | None,
        checkpoints: Checkpoints,
        progress: Progress,
        integrity: Integrity,
    ) -> None:
        self.config = run.config
        self.state = run.state
        self.device = run.device
        self.streams = run.streams
        self.watchdog = run.watchdog
        self.stopping = run.stopping
        self.job = job
        self.task = job.task
        self.engine = engine
        self.batches = batches
        self.evaluation = evaluation
        self.integrity = integrity
        self.checkpoints = checkpoints
        self.progress = progress

        text_only = bool(job.model_options.get("text_only"))
        self.routing = RoutingHealth(self.config, job.model_config, self.state, text_only)
        self.peak = peak_tflops(self.device, self.config.peak_tflops)
        self.bad_steps = 0
        self.save_is_owed = False  # a save was due while steps were bad
        self.writer = MetricsWriter(
            self.config.save,
            self.config.tensorboard_dir,
            self.state.is_main,
            self.config.train_iters,
            progress.step,
        )
        self._start_window()

    def train(self) -> None:
        """Train to --train-iters, or until all ranks agree to stop; save and evaluate on the way.

        Raises StoppedBySignal after a signal, once everything is saved, and TrainingStopped if the
        run cannot continue, for example because data on disk have changed.
        """
        try:
            self.run_steps()
            self.integrity.wait(SECONDS_TO_VERIFY)  # small stores, at least, are checked whole
            self.stopping.agree_on(self.problem)
            self.checkpoints.wait()
        except BaseException:
            # Whatever ends the run must not cost it its newest checkpoint.
            with contextlib.suppress(TrainingStopped):
                self.checkpoints.wait(allowed=1)
            raise
        finally:
            self.pass_on_messages()
            self.say_how_to_resume()
            self.writer.close()

        self.watchdog.close()
        if self.stopping.interrupted:  # Ctrl-C should also end what follows in a script
            raise StoppedBySignal(signal.SIGINT, saved=bool(self.config.save))
        if self.stopping.signal_number and not self.complete:
            raise StoppedBySignal(self.stopping.signal_number, saved=bool(self.config.save))

    @property
    def complete(self) -> bool:
        """Check whether the run is done: all its steps, or stopped early."""
        return self.progress.step >= self.config.train_iters or self.out_of_patience()

    @property
    def problem(self) -> str:
        """Return why this rank asks to end the run, for reasons outside the steps themselves, else
        an empty string.
        """
        if self.integrity.problem:
            return (
                f"{self.integrity.problem}. What this run has trained on is unknown, so it saves no"
                " more checkpoints; the earlier ones are intact"
            )

        return self.checkpoints.hopeless

    def run_steps(self) -> None:
        """Train step by step until the run is complete or all ranks agree to stop."""
        self.pass_on_messages()
        self.make_up_for_evaluation()

        if self.complete:
            step = self.progress.step
            last = self.config.train_iters
            self.writer.say(f"already at step {step} of {last}: nothing to train")
            # the source may be a backup (--load) that goes away
            if self.checkpoints.came_from_elsewhere:
                self.save(last=True)

        ended = self.complete
        while not ended:
            self.train_step()
            step = self.progress.step
            self.writer.advance()
            self.integrity.start()  # only after the loader processes have been forked

            self.progress.owes_evaluation |= self.evaluation_is_due(step)
            ended = bool(self.stopping.agreed(step, self.problem)) or self.complete
            if step % self.config.log_interval == 0 or ended:
                self.log()

            pause = time.monotonic()
            best = self.evaluation_is_possible() and self.evaluate()
            if self.out_of_patience():
                self.say_out_of_patience()

            ended = ended or bool(self.stopping.reason) or self.complete  # by the evaluation
            if best or ended or self.save_is_due(step):
                self.save(last=ended)

            self.window_started += time.monotonic() - pause  # rates exclude evaluating and saving
            self.pass_on_messages()

    def save_is_due(self, step: int) -> bool:
        """Check whether a checkpoint is due after this step, by --save-interval or the clock."""
        interval = self.config.save_interval
        # checkpoints to be kept for good must be written in the first place
        if self.config.minutes_between_saves():
            interval = interval or self.config.keep_every

        by_steps = self.save_is_owed or bool(interval and step % interval == 0)

        return by_steps or self.stopping.save_is_due

    def save(self, last: bool) -> None:
        """Begin a checkpoint of this step if --save is given; postpone it while steps are bad.

        `last`: the run ends with it.
        """
        if not self.config.save:
            return

        if self.bad_steps and not (last and self.bad_step_may_be_saved()):
            self.save_is_owed = True
            if last:
                self.give_up_last_save()
            return

        self.watchdog.enter("save", self.progress.step)
        self.checkpoints.save(
            self.engine, self.progress, prune=not self.bad_steps, alive=self.watchdog.beat
        )
        self.stopping.saved()
        self.save_is_owed = False

    def bad_step_may_be_saved(self) -> bool:
        """Check whether a run may end with a checkpoint of a bad step.

        It may with fp16, where an overflow is part of finding the loss scale, and if it is the
        run's first checkpoint, which replaces no better one.
        """
        return self.engine.precision == "fp16" or self.checkpoints.newest is None

    def give_up_last_save(self) -> None:
        """Report that the run ends without a last checkpoint; TrainingStopped if it is complete."""
        text = (
            f"step {self.progress.step}: the gradient was not finite for the last {self.bad_steps}"
            f" steps: nothing is saved, the newest checkpoint is {self.checkpoints.newest}"
        )

        if self.complete:
            raise TrainingStopped(
                f"{text}; lower --lr, look at the data of these steps, or end before them"
                " (--train-iters)"
            )

        self.writer.say(text)

    def make_up_for_evaluation(self) -> None:
        """Run the evaluation that the resumed run had no time for: which checkpoint is best and
        when to stop early must not depend on interruptions.
        """
        if self.progress.owes_evaluation and self.evaluation and self.evaluate():
            self.checkpoints.point_to_best(self.progress)

    def say_out_of_patience(self) -> None:
        """Report that the run stops early (--early-stopping)."""
        step = self.progress.step
        stale = self.progress.stale
        metric = self.checkpoints.judge.metric
        self.writer.say(f"step {step}: {stale} evaluations without a better {metric}: the run ends")

    def say_how_to_resume(self) -> None:
        """Report, for a run that ends early, which checkpoint it resumes from and how."""
        newest = self.checkpoints.newest
        if self.complete or not (self.stopping.reason or newest):
            return

        reason = f"stopped after step {self.progress.step}"
        if self.stopping.reason:
            reason += f" ({self.stopping.reason})"
        if newest is None:
            self.writer.say(reason)
        else:
            how = "without --resume never" if self.config.resume == "never" else "the same command"
            left = " and runs the evaluation that is due" if self.progress.owes_evaluation else ""
            self.writer.say(f"{reason}; {how} resumes from {newest}{left}")

    def pass_on_messages(self) -> None:
        """Print the messages of reading a checkpoint, and of saves that have finished in the
        background.
        """
        for line in self.checkpoints.messages():
            if self.state.is_main:
                self.writer.say(line)

    def train_step(self) -> None:
        """Run one optimizer step over all micro-batches of this rank."""
        step = self.progress.step + 1
        self.watchdog.enter("data", step)
        micro_batches = self.next_batches()
        self.watchdog.enter("step", step)
        totals = self.count_targets(micro_batches)
        self.streams.start_step(step)

        for number, batch in enumerate(micro_batches):
            output = self.engine.forward(batch)
            loss, report = self.task.loss(output, batch, totals)
            loss = loss + self.routing.loss(output)
            self.engine.backward(loss, last=number == len(micro_batches) - 1)
            self.report += report

        self.rate = learning_rate(step, self.config)
        self.grad_norm, applied = self.engine.step(self.rate)
        self.progress.step = step
        self.progress.consumed_samples += self.config.global_batch_size
        self.steps_in_window += 1
        if not applied:
            self.note_bad_step(step)
            return

        self.bad_steps = 0
        if self.engine.ema is not None:
            self.engine.ema.update(step, FragmentedState(self.engine).tensors())

    def next_batches(self) -> list[PackedBatch]:
        """Return the micro-batches of one step, on the device; add up waiting time, FLOPs and
        tokens for the log.
        """
        started = time.monotonic()
        batches = [next(self.batches) for _ in range(self.engine.accumulation)]
        self.data_wait += time.monotonic() - started
        for batch in batches:
            self.flops += training_flops(self.job.model_config, batch)
            self.tokens += len(batch.joint_order)

        return [batch.to(self.device) for batch in batches]

    def count_targets(self, micro_batches: list[PackedBatch]) -> torch.Tensor:
        """Count the targets of each loss in the whole step, over all micro-batches and
        data-parallel ranks: float64 [losses].
        """
        counts = (
            torch.stack([self.task.count_targets(batch) for batch in micro_batches])
            .sum(dim=0)
            .to(self.device, non_blocking=True)
        )
        return self.state.sum_over_data(counts)

    def note_bad_step(self, step: int) -> None:
        """Count and report a step without update; TrainingStopped after --max-bad-steps in a row.

        With fp16 the loss scale adapts after an overflow.
        """
        self.bad_steps += 1
        self.skipped += 1

        if self.bad_steps >= self.config.max_bad_steps:
            raise TrainingStopped(
                f"step {step}: the gradient was not finite for {self.bad_steps} steps in a row and"
                " the run stops; look at the data of these steps, lower --lr, or use --bf16"
                " instead of --fp16"
            )

        if not math.isnan(self.grad_norm) and self.engine.precision == "fp16":
            self.writer.say(f"step {step}: overflow, loss scale now {self.engine.loss_scale():g}")
        else:
            self.writer.say(f"step {step}: gradient is not finite, step skipped on all ranks")

    def log(self) -> None:
        """Log the metrics since the last log, over all ranks; synchronises with the device once."""
        work = torch.tensor([self.flops, self.tokens], dtype=torch.float64, device=self.device)
        self.state.sum_over_data(work)
        report = self.state.sum_over_data(self.report.clone())
        seconds = time.monotonic() - self.window_started
        flops_per_second = float(work[0]) / seconds / self.state.world_size
        values = {
            **self.task.metrics(report, self.steps_in_window),
            **self.routing.metrics(self.steps_in_window),
            "learning_rate": self.rate,
            "grad_norm": self.grad_norm,
            "loss_scale": self.engine.loss_scale(),
            "consumed_samples": self.progress.consumed_samples,
            "skipped": self.skipped,
            "samples_per_second": self.steps_in_window * self.config.global_batch_size / seconds,
            "tokens_per_second": float(work[1]) / seconds,
            "tflops_per_device": flops_per_second / 1e12,
            "data_wait_share": self.data_wait / seconds,
            "memory_gib": memory_gib(self.device),
        }
        if self.peak:
            values["mfu"] = flops_per_second / 1e12 / self.peak

        self.writer.write(
            self.progress.step, values, self.task.line(values) + self.routing.line(values)
        )
        self._start_window()

    def _start_window(self) -> None:
        self.report = torch.zeros(self.task.report_shape, device=self.device)
        self.routing.start_window()
        self.flops = 0.0
        self.tokens = 0
        self.data_wait = 0.0
        self.steps_in_window = 0
        self.skipped = 0
        self.window_started = time.monotonic()

    def evaluation_is_possible(self) -> bool:
        """Check whether an evaluation is owed and there is time for it.

        Weights are not judged while steps are bad.
        """
        return self.progress.owes_evaluation and not self.bad_steps and not self.stopping.urgent

    def evaluation_is_due(self, step: int) -> bool:
        """Check whether to evaluate after `step`: every --eval-interval steps and at the end."""
        if not self.evaluation or not self.config.eval_interval:
            return False
        return step == self.config.train_iters or step % self.config.eval_interval == 0

    def evaluate(self) -> bool:
        """Evaluate on unseen samples, and return whether the result is the best so far by the job's
        metric; False if the evaluation was abandoned to stop.
        """
        step = self.progress.step
        self.watchdog.enter("evaluation", step)
        figures = self.evaluation.run(
            self.engine,
            self.watchdog,
            stop=lambda: bool(self.stopping.agreed(step)) and self.stopping.urgent,
        )
        if figures is None:
            return False

        self.progress.owes_evaluation = False
        values, summary = figures
        self.writer.write(self.progress.step, values, summary, prefix="valid")
        if self.job.note_evaluation:
            self.progress.evaluations.append((step, values))
            self.job.note_evaluation(step, values)

        if not self.checkpoints.judge.metric:
            return False

        return self.progress.note(values[self.checkpoints.judge.metric])

    def out_of_patience(self) -> bool:
        """Check whether too many evaluations in a row have brought no improvement."""
        return bool(self.job.patience) and self.progress.stale >= self.job.patience
