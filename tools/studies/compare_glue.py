"""Finetune InterBERT's text path and transformers' BERT on a GLUE task with the same flags, data,
order and first weights.

Takes the flags of `finetune glue`. With --init-from a BERT both start from it, otherwise both from
the same random weights of --model; with --no-dropout their losses are equal up to rounding. Prints
a table and writes SAVE/comparison.json.

    python tools/compare_glue.py --task SST-2 --data-path GLUE --init-from bert-base-uncased \\
        --save runs/sst2
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_interbert.command_line import parse
from megatron_interbert.config.model import ModelConfig
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import TrainingStopped, UsageError, run_entry
from megatron_interbert.files import write_json
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert, InterBertOutput
from megatron_interbert.parallel.device import this_device
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.progress import progress
from megatron_interbert.tasks.glue.config import GlueConfig
from megatron_interbert.tasks.glue.job import glue_job, labels_of
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.training.optimizer import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from megatron_interbert.training.settling import settle_length
from megatron_interbert.weights.foreign import bert_links


class PackedBert(torch.nn.Module):
    """Run BertForSequenceClassification on packed batches, with the output our task expects."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, batch: PackedBatch) -> InterBertOutput:
        lengths = (batch.text_offsets[1:] - batch.text_offsets[:-1]).tolist()
        ones = torch.ones_like(batch.token_ids)
        ids, mask, types = (
            pad_sequence(tokens.split(lengths), batch_first=True)
            for tokens in (batch.token_ids, ones, batch.token_types)
        )
        logits = self.bert(input_ids=ids, attention_mask=mask, token_type_ids=types).logits.float()

        return InterBertOutput(None, None, None, sentence_logits=logits)


def bert_like(config: GlueConfig, sizes: ModelConfig, data: dict[str, Any]) -> torch.nn.Module:
    """Build BertForSequenceClassification with the first weights of `finetune glue`."""
    from transformers import BertConfig, BertForSequenceClassification

    ours = InterBert(sizes, ("sentence",), num_labels=labels_of(config.task), text_only=True)
    initialise(ours, sizes, config.seed, ParallelState())
    if config.init_from:
        load_initial_weights(ours, sizes, config.init_from, ParallelState(), data)

    state = dict(ours.named_parameters())
    theirs: dict[str, torch.Tensor] = {}

    for link in bert_links(sizes):
        if link.ours in state:
            theirs |= dict(
                zip(link.theirs, link.to_theirs(state[link.ours].detach(), sizes), strict=True)
            )

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.interaction_layers + sizes.text_layers,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.ffn_hidden_size,
            max_position_embeddings=sizes.max_position_embeddings,
            type_vocab_size=sizes.type_vocab_size,
            hidden_dropout_prob=sizes.hidden_dropout,
            attention_probs_dropout_prob=sizes.attention_dropout,
            layer_norm_eps=sizes.layer_norm_eps,
            num_labels=labels_of(config.task),
        )
    )
    model.load_state_dict(theirs)

    return model


def train_bert(config: GlueConfig) -> tuple[list[float], dict[str, float]]:
    """Train BERT by a plain loop on the batches of `finetune glue`; return the loss of every step
    and the dev metrics.
    """
    device = this_device()
    state = ParallelState()
    job = glue_job(config, state)
    config.global_batch_size = config.global_batch(1)
    settle_length(config, job)
    model = PackedBert(bert_like(config, job.model_config, job.data)).to(device).train()
    torch.manual_seed(config.seed)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    stream = iter(BatchStream(job.samples, 0, config.global_batch_size, 0, 1, workers=0))
    losses = []

    for step in progress(range(1, config.train_iters + 1), desc="BERT", unit="step"):
        batches = [next(stream).to(device) for _ in range(config.accumulation_steps(1))]
        totals = sum(job.task.count_targets(batch) for batch in batches)
        step_losses = []

        for batch in batches:
            loss, _ = job.task.loss(model(batch), batch, totals)
            loss.backward()
            step_losses.append(float(loss))

        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)

        set_learning_rate(optimizer, learning_rate(step, config))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(step_losses))

    return losses, job.evaluate(model.eval(), state, device)


def train_ours(flags: list[str], save: str) -> tuple[list[float], dict[str, float]]:
    """Run `finetune glue` with `flags`; return the losses of all steps and the last dev metrics."""
    command = [
        sys.executable,
        "-m",
        "megatron_interbert.finetune",
        "glue",
        *flags,
        "--log-interval",
        "1",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise TrainingStopped(
            f"finetune glue ended with code {ended.returncode}:"
            f" {''.join(ended.stderr.strip().splitlines()[-1:])}"
        )

    records = [
        json.loads(line)
        for line in (Path(save) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    valid = {
        k: v
        for k, v in [r for r in records if r["split"] == "valid"][-1].items()
        if k not in ("step", "split")
    }

    return [r["sentence_loss"] for r in records if r["split"] == "train"], valid


def run() -> None:
    """Train both, print the table and write the comparison."""
    flags = sys.argv[1:]
    config: Any = parse(GlueConfig, __doc__ or "", flags)
    config.check()

    if not config.save or config.ema_decay or config.pretrained_lr_scale != 1:
        raise UsageError(
            "give --save, and leave out --ema-decay and --pretrained-lr-scale, which this loop for"
            " BERT does not have"
        )

    our_losses, ours = train_ours(flags, config.save)
    bert_losses, theirs = train_bert(config)
    print(f"{config.task}, {config.train_iters} steps of {config.global_batch_size}")
    print(f"{'':<24}{'InterBERT text path':>20}{'BERT (transformers)':>22}")
    for name in ours:
        print(f"{'dev ' + name:<24}{ours[name]:>20.2f}{theirs[name]:>22.2f}")

    last = max(1, len(our_losses) // 10)
    print(
        f"{'training loss, last 10 %':<24}{sum(our_losses[-last:]) / last:>20.4f}"
        f"{sum(bert_losses[-last:]) / last:>22.4f}"
    )
    result = {
        "task": config.task,
        "interbert": ours,
        "bert": theirs,
        "interbert_losses": our_losses,
        "bert_losses": bert_losses,
    }
    write_json(Path(config.save) / "comparison.json", result)


def main() -> None:
    """Run the command."""
    run_entry(run)
