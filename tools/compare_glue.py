#!/usr/bin/env python3
"""Finetunes one GLUE task twice with the same flags, data, order and first weights: InterBERT's text path and BERT of transformers.

Takes the flags of `finetune glue`. With --init-from a BERT both start from it, else both from the same random weights of --model;
with --no-dropout their losses are equal to rounding. Prints the table and writes SAVE/comparison.json.

    python tools/compare_glue.py --task SST-2 --data-path GLUE --init-from bert-base-uncased --save runs/sst2
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.path.exists("/dev/nvidia0") else "cuda")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from megatron_interbert.config import ModelConfig, parse
from megatron_interbert.data.downstream.glue import FORMATS, GlueSet, GlueTexts, find_file, read_rows
from megatron_interbert.data.loader import BatchStream
from megatron_interbert.data.packing import PackedBatch
from megatron_interbert.errors import TrainingStopped, UsageError, run_entry
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState, this_device
from megatron_interbert.task_config import GlueConfig
from megatron_interbert.tasks.glue import GlueTask, glue_job, glue_metrics, labels_of
from megatron_interbert.training.first_weights import load_initial_weights
from megatron_interbert.training.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from megatron_interbert.weights.files import write_json
from megatron_interbert.weights.foreign import bert_links


@dataclass
class Padded:
    """A packed batch of texts as BERT takes it: ids, mask, types [B, T]."""

    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> "Padded":
        rows = batch.text_offsets[:-1, None].long() + torch.arange(batch.max_text)
        mask = torch.arange(batch.max_text) < (batch.text_offsets[1:] - batch.text_offsets[:-1])[:, None]
        rows = rows.clamp(max=len(batch.token_ids) - 1)
        return cls(batch.token_ids[rows] * mask, mask.long(), batch.token_types[rows] * mask)


def bert_like(config: GlueConfig, sizes: ModelConfig, data: dict[str, Any]) -> torch.nn.Module:
    """BertForSequenceClassification with the first weights that `finetune glue` starts from."""
    from transformers import BertConfig, BertForSequenceClassification

    ours = InterBert(sizes, ("sentence",), num_labels=labels_of(config.task), text_only=True)
    initialise(ours, sizes, config.seed, ParallelState())
    if config.init_from:
        load_initial_weights(ours, sizes, config.init_from, ParallelState(), data)
    state = dict(ours.named_parameters())
    theirs: dict[str, torch.Tensor] = {}
    for link in bert_links(sizes):
        if link.ours in state:
            theirs |= dict(zip(link.theirs, link.to_theirs(state[link.ours].detach(), sizes), strict=True))
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
    """Loss of every step and the dev metrics of BERT, trained by a plain loop on the batches of `finetune glue`."""
    device, state = this_device(), ParallelState()
    job = glue_job(config, state)
    config.global_batch_size = config.global_batch(1)
    config.train_iters = config.train_iters or max(
        1, round(config.epochs * job.samples.order.epoch_length / config.global_batch_size)
    )
    model = bert_like(config, job.model_config, job.data).to(device).train()
    torch.manual_seed(config.seed)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    stream = iter(BatchStream(job.samples, 0, config.global_batch_size, 0, 1, workers=0))
    losses = []
    for step in tqdm(range(1, config.train_iters + 1), desc="BERT", unit="step", mininterval=1.0, disable=None):
        batches = [next(stream) for _ in range(config.accumulation_steps(1))]
        total = sum(len(batch.labels) for batch in batches)
        loss = torch.zeros((), device=device)
        for batch in batches:
            part = GlueTask.summed(logits_of(model, batch, device), batch.labels.to(device))[0] / total
            part.backward()
            loss += part.detach()
        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        set_learning_rate(optimizer, learning_rate(step, config))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses, evaluate_bert(model.eval(), config, job.samples, device)


def logits_of(model: torch.nn.Module, batch: PackedBatch, device: torch.device) -> torch.Tensor:
    """float32 [B, labels]."""
    padded = Padded.of(batch)
    inputs = {"input_ids": padded.ids, "attention_mask": padded.mask, "token_type_ids": padded.types}
    return model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits.float()


@torch.no_grad()
def evaluate_bert(model: torch.nn.Module, config: GlueConfig, samples: GlueSet, device: torch.device) -> dict[str, float]:
    """The official metrics on the first dev file."""
    rows = read_rows(find_file(config.data_path, config.task, FORMATS[config.task].dev[0]), config.task)
    texts = GlueTexts(rows, samples.texts.tokenizer, config.max_tokens)
    parts = []
    for start in range(0, texts.count, config.eval_batch_size):
        inputs = texts.inputs(range(start, min(start + config.eval_batch_size, texts.count)))
        ids, types = (torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x[i]) for x in inputs], batch_first=True) for i in (0, 1))
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(x[0]), dtype=torch.long) for x in inputs], batch_first=True)
        parts.append(model(ids.to(device), mask.to(device), types.to(device)).logits.float().cpu())
    return glue_metrics(config.task, torch.cat(parts).numpy(), rows.labels)


def train_ours(flags: list[str], save: str) -> tuple[list[float], dict[str, float]]:
    """Loss of every step and the last dev metrics of `finetune glue` with the same flags."""
    command = [sys.executable, "-m", "megatron_interbert.finetune", "glue", *flags, "--log-interval", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise TrainingStopped(
            f"finetune glue ended with code {ended.returncode}: {''.join(ended.stderr.strip().splitlines()[-1:])}"
        )
    records = [json.loads(line) for line in (Path(save) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    valid = {k: v for k, v in [r for r in records if r["split"] == "valid"][-1].items() if k not in ("step", "split")}
    return [r["sentence_loss"] for r in records if r["split"] == "train"], valid


def run() -> None:
    """Train both, print the table."""
    flags = sys.argv[1:]
    config: Any = parse(GlueConfig, __doc__ or "", flags)
    config.check()
    if not config.save or config.ema_decay or config.pretrained_lr_scale != 1:
        raise UsageError("give --save, and neither --ema-decay nor --pretrained-lr-scale: BERT is trained without")
    our_losses, ours = train_ours(flags, config.save)
    bert_losses, theirs = train_bert(config)
    print(f"{config.task}, {config.train_iters} steps of {config.global_batch_size}")
    print(f"{'':<24}{'InterBERT text path':>20}{'BERT (transformers)':>22}")
    for name in ours:
        print(f"{'dev ' + name:<24}{ours[name]:>20.2f}{theirs[name]:>22.2f}")
    last = max(1, len(our_losses) // 10)
    print(f"{'training loss, last 10 %':<24}{sum(our_losses[-last:]) / last:>20.4f}{sum(bert_losses[-last:]) / last:>22.4f}")
    result = {"task": config.task, "interbert": ours, "bert": theirs, "interbert_losses": our_losses, "bert_losses": bert_losses}
    write_json(Path(config.save) / "comparison.json", result)


if __name__ == "__main__":
    run_entry(run)
