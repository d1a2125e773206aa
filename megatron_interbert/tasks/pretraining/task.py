"""Compute the losses of pretraining: masked words and regions, matching, alignment.

Each is divided by the number of its targets in the whole optimizer step (over ranks and gradient
accumulation), so the same global batch gives the same loss and gradient on every layout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_interbert.config.objectives import (
    ANSWER_HEAD,
    OBJECTIVES,
    OF_CLASSES,
    USUAL,
    WITH_MATCHING,
)
from megatron_interbert.config.pretraining import RunConfig
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.model.interbert import InterBertOutput
from megatron_interbert.tasks.pretraining.alignment import alignment_distances
from megatron_interbert.tasks.pretraining.region_losses import (
    attribute_losses,
    feature_losses,
    hard_label,
    hard_label_losses,
    soft_label_kl,
)

JOINED = {"itm": WITH_MATCHING}  # objectives that a mix trains in the steps of another
WITH_ACCURACY = ("msm", "mrm", "mrc", "attributes", "itm", "vqa")
Sums = tuple[torch.Tensor, torch.Tensor]  # of losses and of right answers, scalars


class PretrainingTask:
    """Compute the loss and the report of a batch.

    Only the losses of the configuration's objectives are trained on. The usual three are always
    reported, those of classes only if the regions have some (`has_labels`).
    """

    def __init__(
        self,
        config: RunConfig | None = None,
        has_labels: bool = True,
        background: int | None = 0,
    ) -> None:
        """Take the class that is no object, None if there is no such class."""
        config = config or RunConfig()
        self.config = config
        self.background = background
        self.objectives = config.objective_names()
        usual = [name for name in USUAL if has_labels or name not in OF_CLASSES]
        self.names = tuple(n for n in OBJECTIVES if n in usual or n in self.objectives)
        self.report_shape = (len(self.names), 3)
        self.is_mixed = bool(config.mix())
        weights = config.weights_of_objectives()
        # the factor of each loss in a batch for all objectives (""), and in one for a single one
        self.factors = {
            only: torch.tensor([self._factor(name, only, weights) for name in self.names])
            for only in ("", *config.mix())
        }
        self.losses: dict[str, Callable[[InterBertOutput, PackedBatch], Sums]] = {
            "msm": masked_words,
            "mrm": masked_classes,
            "mrc": self._likely_classes,
            "attributes": attributes,
            "mrfr": self._features,
            "itm": matching,
            "vqa": answering,
            "wra": alignment,
        }

    def _factor(self, name: str, only: str, weights: dict[str, float]) -> float:
        drawn = not only or name == only or name in JOINED.get(only, ())
        return weights[name] if name in self.objectives and drawn else 0.0

    def _likely_classes(self, output: InterBertOutput, batch: PackedBatch) -> Sums:
        losses, labels = hard_label_losses(
            output.mrm_logits,
            batch.mrm_class_ids,
            batch.mrm_class_probs,
            self.background,
            self.config.mrc_confidence,
        )
        return losses.sum(), (output.mrm_logits.argmax(dim=1) == labels).sum()

    def _features(self, output: InterBertOutput, batch: PackedBatch) -> Sums:
        losses = feature_losses(
            output.mrfr_features,
            batch,
            self.config.mrfr_normalise,
            self.config.mrfr_reduction,
        )
        return losses.sum(), losses.new_zeros(())

    def count_targets(self, batch: PackedBatch) -> torch.Tensor:
        """Return the number of targets of each objective in a batch, float64 [objectives]."""
        words, regions, images = batch.target_counts().tolist()
        counts = {
            "msm": words,
            "attributes": len(batch.mrm_attribute_rows),
            "itm": images,
            "vqa": len(batch.labels),
            "wra": images,
        }
        drawn = self._drawn(batch)
        return torch.tensor(
            [counts.get(name, regions) if name in drawn else 0 for name in self.names],
            dtype=torch.float64,
        )

    def _sums(self, name: str, output: InterBertOutput, batch: PackedBatch) -> Sums:
        """Return the sums of an objective; wra, which has no parameters, is skipped in steps that
        are not for it.
        """
        if name == "wra" and name not in self._drawn(batch):
            nothing = output.itm_logits.new_zeros(())
            return nothing, nothing

        return self.losses[name](output, batch)

    def _drawn(self, batch: PackedBatch) -> tuple[str, ...]:
        """Return the objectives that a batch is for."""
        if not batch.head:
            return self.names
        return (batch.head, *JOINED.get(batch.head, ()))

    def loss(
        self, output: InterBertOutput, batch: PackedBatch, totals: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch's share of the step's loss, a scalar, and the batch's report.

        The loss adds up, over the objectives trained on, summed losses / `totals`, the step's
        target counts [objectives]. The report is float32 [objectives, 3]: columns sum of losses,
        right answers, targets.
        """
        pairs = [self._sums(name, output, batch) for name in self.names]
        sums = torch.stack([losses for losses, _ in pairs])
        right = torch.stack([hits.to(sums) for _, hits in pairs])

        # A batch without targets of a kind gives 0 / 1, never NaN, and its head still gets a
        # gradient of zeros.
        # kept on the device, because every copy makes the host wait
        factors = self.factors[batch.head].to(sums.device)
        self.factors[batch.head] = factors
        wanted = torch.where(factors > 0, sums * factors, 0.0)
        loss = (wanted / totals.to(sums).clamp(min=1.0)).sum()

        counts = self.count_targets(batch).to(sums, non_blocking=True)
        counted = (counts > 0).to(sums) if batch.head else 1.0
        report = torch.stack([sums.detach() * counted, right * counted, counts], dim=1)

        return loss, report

    def metrics(self, report: torch.Tensor, steps: int = 1) -> dict[str, float]:
        """Return the loss, accuracy and targets per step of each objective from a report summed
        over `steps` steps; `loss` is the weighted sum of those trained on. Objectives of a mix that
        no step was for are left out, and so is vqa without questions.
        """
        values = {"loss": 0.0}
        factors = self.factors[""].tolist()

        for name, factor, row in zip(self.names, factors, report.double().tolist(), strict=True):
            loss, right, targets = row
            if not targets and (self.is_mixed or name == "vqa"):
                continue
            values[f"{name}_loss"] = loss / max(targets, 1.0)
            if name in WITH_ACCURACY:
                values[f"{name}_accuracy"] = right / max(targets, 1.0)
            values[f"{name}_targets"] = targets / steps
            values["loss"] += factor * values[f"{name}_loss"]

        return values

    def line(self, values: dict[str, float]) -> str:
        """Return the text for a log line, such as `loss 9.1000 | msm 5.500 (9.5 %) | ..`: each loss
        with its accuracy, if it has one.
        """
        parts = [f"loss {values['loss']:.4f}"]
        for name in self.names:
            if f"{name}_loss" not in values:
                continue
            accuracy = values.get(f"{name}_accuracy")
            hits = "" if accuracy is None else f" ({100 * accuracy:.1f} %)"
            parts.append(f"{name} {values[f'{name}_loss']:.3f}{hits}")

        return " | ".join(parts)


def masked_words(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sums of MSM."""
    return output.msm_losses.sum(), output.msm_right.sum()


def masked_classes(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sums of MRM."""
    losses = soft_label_kl(output.mrm_logits, batch.mrm_class_ids, batch.mrm_class_probs)
    labels = hard_label(batch.mrm_class_ids, batch.mrm_class_probs)
    return losses.sum(), (output.mrm_logits.argmax(dim=1) == labels).sum()


def attributes(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sums of attributes."""
    ids = batch.mrm_attribute_ids
    logits = output.attribute_logits.index_select(0, batch.mrm_attribute_rows)
    losses = attribute_losses(logits, ids, batch.mrm_attribute_probs)
    return losses.sum(), (logits.argmax(dim=1) == ids).sum()


def matching(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sums of ITM."""
    mismatched = batch.mismatched[: len(output.itm_logits)]  # none for texts alone
    losses = F.cross_entropy(output.itm_logits, mismatched, reduction="none")
    return losses.sum(), (output.itm_logits.argmax(dim=1) == mismatched).sum()


def answering(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sums of answers to questions that are shown with their own images."""
    logits = output.task_outputs[ANSWER_HEAD].index_select(0, batch.label_owner)
    losses = F.cross_entropy(logits, batch.labels, reduction="none")
    return losses.sum(), (logits.argmax(dim=1) == batch.labels).sum()


def alignment(output: InterBertOutput, batch: PackedBatch) -> Sums:
    """Return the sum of WRA: the distances of matched pairs minus those of mismatched ones."""
    distances = alignment_distances(output.text_hidden, output.image_hidden, batch)
    signs = torch.where(batch.mismatched == 0, 1.0, -1.0)
    return (signs * distances).sum(), distances.new_zeros(())
