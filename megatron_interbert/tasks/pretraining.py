"""Compute the three pretraining losses: masked segments, masked regions, image-text matching.

Each is divided by the number of its targets in the whole optimizer step (over ranks and gradient
accumulation), so the same global batch gives the same loss and gradient on every layout.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.manifest import HARD_NEGATIVES
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.data.pretraining import PretrainingSet
from megatron_interbert.files import file_sha256
from megatron_interbert.model.interbert import PRETRAINING_HEADS, InterBertOutput
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.parts import (
    describe_data,
    fitted_sizes,
    open_stores,
    vocabulary_of_run,
)
from megatron_interbert.tasks.task import Job

OBJECTIVES = ("msm", "mrm", "itm")


class PretrainingTask:
    """Compute the loss and the report of a batch.

    Only the losses in `objectives` are trained on; all three are always reported.
    """

    def __init__(self, objectives: Sequence[str] = OBJECTIVES) -> None:
        self.trained = torch.tensor([name in objectives for name in OBJECTIVES])

    report_shape = (len(OBJECTIVES), 3)

    @staticmethod
    def count_targets(batch: PackedBatch) -> torch.Tensor:
        """Return the number of MSM, MRM and ITM targets in a batch, float64 [3]."""
        return batch.target_counts()

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, a scalar, and the batch's report.

        The loss adds up, over the objectives trained on, summed losses / `totals`, the step's
        target counts [3]. The report is float32 [3, 3]: rows msm, mrm, itm; columns sum of losses,
        right answers, targets.
        """
        regions = soft_label_kl(output.mrm_logits, batch.mrm_class_ids, batch.mrm_class_probs)
        mismatched = batch.mismatched[: len(output.itm_logits)]  # none for texts alone
        matches = F.cross_entropy(output.itm_logits, mismatched, reduction="none")
        sums = torch.stack([output.msm_losses.sum(), regions.sum(), matches.sum()])
        # A batch without targets of a kind gives 0 / 1, never NaN, and its head still gets a
        # gradient of zeros.
        self.trained = self.trained.to(sums.device)  # copied once: each copy waits for the device
        wanted = torch.where(self.trained, sums, 0.0)
        loss = (wanted / totals.to(sums).clamp(min=1.0)).sum()
        right = torch.stack(
            [
                output.msm_right.sum(),
                (
                    output.mrm_logits.argmax(dim=1)
                    == hard_label(batch.mrm_class_ids, batch.mrm_class_probs)
                ).sum(),
                (output.itm_logits.argmax(dim=1) == mismatched).sum(),
            ]
        )

        return loss, torch.stack(
            [sums.detach(), right.to(sums), batch.target_counts().to(sums, non_blocking=True)],
            dim=1,
        )

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return the loss, accuracy and targets per step of each objective from a report [3, 3]
        summed over `steps` steps; `loss` is the sum of those trained on.
        """
        values = {"loss": 0.0}

        for name, (loss, right, targets), trained in zip(
            OBJECTIVES, report.double().tolist(), self.trained.tolist(), strict=True
        ):
            values[f"{name}_loss"] = loss / max(targets, 1.0)
            values[f"{name}_accuracy"] = right / max(targets, 1.0)
            values[f"{name}_targets"] = targets / steps
            values["loss"] += values[f"{name}_loss"] if trained else 0.0

        return values

    @staticmethod
    def line(values: dict[str, float]) -> str:
        """Return the text for a log line, such as `loss 9.1000 | msm 5.500 (9.5 %) | ..`: each loss
        with its accuracy.
        """
        parts = [
            f"{name} {values[f'{name}_loss']:.3f} ({100 * values[f'{name}_accuracy']:.1f} %)"
            for name in OBJECTIVES
        ]
        return " | ".join([f"loss {values['loss']:.4f}", *parts])


def soft_label_kl(
    logits: torch.Tensor, class_ids: torch.Tensor, class_probs: torch.Tensor
) -> torch.Tensor:
    """Return KL(detector || model) of each row [M], summed over classes, from logits float32 [M, C]
    and top-k labels [M, k].

    The probability that the k entries leave over is spread evenly over the other C - k classes.
    """
    log_model = F.log_softmax(logits, dim=1)
    listed = log_model.gather(1, class_ids)
    divergence = torch.xlogy(class_probs, class_probs).sum(dim=1) - (class_probs * listed).sum(
        dim=1
    )
    others = logits.shape[1] - class_ids.shape[1]

    if others > 0:
        rest = (1.0 - class_probs.sum(dim=1)).clamp(min=0.0)
        share = rest / others
        divergence = (
            divergence
            + torch.xlogy(rest, share)
            - share * (log_model.sum(dim=1) - listed.sum(dim=1))
        )

    return divergence


def hard_label(class_ids: torch.Tensor, class_probs: torch.Tensor) -> torch.Tensor:
    """Return the detector's most likely class [M] from top-k labels [M, k]."""
    return class_ids.gather(1, class_probs.argmax(dim=1, keepdim=True)).squeeze(1)


def pretraining_job(config: RunConfig, state: ParallelState) -> Job:
    """Build the job that pretrains on the region stores of --data-path."""
    corpus = open_stores(config.stores(), config)
    tokenizer = vocabulary_of_run(config, config.stores())
    sizes = fitted_sizes(config, tokenizer, corpus)
    samples = PretrainingSet(corpus, tokenizer, config)
    valid = None

    if config.valid_data_path:
        valid_corpus = open_stores([config.valid_data_path], config)
        corpus.check_alike(valid_corpus.stores[0], config.allow_other_detector, "--valid-data-path")
        valid = PretrainingSet(valid_corpus, tokenizer, config_of_validation(config))

    task = PretrainingTask(config.objective_names())
    data = describe_data(tokenizer, corpus)
    data["mined"] = (
        mined_negatives(corpus) if config.hard_negatives and samples.has_hard_negatives else []
    )

    return Job(
        task, samples, sizes, PRETRAINING_HEADS, data, tokenizer.vocab_file, valid_samples=valid
    )


def mined_negatives(corpus: Corpus) -> list[str]:
    """Return the hashes of the tables of mined negatives, on which the samples depend."""
    tables = [store.path / HARD_NEGATIVES for store in corpus.stores]
    return [file_sha256(path) for path in tables if path.is_file()]


def config_of_validation(config: RunConfig) -> RunConfig:
    """Return a copy of the settings for the validation store, which has its own partitions.

    Evaluations route each token by itself, so no partition has to hold whole routing groups.
    """
    own = copy.copy(config)
    own.data_epochs = own.data_weights = ""
    own.capacity_factor = own.balance_coefficient = 0.0
    own.fitted = config.fitted - {"data_partitions"}
    own.given = config.given - {"data_partitions"}
    own.origins = {name: of for name, of in config.origins.items() if name != "data_partitions"}
    own.notes = []

    return own
