"""Typed configuration: dataclasses from which the command line and the YAML keys are generated (`command_line.py`).

Precedence: flag, then YAML (`--config`), then DeepSpeed JSON where it names the same thing, then the default here.
`training/deepspeed_config.py` is the one place that merges the DeepSpeed JSON.
"""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.errors import UsageError
from megatron_interbert.files import reading

FLOAT8_MULTIPLE = 16  # of the inner size, and of the columns of the result, of a GPU's 8-bit product
LARGEST_INTEGER = (1 << 63) - 1  # what generators, tensors and files hold
LARGEST_SIZE = 1 << 24  # of anything in a model
MOST_LAYERS = 1000  # of a kind: a model of a million would be built until memory is full
BELOW_1 = math.nextafter(1.0, 0.0)
AUTO = -(1 << 62)  # `auto` on the command line and in YAML: a number that is found out when the run starts, and that nobody gives


def option(
    default: Any,
    help: str,
    choices: Sequence[Any] | None = None,
    auto: bool = False,
    least: float = -math.inf,
    most: float = math.inf,
) -> Any:
    """Declare a dataclass field that also is a flag.

    `help` is its sentence in --help, `auto` says whether that word stands for AUTO; a number lies from
    `least` to `most`.
    """
    facts = {"help": help, "choices": choices, "auto": auto, "least": least, "most": most}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one InterBERT. A size of 0 for vocabulary, feature or classes means: take it from the data."""

    vocab_size: int = 30522
    hidden_size: int = 768
    interaction_layers: int = 6
    text_layers: int = 6
    image_layers: int = 6
    num_attention_heads: int = 12
    image_attention_heads: int = 8
    ffn_hidden_size: int = 3072
    pooled_size: int = 1024
    feature_dim: int = 2048
    num_classes: int = 1601
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    image_hidden_dropout: float = 0.2
    image_attention_dropout: float = 0.1
    fusion: str = "product"
    text_normalisation: str = "none"  # or "chinese": full-width and traditional forms are read as their usual ones
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12

    FROM_DATA: ClassVar[tuple[str, ...]] = ("vocab_size", "feature_dim", "num_classes")
    MAY_BE_0: ClassVar[tuple[str, ...]] = (
        *FROM_DATA,
        *("interaction_layers", "text_layers", "image_layers"),
    )

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            self.check_size(entry.name, entry.type)
        for name in ("num_attention_heads", "image_attention_heads"):
            if self.hidden_size % getattr(self, name):
                raise UsageError(f"model: hidden_size {self.hidden_size} is not a multiple of {name} {getattr(self, name)}")
        if self.fusion not in ("product", "sum"):
            raise UsageError(f"model: fusion is '{self.fusion}', expected 'product' or 'sum'")
        if self.text_normalisation not in ("none", "chinese"):
            raise UsageError(f"model: text_normalisation is '{self.text_normalisation}', expected 'none' or 'chinese'")

    def check_size(self, name: str, kind: type) -> None:
        """Raise UsageError for a size that no model can have; it may come from anybody's JSON file."""
        value = getattr(self, name)
        if kind is int:
            least = 0 if name in self.MAY_BE_0 else 1
            most = MOST_LAYERS if name.endswith("_layers") else LARGEST_SIZE
            sound = type(value) is int and least <= value <= most
            expected = f"a whole number from {least} to {most}"
        elif kind is float:
            below = 1.0 if name.endswith("dropout") else math.inf
            sound = type(value) in (int, float) and 0 <= value < below
            expected = "a number from 0 up to 1" if below == 1.0 else "a finite number of 0 or more"
        else:
            sound, expected = isinstance(value, str), "a text"

        if not sound:
            raise UsageError(f"model: {name} is {value!r:.60}, expected {expected}")

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rounded up to a multiple of 128, the same for every tensor-parallel size."""
        return -(-self.vocab_size // 128) * 128

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Of the attention of text and joint tokens, and of that of images."""
        return self.hidden_size // self.num_attention_heads, self.hidden_size // self.image_attention_heads

    def check_tensor_parallel(self, size: int) -> None:
        """Raise UsageError when `size` ranks cannot share the heads, the MLP or the vocabulary evenly."""
        for name in ("num_attention_heads", "image_attention_heads", "ffn_hidden_size", "padded_vocab_size"):
            if getattr(self, name) % size:
                raise UsageError(
                    f"--tensor-model-parallel-size {size} does not divide {name} {getattr(self, name)} of the model;"
                    f" use a size that divides it"
                )

    def without_dropout(self) -> "ModelConfig":
        """The same model with every dropout at 0 (exact comparisons between layouts)."""
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("dropout")]
        return dataclasses.replace(self, **dict.fromkeys(names, 0.0))


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """Build a ModelConfig from JSON values; unknown keys raise UsageError with the nearest right name."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for name in values:
        if name not in known:
            raise UsageError(f"{where}: unknown model key '{name}'{nearest(name, known)}")
    try:
        return ModelConfig(**values)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


@dataclass
class Flags:
    """What every command line has: which flags were given, and limits that `check` holds numbers to."""

    POSITIVE: ClassVar[tuple[str, ...]] = ()
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ()
    SHORTEST: ClassVar[str] = "[CLS] word [SEP]"  # that --max-tokens must have room for; 0 may mean a default

    def __post_init__(self) -> None:
        self.given: set[str] = set()
        self.origins: dict[str, str] = {}  # where settings come from that no flag has given
        self.fitted: set[str] = set()
        self.notes: list[str] = []  # lines about settings that were fitted, for the user

    def is_default(self, name: str) -> bool:
        """Whether nobody has said this setting: no flag, file or checkpoint."""
        return name not in self.given and name not in self.origins

    def settle(self, name: str, value: Any, origin: str) -> None:
        """Take a setting from `origin` (`ds.json`, `RUN/global_step10`)."""
        setattr(self, name, value)
        self.origins[name] = origin
        self.check_number(name)

    def check_number(self, name: str) -> None:
        """Raise UsageError for NaN, infinity, or a number outside the limits of its field."""
        value = getattr(self, name)
        if not isinstance(value, int | float) or value == AUTO:
            return
        if not -LARGEST_INTEGER <= value <= LARGEST_INTEGER and isinstance(value, int):
            raise UsageError(f"{flag(name)}{self.origin(name)}: expected a number of less than 20 digits")
        if not math.isfinite(value):
            raise UsageError(f"{self.told(name)}: expected a finite number")

        facts = self.__dataclass_fields__[name].metadata
        least, most = facts["least"], facts["most"]
        if least <= value <= most:
            return
        expected = f"{least:g} to {most:g}"
        if math.isinf(most):
            expected = f"{least:g} or more"
        elif most == BELOW_1:
            expected = f"{least:g} or more and below 1"
        raise UsageError(f"{self.told(name)}: expected {expected}")

    def fit(self, name: str, value: Any, reason: str) -> None:
        """Replace a default by what fits, and note it for the user."""
        if value != getattr(self, name):
            self.notes.append(f"note: {flag(name)} {value} instead of {getattr(self, name)}: {reason}")
            setattr(self, name, value)
            self.fitted.add(name)

    def told(self, name: str) -> str:
        """Name a setting, its number and where it comes from: `--lr 0.1 (from run.yaml)`."""
        value = getattr(self, name)
        return f"{flag(name)} {'auto' if value == AUTO else value}{self.origin(name)}"

    def origin(self, name: str) -> str:
        """Say where a setting comes from, if no flag has given it."""
        if name in self.origins:
            return f" (from {self.origins[name]})"
        if name in self.fitted:
            return " (fitted)"
        return " (default)" if self.is_default(name) else ""

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        for entry in dataclasses.fields(self):
            self.check_number(entry.name)

        found_out = {entry.name for entry in dataclasses.fields(self) if entry.metadata.get("auto")}
        for names, least in ((self.POSITIVE, 1), (self.NOT_NEGATIVE, 0)):
            for name in names:
                if getattr(self, name) < least and not (name in found_out and getattr(self, name) == AUTO):
                    raise UsageError(f"{flag(name)} is {getattr(self, name)}, expected {least} or more")
        least = len(self.SHORTEST.split())
        for name in ("max_tokens", "max_rationale_tokens"):
            value = getattr(self, name, 0)
            if value and value < least:
                raise UsageError(f"{flag(name)} is {value}, expected {least} or more ({self.SHORTEST})")


@dataclass
class TrainConfig(Flags):
    """What every training run is told, whatever it trains on. Names are Megatron's where Megatron has one."""

    model: str = option("sample", "preset (tiny, sample, base, large, base-chinese) or a JSON file of model sizes")
    vocab_file: str = option("", "WordPiece vocabulary; default: vocab.txt in the region store, or that of --init-from")
    save: str = option("", "folder for checkpoints, logs and metrics; none: nothing is saved")
    load: str = option("", "folder to resume from when it is not the one of --save")
    init_from: str = option(
        "", "weights to start from: Hugging Face BERT or InterBERT, an official InterBERT .bin, or one of our checkpoints"
    )
    resume: str = option(
        "auto", "auto: go on if a checkpoint is there; must: fail if none; never: start anew", ("auto", "never", "must")
    )
    allow_other_detector: bool = option(False, "accept stores, or a checkpoint, whose features come from another detector")

    train_iters: int = option(1000, "optimizer steps in the whole run")
    micro_batch_size: int = option(
        32, "samples per rank and forward pass; auto: by trial", auto=True
    )
    global_batch_size: int = option(0, "samples per optimizer step over all ranks; default: micro batch x data parallel")
    seed: int = option(1234, "seeds weights, order, masks and dropout", least=0)
    lr: float = option(1e-4, "peak learning rate", least=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", least=0)
    lr_warmup_fraction: float = option(
        0.1, "share of the steps that warm up linearly from 0", least=0, most=1
    )
    lr_decay_style: str = option("linear", "shape after the warm-up", ("linear", "cosine", "constant", "multistep"))
    lr_milestones: str = option("0.6,0.8", "shares of the steps after which a multistep rate is multiplied by --lr-decay-factor")
    lr_decay_factor: float = option(0.1, "factor of a multistep rate at each milestone", least=0)
    pretrained_lr_scale: float = option(
        1.0,
        "factor on the learning rate of weights that came from --init-from bert (paper: 0.1)",
        least=0,
    )
    weight_decay: float = option(0.01, "on matrices only; biases and LayerNorm have none", least=0)
    adam_beta1: float = option(0.9, "Adam's first-moment decay", least=0, most=BELOW_1)
    adam_beta2: float = option(0.999, "Adam's second-moment decay", least=0, most=BELOW_1)
    adam_eps: float = option(1e-8, "Adam's epsilon", least=0)
    clip_grad: float = option(1.0, "largest global gradient norm; 0: no clipping", least=0)
    ema_decay: float = option(
        0.0,
        "keep an average of the weights with this decay (official finetuning: 0.9999); 0: none",
        least=0,
        most=BELOW_1,
    )
    max_bad_steps: int = option(10, "stop after so many non-finite steps in a row")

    tensor_model_parallel_size: int = option(1, "ranks that share each layer")
    sequence_parallel: bool = option(False, "these ranks also share the tokens between the layers: less memory, more traffic")
    zero_stage: int = option(
        1, "DeepSpeed ZeRO stage; one process in fp32 takes 0 unless it is given", (0, 1, 2, 3)
    )
    deepspeed_config: str = option("", "DeepSpeed JSON (see ds_configs/); 'auto' values are resolved from the flags")
    fp16: bool = option(False, "half precision with dynamic loss scale")
    bf16: bool = option(False, "bfloat16 with fp32 master weights (ZeRO stage 1 or higher)")
    fp8: bool = option(False, "with --bf16: the layers' matrix products in 8 bits (Ada, Hopper and newer; a CPU emulates them)")
    recompute_activations: bool = option(False, "recompute each layer in the backward pass instead of keeping it")
    kernels: str = option("auto", "fused kernels", ("auto", "torch", "triton", "apex"))
    deterministic: bool = option(False, "only operations that give the same bits every time, on GPUs too (slower there)")
    dropout: bool = option(True, "--no-dropout sets every dropout to 0")

    max_regions: int = option(36, "regions per image, first ones as stored")
    max_tokens: int = option(36, "tokens per caption with [CLS] and [SEP]")
    data_partitions: int = option(
        64,
        "logical partitions of the data, a multiple of the data-parallel size; default: 64, or as many"
        " as fit",
    )
    num_workers: int = option(2, "loader processes per rank; 0: load in the training process")
    worker_start: str = option("fork", "how loader processes start", ("fork", "spawn", "forkserver"))
    data_timeout: int = option(300, "seconds without a batch after which the loader is given up (a disk that hangs)")
    strict_boxes: bool = option(False, "refuse boxes outside the image instead of clipping them")

    save_interval: int = option(0, "steps between checkpoints; default: by the clock; 0: only at the end")
    save_interval_in_mins: float = option(
        10.0, "minutes between checkpoints unless --save-interval is given; 0: only at the end"
    )
    keep_last: int = option(2, "newest checkpoints to keep; 0: all")
    keep_every: int = option(0, "also keep those whose step is a multiple of this; 0: none")
    async_save: bool = option(True, "write checkpoints in the background; training waits only for the copy to host memory")
    eval_interval: int = option(0, "steps between evaluations")
    log_interval: int = option(10, "steps between log lines")
    tensorboard_dir: str = option("", "default: SAVE/tensorboard")
    peak_tflops: float = option(
        0.0, "dense peak of one device for MFU; default: looked up by the device's name", least=0
    )
    exit_interval: int = option(0, "save and end after a step that is a multiple of this; the same command resumes; 0: never")
    exit_duration_in_mins: float = option(0.0, "save and end after so many minutes; the same command resumes; 0: never")
    hang_timeout: int = option(300, "end the run when no rank moves for so many seconds, or 10 times what is usual; 0: never")
    print_launch: bool = option(False, "show which rank would run where, and end")

    data_parallel_size: ClassVar[int] = 1  # a run sets its own, when it knows how many ranks there are

    # Settings that are fitted to data and model; a resumed run keeps what was fitted at first.
    FITTED: ClassVar[tuple[str, ...]] = ("data_partitions", "max_tokens")
    # Settings on which the samples and losses of a step depend: a resumed run must have the same.
    SAME_SAMPLES: ClassVar[tuple[str, ...]] = ("seed", "data_partitions", "max_regions", "max_tokens", "dropout")
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *("train_iters", "micro_batch_size", "max_regions", "max_tokens", "data_partitions", "tensor_model_parallel_size"),
        *("log_interval", "data_timeout"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *("global_batch_size", "save_interval", "keep_last", "keep_every", "eval_interval", "num_workers"),
        *("exit_interval", "exit_duration_in_mins", "hang_timeout", "save_interval_in_mins"),
    )

    def accumulation_steps(self, data_parallel_size: int) -> int:
        """Micro-batches per optimizer step and rank; UsageError when the batch sizes do not divide."""
        per_pass = self.micro_batch_size * data_parallel_size
        batch = self.global_batch_size or per_pass
        if batch % per_pass:
            raise UsageError(
                f"{self.told('global_batch_size')} is not a multiple of"
                f" {self.told('micro_batch_size')} x data-parallel size {data_parallel_size}"
                f" = {per_pass}; change one of them"
            )
        return batch // per_pass

    def fit_batches(self, data_parallel_size: int) -> None:
        """Fit batch sizes that nobody has said to the number of data-parallel ranks."""
        ranks = data_parallel_size
        told = self.micro_batch_size != AUTO and not self.is_default("micro_batch_size")
        least = ranks * self.micro_batch_size if told else ranks
        if self.global_batch_size % least and self.is_default("global_batch_size"):
            whole = max(self.global_batch_size // least, 1) * least
            reason = f" with {self.told('micro_batch_size')}" if told else ""
            plural = "s share" if ranks > 1 else " takes"
            self.fit("global_batch_size", whole, f"{ranks} data-parallel rank{plural} it{reason}")

        if self.micro_batch_size == AUTO or told:
            return
        share = self.global_batch_size // ranks
        if share and self.global_batch_size % ranks == 0:
            fits = max(n for n in range(1, min(self.micro_batch_size, share) + 1) if share % n == 0)
            reason = f"a rank's share of {self.told('global_batch_size')} is {share}"
            self.fit("micro_batch_size", fits, reason)

    def fit_partitions(self, samples: int) -> int:
        """Settle in how many partitions so many `samples` are cut, and give that number.

        As given; a default becomes fewer where there are too few samples, in steps that keep it
        divisible by the data-parallel size and the same for 1, 2, 4, .. ranks.
        """
        ranks = self.data_parallel_size
        fit = self.data_partitions <= samples and self.data_partitions % ranks == 0
        if self.is_default("data_partitions") and samples >= ranks and not fit:
            times = min(self.data_partitions, samples) // ranks
            fits = ranks << max(times.bit_length() - 1, 0)
            reason = f"{samples} samples, {ranks} data-parallel rank{'s' * (ranks > 1)}"
            self.fit("data_partitions", fits, reason)
        return self.data_partitions

    def fit_zero_stage(self, processes: int) -> None:
        """Take ZeRO stage 0 for one process in fp32, which shares nothing: it is fastest there."""
        alone = processes == 1 and not (self.fp16 or self.bf16)
        if alone and self.is_default("zero_stage") and not self.deepspeed_config:
            self.zero_stage = 0

    def global_batch(self, data_parallel_size: int) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch_size * data_parallel_size * self.accumulation_steps(data_parallel_size)

    def minutes_between_saves(self) -> float:
        """Minutes after which a checkpoint is due; 0 where only steps count."""
        by_steps = "save_interval" in self.given and "save_interval_in_mins" not in self.given
        return 0.0 if by_steps else self.save_interval_in_mins

    def milestones(self) -> list[float]:
        """The shares of --lr-milestones; UsageError unless they rise between 0 and 1."""
        try:
            shares = [float(part) for part in self.lr_milestones.split(",") if part]
        except ValueError:
            shares = [2.0]
        if shares != sorted(shares) or not all(0 < share < 1 for share in shares):
            raise UsageError(f"--lr-milestones is '{self.lr_milestones}', expected rising shares of the run such as 0.6,0.8")
        return shares

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if self.fp16 and self.bf16:
            raise UsageError("--fp16 and --bf16 exclude each other; give one")
        if (self.fp16 or self.bf16) and self.zero_stage == 0:
            raise UsageError(
                f"--{'fp16' if self.fp16 else 'bf16'} needs --zero-stage 1 or higher: DeepSpeed's stage 0 takes one optimizer step too"
                " many in half precision, and its gradient norm is wrong there under tensor parallelism"
            )
        if self.deterministic and self.micro_batch_size == AUTO:
            raise UsageError(
                "--deterministic and --micro-batch-size auto: a trial does not choose the same every time; give a number"
            )
        self.milestones()

    def check_float8(self, sizes: ModelConfig) -> None:
        """UsageError where --fp8 is given and cannot be: bf16 may be set by a DeepSpeed JSON, `sizes` by the data."""
        if not self.fp8:
            return
        if not self.bf16:
            raise UsageError("--fp8 needs --bf16: all but the layers' products is computed in it")
        for name in ("hidden_size", "ffn_hidden_size"):
            if getattr(sizes, name) % (FLOAT8_MULTIPLE * self.tensor_model_parallel_size):
                raise UsageError(
                    f"--fp8: {name} {getattr(sizes, name)} of the model is no multiple of {FLOAT8_MULTIPLE} on each of"
                    f" {self.tensor_model_parallel_size} tensor-parallel ranks; leave it out or choose other sizes"
                )


@dataclass
class RunConfig(TrainConfig):
    """A pretraining run."""

    data_path: str = option(
        "sample_corpus/train", "region store to train on (a folder with manifest.json), or several with commas between them"
    )
    data_epochs: str = option("", "passes over each of several stores in one epoch, e.g. 1,1,2.5; default: one each")
    data_weights: str = option("", "instead of --data-epochs: shares of an epoch's samples for each store, e.g. 0.7,0.2,0.1")
    valid_data_path: str = option("", "region store for --eval-interval; none: no evaluation")
    eval_iters: int = option(10, "batches per evaluation")
    masking: str = option("paper", "rules of the paper or of the official code", ("paper", "official"))
    msm_on_mismatched: bool = option(True, "also predict masked words of mismatched captions")
    hard_negatives: float = option(
        0.2,
        "share of the mismatched captions drawn from hard_negatives.npy, when present",
        least=0,
        most=1,
    )
    objectives: str = option("msm,mrm,itm", "comma-separated losses to train on (for ablations)")
    language: str = option("", "train only on captions of this language tag (en, zh); default: all")
    segmenter: str = option(
        "characters", "what a Chinese word is for masking: each character, or the words of jieba", ("characters", "jieba")
    )
    balance_tokens: bool = option(True, "samples of like length meet, so that ranks get nearly equal numbers of tokens")

    SAME_SAMPLES: ClassVar[tuple[str, ...]] = (
        *TrainConfig.SAME_SAMPLES,
        *("masking", "language", "msm_on_mismatched", "hard_negatives", "objectives", "data_epochs", "data_weights"),
        *("balance_tokens", "segmenter"),
    )
    POSITIVE: ClassVar[tuple[str, ...]] = (*TrainConfig.POSITIVE, "eval_iters")

    def stores(self) -> list[str]:
        """The region stores of --data-path."""
        return split_paths(self.data_path)

    def objective_names(self) -> tuple[str, ...]:
        """The losses to train on; UsageError for a name that is none of msm, mrm, itm."""
        names = tuple(name for name in self.objectives.split(",") if name)
        for name in names:
            if name not in ("msm", "mrm", "itm"):
                raise UsageError(f"--objectives: unknown '{name}', expected some of msm,mrm,itm")
        return names

    def check(self) -> None:
        """UsageError for values that contradict each other or have no meaning."""
        super().check()
        if self.data_epochs and self.data_weights:
            raise UsageError("--data-epochs and --data-weights say the same thing in two ways; give one")
        if self.eval_interval and not self.valid_data_path:
            raise UsageError("--eval-interval needs --valid-data-path, the region store to evaluate on")
        self.objective_names()


STORE_FLAGS = ("data_path", "valid_data_path", "annotated_path", "valid_annotated_path")


def paths_of_stores(config: Any) -> list[str]:
    """List the paths that a configuration gives for region stores; tasks may have other data there."""
    given = (getattr(config, name, "") for name in STORE_FLAGS)
    return [path for text in given for path in split_paths(text)]


def split_paths(text: str) -> list[str]:
    """`a, b` -> [a, b]; the name of a folder may hold a comma where the whole is one."""
    if "," in text and os.path.isdir(text):
        return [text]
    return [path.strip() for path in text.split(",") if path.strip()]


def flag(name: str) -> str:
    """`data_path` -> `--data-path`."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known name nearest to a wrong one, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def read_text(path: str | Path, what: str) -> str:
    """A text file's content; UsageError naming `what` when it cannot be read."""
    try:
        with reading(path):
            return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what}: {path} is no text in UTF-8 (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path} ({error.strerror})") from error


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; UsageError naming `what` when it is missing or malformed."""
    text = read_text(path, what)
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: {path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{what}: {path} holds a {type(value).__name__}, expected an object")
    return value


def refuse_constant(name: str) -> None:
    """ValueError for NaN, Infinity and -Infinity, which Python's reader takes for JSON."""
    raise ValueError(f"{name} is no number")
