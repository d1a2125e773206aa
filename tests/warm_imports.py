"""Import, once in the fork server of tests/warm.py, all that a run imports sooner or later, without
starting a thread.
"""

# ruff: noqa: F401
import torch._dynamo  # torch imports it with the first optimizer

import megatron_interbert.evaluate
import megatron_interbert.finetune
import megatron_interbert.preflight
import megatron_interbert.pretrain
import megatron_interbert.serve
import megatron_interbert.serving.server
import megatron_interbert.training.setup
from megatron_interbert.training.engine import import_muon_uncompiled

import_muon_uncompiled()
