"""Imported once by the fork server of tests/warm.py: all that a run imports sooner or later, with
no thread started.
"""

# ruff: noqa: F401
# DeepSpeed imports it when an engine is made, and it the compiler
import deepspeed.runtime.zero.muon.muon_optimizer
import torch._dynamo  # torch imports it when the first optimizer is made

import megatron_interbert.evaluate
import megatron_interbert.finetune
import megatron_interbert.preflight
import megatron_interbert.pretrain
import megatron_interbert.serve
import megatron_interbert.training.setup
