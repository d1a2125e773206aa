"""Declare the settings of every training run, a row each, by Megatron's names where it has one."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.options import BELOW_1, FREE, NOTE, ONE_TEXT, SAME, Flags, setting


@dataclass
class DataSettings(Flags):
    """Hold the settings for reading samples of any task."""

    GROUP: ClassVar[str] = "data"

    vocab_file: str = setting(
        "",
        "WordPiece vocabulary; default: vocab.txt in the region store, or that of --init-from",
        FREE,
        may_differ=True,
    )
    max_regions: int = setting(
        36,
        "regions per image, first ones as stored; default: 36, or all cells of a grid",
        SAME,
        least=1,
        fitted=True,
    )
    max_tokens: int = setting(
        36,
        "tokens per caption with [CLS] and [SEP]",
        SAME,
        least=1,
        room_for=ONE_TEXT,
        fitted=True,
    )
    data_partitions: int = setting(
        64,
        "logical partitions of the data, a multiple of the data-parallel size; default: 64, or as"
        " many as fit samples and routing groups",
        SAME,
        least=1,
        fitted=True,
    )
    num_workers: int = setting(
        2, "loader processes per rank; 0: load in the training process", FREE, least=0
    )
    worker_start: str = setting(
        "fork", "how loader processes start", FREE, ("fork", "spawn", "forkserver")
    )
    data_timeout: int = setting(
        300,
        "seconds to wait for a batch before the run fails (a disk that hangs)",
        FREE,
        least=1,
    )
    strict_boxes: bool = setting(
        False, "refuse boxes outside the image instead of clipping them", FREE
    )
    allow_other_detector: bool = setting(
        False, "accept stores, or a checkpoint, whose features come from another detector", FREE
    )


@dataclass
class ModelSettings(Flags):
    """Hold the model and the weights that it starts from."""

    GROUP: ClassVar[str] = "model"

    model: str = setting(
        "sample",
        "preset (tiny, sample, sample-chinese, base, base-chinese, large, m6-10b-dense, m6-1.4b,"
        " m6-10b, m6-100b, m6-1t) or a JSON file of sizes",
        FREE,
    )
    init_from: str = setting(
        "",
        "weights to start from: Hugging Face BERT or InterBERT, an official InterBERT .bin, or one"
        " of our checkpoints",
        FREE,
    )
    experts: int = setting(
        0, "experts of each layer, in place of its MLP; 0: as --model says", FREE, least=0
    )
    prototypes: int = setting(
        0,
        "groups of experts, in each of which a token goes to one expert; 0: as --model says",
        FREE,
        least=0,
    )
    share_layers: bool = setting(
        False,
        "all layers of a stack have the same parameters (the first part of Pseudo-to-Real;"
        " interbert convert --untie-layers prepares the second)",
        FREE,
    )
    dropout: bool = setting(True, "--no-dropout sets every dropout to 0", SAME)
    seed: int = setting(1234, "seeds weights, order, masks and dropout", SAME, least=0)


@dataclass
class OptimisationSettings(Flags):
    """Hold the length of a run, its batches, learning rate and optimizer."""

    GROUP: ClassVar[str] = "optimisation"

    train_iters: int = setting(1000, "optimizer steps in the whole run", NOTE, least=1)
    micro_batch_size: int = setting(
        32,
        "samples per rank and forward pass; auto: found by trial",
        FREE,
        least=1,
        auto=True,
        deepspeed="train_micro_batch_size_per_gpu",
    )
    global_batch_size: int = setting(
        0,
        "samples per optimizer step over all ranks; default: micro batch x data parallel",
        NOTE,
        least=0,
        deepspeed="train_batch_size",
    )
    lr: float = setting(1e-4, "peak learning rate", NOTE, least=0, deepspeed="optimizer.params.lr")
    min_lr: float = setting(0.0, "learning rate at the end of the decay", NOTE, least=0)
    lr_warmup_fraction: float = setting(
        0.1, "share of the steps that warm up linearly from 0", NOTE, least=0, most=1
    )
    lr_decay_style: str = setting(
        "linear", "shape after the warm-up", NOTE, ("linear", "cosine", "constant", "multistep")
    )
    lr_milestones: str = setting(
        "0.6,0.8",
        "shares of the steps after which --lr-decay-factor multiplies a multistep rate",
        NOTE,
    )
    lr_decay_factor: float = setting(
        0.1, "factor of a multistep rate at each milestone", NOTE, least=0
    )
    pretrained_lr_scale: float = setting(
        1.0,
        "factor on the learning rate of weights that came from --init-from bert (paper: 0.1)",
        NOTE,
        least=0,
    )
    weight_decay: float = setting(
        0.01,
        "weight decay of matrices; biases and LayerNorm have none",
        NOTE,
        least=0,
        deepspeed="optimizer.params.weight_decay",
    )
    adam_beta1: float = setting(
        0.9,
        "Adam's first-moment decay",
        NOTE,
        least=0,
        most=BELOW_1,
        deepspeed="optimizer.params.betas.0",
    )
    adam_beta2: float = setting(
        0.999,
        "Adam's second-moment decay",
        NOTE,
        least=0,
        most=BELOW_1,
        deepspeed="optimizer.params.betas.1",
    )
    adam_eps: float = setting(
        1e-8, "Adam's epsilon", NOTE, least=0, deepspeed="optimizer.params.eps"
    )
    clip_grad: float = setting(
        1.0,
        "largest global gradient norm; 0: no clipping",
        NOTE,
        least=0,
        deepspeed="gradient_clipping",
    )
    ema_decay: float = setting(
        0.0,
        "keep an average of the weights with this decay (official finetuning: 0.9999); 0: none",
        NOTE,
        least=0,
        most=BELOW_1,
    )
    max_bad_steps: int = setting(10, "stop after this many non-finite steps in a row", FREE)


@dataclass
class ParallelismSettings(Flags):
    """Hold the settings for parallelism, precision and kernels."""

    GROUP: ClassVar[str] = "parallelism"

    tensor_model_parallel_size: int = setting(
        1, "ranks that split each layer", FREE, least=1, old_names=("--tp",)
    )
    sequence_parallel: bool = setting(
        False,
        "tensor-parallel ranks also split the tokens between layers: less memory, more traffic",
        FREE,
    )
    expert_parallel_size: int = setting(
        1,
        "ranks that divide the experts; it may span data-parallel and tensor-parallel ranks",
        FREE,
        least=1,
    )
    zero_stage: int = setting(
        1,
        "DeepSpeed ZeRO stage; a single process in fp32 takes 0 unless this is given",
        FREE,
        (0, 1, 2, 3),
        deepspeed="zero_optimization.stage",
    )
    deepspeed_config: str = setting(
        "",
        "DeepSpeed JSON, or the name of one in ds_configs/ (zero2, zero3_offload, ..); 'auto' takes"
        " the value of the flag",
        FREE,
    )
    nvme_path: str = setting(
        "",
        "folder on each machine's own disk for what a DeepSpeed JSON offloads to nvme",
        FREE,
        may_differ=True,
    )
    fp16: bool = setting(
        False, "half precision with dynamic loss scaling", FREE, deepspeed="fp16.enabled"
    )
    bf16: bool = setting(
        False,
        "bfloat16 with fp32 master weights (ZeRO stage 1 or higher)",
        FREE,
        deepspeed="bf16.enabled",
    )
    fp8: bool = setting(
        False,
        "with --bf16: the layers' matrix products in 8 bits (Ada, Hopper and newer; a CPU emulates"
        " them)",
        NOTE,
    )
    recompute_activations: bool = setting(
        False, "recompute each layer in the backward pass instead of keeping its activations", FREE
    )
    kernels: str = setting("auto", "fused kernels", FREE, ("auto", "torch", "triton", "apex"))
    deterministic: bool = setting(
        False,
        "use only operations that give the same bits every time, on GPUs too (slower there)",
        FREE,
    )


@dataclass
class CheckpointSettings(Flags):
    """Hold the settings for writing checkpoints and resuming from them."""

    GROUP: ClassVar[str] = "checkpoints"

    save: str = setting(
        "", "folder for checkpoints, logs and metrics; without it nothing is saved", FREE
    )
    load: str = setting("", "folder to resume from if it is not that of --save", FREE)
    resume: str = setting(
        "auto",
        "auto: resume if there is a checkpoint; must: fail if there is none; never: start over",
        FREE,
        ("auto", "never", "must"),
    )
    save_interval: int = setting(
        0, "steps between checkpoints; default: by time; 0: only at the end", FREE, least=0
    )
    save_interval_in_mins: float = setting(
        10.0,
        "minutes between checkpoints unless --save-interval is given; 0: only at the end",
        FREE,
        least=0,
    )
    keep_last: int = setting(2, "newest checkpoints to keep; 0: all", FREE, least=0)
    keep_every: int = setting(
        0, "also keep those whose step is a multiple of this; 0: none", FREE, least=0
    )
    async_save: bool = setting(
        True,
        "write checkpoints in the background; training only waits for the copy to host memory",
        FREE,
    )


@dataclass
class LoggingSettings(Flags):
    """Hold the settings for logging and evaluation."""

    GROUP: ClassVar[str] = "logging"

    log_interval: int = setting(10, "steps between log lines", FREE, least=1)
    eval_interval: int = setting(
        0,
        "steps between evaluations; 0: none, or in finetuning the end of each epoch",
        FREE,
        least=0,
    )
    tensorboard_dir: str = setting(
        "", "folder of TensorBoard's files; default: SAVE/tensorboard", FREE, may_differ=True
    )
    peak_tflops: float = setting(
        0.0,
        "dense peak TFLOP/s of one device, for MFU; default: looked up by the device's name",
        FREE,
        least=0,
    )
