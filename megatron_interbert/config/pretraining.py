"""Hold and check the settings of pretraining runs."""

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.objectives import (
    USUAL,
    USUAL_WEIGHTS,
    WITHOUT_LABELS,
    check_mix,
    check_name,
    read_objectives,
)
from megatron_interbert.config.options import AUTO, FREE, SAME, setting
from megatron_interbert.config.stores import split_paths
from megatron_interbert.config.training import TrainConfig
from megatron_interbert.config.weights import read_weights
from megatron_interbert.errors import UsageError


@dataclass
class RunConfig(TrainConfig):
    """Hold the settings of a pretraining run."""

    GROUP: ClassVar[str] = "data"

    data_path: str = setting(
        "sample_corpus/train",
        "region store to train on (a folder with manifest.json), or several, comma-separated",
        FREE,
        may_differ=True,
        names_store=True,
    )
    data_epochs: str = setting(
        "", "passes over each of several stores per epoch, e.g. 1,1,2.5; default: one each", SAME
    )
    data_weights: str = setting(
        "",
        "instead of --data-epochs: each store's share of an epoch's samples, e.g. 0.7,0.2,0.1",
        SAME,
    )
    valid_data_path: str = setting(
        "",
        "region store for --eval-interval; without it there is no evaluation",
        FREE,
        may_differ=True,
        names_store=True,
    )
    language: str = setting(
        "", "train only on captions with this language tag (en, zh); default: all", SAME
    )
    questions: str = setting(
        "",
        "YAML with the files of questions for the objective vqa, by the task whose format they have"
        " (vqa, gqa, vgqa), as in --task-flags of finetune multitask",
        FREE,
    )
    masking: str = setting(
        "paper", "masking of the paper or of the official code", SAME, ("paper", "official")
    )
    region_masking: str = setting(
        "anchors",
        "which regions are hidden: single ones with those that overlap them (--masking), or all in"
        " a rectangle of a tenth to three tenths of the image, for cells of a grid, whose"
        " neighbours give them away",
        SAME,
        ("anchors", "blocks"),
    )
    region_labels: str = setting(
        "auto",
        "what classes of regions are: the detector's, or clusters of their features"
        " (interbert cluster-features); auto: clusters where there are no classes",
        SAME,
        ("auto", "detector", "clusters"),
    )
    msm_on_mismatched: bool = setting(
        True, "also predict masked words of mismatched captions", SAME
    )
    hard_negatives: float = setting(
        0.2,
        "share of mismatched captions drawn from hard_negatives.npy, if present",
        SAME,
        least=0,
        most=1,
    )
    segmenter: str = setting(
        "characters",
        "what counts as a Chinese word in masking: each character, or jieba's words",
        SAME,
        ("characters", "jieba"),
    )
    balance_tokens: bool = setting(
        True, "batch samples of similar length, to give ranks nearly equal numbers of tokens", SAME
    )
    objectives: str = setting(
        ",".join(USUAL),
        "losses to train on, comma-separated: msm (words), mrm and mrc (classes of regions: the"
        " whole distribution, the most likely one), attributes (of regions), mrfr (features of"
        " regions), itm (matching), vqa (answers to --questions), wra (word-region alignment)",
        SAME,
        group="optimisation",
        fitted=True,
    )
    objective_weights: str = setting(
        "",
        "factors of losses, such as mrfr:0.5,wra:0.1; default: 0.1 for wra, else 1",
        SAME,
        group="optimisation",
    )
    objective_mix: str = setting(
        "",
        "train each step on one objective, drawn by these weights, such as itm:2,msm:2,mrfr:1"
        " (UNITER); its pairs are masked only for it; default: all in every step",
        SAME,
        group="optimisation",
    )
    mrfr_reduction: str = setting(
        "mean",
        "mean of a region's squared errors (UNITER), or their sum (the official code), which is"
        " larger by the number of features",
        SAME,
        ("mean", "sum"),
        group="optimisation",
    )
    mrfr_normalise: bool = setting(
        False,
        "scale the features of each region to mean 0 and variance 1 before they are predicted",
        SAME,
        group="optimisation",
    )
    mrc_confidence: bool = setting(
        False,
        "weigh each region's mrc loss by the detector's confidence (LXMERT, VOLTA)",
        SAME,
        group="optimisation",
    )
    capacity_factor: float = setting(
        0.0,
        "most tokens of an expert, over its even share of a routing group; 0: no limit",
        SAME,
        least=0,
        group="model",
    )
    balance_coefficient: float = setting(
        0.0,
        "weight of the loss that balances the load of experts within routing groups (usual: 0.01)",
        SAME,
        least=0,
        group="optimisation",
    )
    routing_group: int = setting(
        64,
        "consecutive samples of a data partition within which capacity and balance act",
        SAME,
        least=1,
        group="model",
    )
    eval_iters: int = setting(10, "batches per evaluation", FREE, least=1, group="logging")

    def stores(self) -> list[str]:
        """Return the paths of the region stores in --data-path."""
        return split_paths(self.data_path)

    @property
    def routes_in_groups(self) -> bool:
        """Check whether the routing of a token depends on others, those of its routing group."""
        return self.capacity_factor > 0 or self.balance_coefficient > 0

    def check_routing(self, sizes: ModelConfig) -> None:
        """Raise UsageError if there is nothing to limit or balance."""
        if self.routes_in_groups and not sizes.experts:
            name = "capacity_factor" if self.capacity_factor else "balance_coefficient"
            raise UsageError(
                f"{self.told(name)}, but the model has no experts; leave it out, or give --experts"
            )

    @property
    def micro_batch_multiple(self) -> int:
        """Return of how many samples a micro-batch must be a multiple, to hold whole routing groups
        of each partition of a rank.
        """
        if not self.routes_in_groups:
            return 1
        return max(self.data_partitions // self.data_parallel_size, 1) * self.routing_group

    def fit_batches(self, data_parallel_size: int) -> None:
        """Fit batch sizes that were not given to ranks and routing groups."""
        self.fit_to_groups()
        super().fit_batches(data_parallel_size)

    def fit_partitions(self, samples: int) -> int:
        """Settle into how many partitions `samples` are cut, and return the number."""
        self.fit_partitions_to_groups()
        return super().fit_partitions(samples)

    def fit_to_groups(self) -> None:
        """Fit partitions, and a micro-batch that nothing else decides, to routing groups."""
        self.fit_partitions_to_groups()
        if self.is_default("micro_batch_size") and not self.global_batch_size:
            multiple = self.micro_batch_multiple
            whole = -(-self.micro_batch_size // multiple) * multiple
            self.fit("micro_batch_size", whole, f"whole routing groups, {self.told_groups()}")

    def fit_partitions_to_groups(self) -> None:
        """Let a rank have one partition or a power of 2 that divides the routing groups of a given
        micro-batch, unless the number of partitions was given.
        """
        if not self.routes_in_groups or not self.is_default("data_partitions"):
            return

        ranks = self.data_parallel_size
        told = self.micro_batch_size != AUTO and not self.is_default("micro_batch_size")
        groups = max(self.micro_batch_size // self.routing_group, 1) if told else 1
        most = max(self.data_partitions // ranks, 1)
        each = math.gcd(groups, 1 << (most.bit_length() - 1))

        self.fit(
            "data_partitions",
            ranks * each,
            f"whole routing groups of {self.routing_group} samples; the run can be resumed on"
            f" {ranks * each} data-parallel rank{'s' * (ranks * each > 1)} at most",
        )

    def told_groups(self) -> str:
        """Return of how many samples a micro-batch must be a multiple, and why."""
        return (
            f"{self.micro_batch_multiple} = {self.told('data_partitions')} / data-parallel size"
            f" {self.data_parallel_size} x {self.told('routing_group')}"
        )

    def refuse_cut_groups(self, batch: str, samples: int, name: str) -> None:
        """Raise UsageError if `samples`, which `batch` describes, would not be whole routing
        groups; `name` is the flag that changes them.
        """
        if samples % self.micro_batch_multiple == 0:
            return

        ranks = self.data_parallel_size
        anew = "a smaller --routing-group"
        if self.data_partitions > ranks and samples % self.routing_group == 0:
            anew = f"--data-partitions {ranks} or {anew}"

        raise UsageError(
            f"{batch} would cut routing groups: expected a multiple of {self.told_groups()}; give"
            f" another {name} or, in a new run, {anew}"
        )

    def check_routing_groups(self) -> None:
        """Raise UsageError if a micro-batch would not hold whole routing groups."""
        if not self.is_default("global_batch_size"):
            self.check_share(self.global_batch_size // self.data_parallel_size)

        told = self.told("micro_batch_size")
        self.refuse_cut_groups(told, self.micro_batch_size, "--micro-batch-size")

    def check_share(self, share: int) -> None:
        """Raise UsageError if no micro-batch could divide a rank's share of the global batch and
        hold whole routing groups.
        """
        told = f"a rank's share of the global batch, {share} samples,"
        self.refuse_cut_groups(told, share, "--global-batch-size")

    def objective_names(self) -> tuple[str, ...]:
        """Return the losses to train on; raises UsageError for an unknown name."""
        return read_objectives(self.objectives)

    def weights_of_objectives(self) -> dict[str, float]:
        """Return the factor of each loss to train on."""
        given = read_weights(self.objective_weights, "--objective-weights", check_name)
        return dict.fromkeys(self.objective_names(), 1.0) | USUAL_WEIGHTS | given

    def mix(self) -> dict[str, float]:
        """Return by which weights the objective of a step is drawn; empty: all in every step."""
        return read_weights(self.objective_mix, "--objective-mix", check_name)

    def fit_objectives(self, has_labels: bool) -> None:
        """Take objectives that need no classes for regions without labels, and those of
        --objective-mix, unless --objectives are given.
        """
        self.fit_to_mix()
        if self.is_default("objectives") and not self.objective_mix and not has_labels:
            reason = "the regions have no class labels to predict"
            self.fit("objectives", ",".join(WITHOUT_LABELS), reason)

        self.check_objectives()

    def fit_to_mix(self) -> None:
        """Take the objectives of --objective-mix, unless --objectives are given."""
        if self.objective_mix and self.is_default("objectives"):
            self.fit("objectives", ",".join(self.mix()), "those of --objective-mix")

    def check_objectives(self) -> None:
        """Raise UsageError unless all flags of objectives are about those trained on."""
        names = self.objective_names()
        if "vqa" in names and not self.questions:
            raise UsageError("--objectives vqa needs --questions, a YAML with their files")
        if self.questions and "vqa" not in names:
            raise UsageError(
                f"--questions {self.questions}: nothing is trained on their answers; add vqa to"
                " --objectives"
            )

        for name in read_weights(self.objective_weights, "--objective-weights", check_name):
            if name not in names:
                raise UsageError(
                    f"--objective-weights: {name} is not among --objectives {','.join(names)}"
                )
        if mix := self.mix():
            check_mix(mix, names)

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()

        if self.data_epochs and self.data_weights:
            raise UsageError(
                "--data-epochs and --data-weights set the same thing in two ways; give only one"
            )

        if self.eval_interval and not self.valid_data_path:
            raise UsageError(
                "--eval-interval needs --valid-data-path, the region store to evaluate on"
            )

        self.fit_to_mix()
        if self.objective_mix or not self.is_default("objectives"):
            self.check_objectives()  # else once it is known whether regions have classes
        else:
            read_weights(self.objective_weights, "--objective-weights", check_name)
