"""Import, once in the fork server of tests/warm.py, all that a run imports sooner or later, without
starting a thread.
"""

# ruff: noqa: F401
# DeepSpeed imports this when an engine is built, and with it the compiler
import deepspeed.runtime.zero.muon.muon_optimizer
import torch._dynamo  # torch imports it with the first optimizer

import megatron_interbert.evaluate
import megatron_interbert.finetune
import megatron_interbert.preflight
import megatron_interbert.pretrain
import megatron_interbert.serve
import megatron_interbert.serving.server
import megatron_interbert.training.setup
