"""Hold and check the flags of plan: a model, its samples and the devices."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_interbert.config.model import ModelConfig
from megatron_interbert.config.options import ABOVE_0, Flags, option, redefault
from megatron_interbert.config.settings import ModelSettings
from megatron_interbert.config.words import span
from megatron_interbert.errors import UsageError
from megatron_interbert.files import check_writable
from megatron_interbert.model.presets import (
    PRESETS,
    load_model_config,
    with_experts,
    with_usual_data,
)
from megatron_interbert.planning.layout import Load
from megatron_interbert.planning.search import GIB, Batches, Room
from megatron_interbert.planning.timing import MACHINES, Machine


@dataclass
class Options(Flags):
    """Hold the flags of plan: a model, its samples and the devices."""

    GROUP: ClassVar[str] = "model"

    model: str = option("base", f"preset ({', '.join(PRESETS)}) or a JSON file of sizes")
    experts: int = redefault(ModelSettings, "experts", 0)
    prototypes: int = redefault(ModelSettings, "prototypes", 0)
    share_layers: bool = redefault(ModelSettings, "share_layers", False)
    words: tuple[int, int] = option(
        (8, 20), "tokens per sample with [CLS] and [SEP], from-to; default: 8-20", read=span
    )
    regions: tuple[int, int] = option(
        (36, 36), "regions per sample, from-to; default: 36", read=span
    )
    micro_batch_size: int = option(
        0,
        "samples per forward pass; default: as many as fit",
        group="optimisation",
    )
    global_batch_size: int = option(
        0,
        "samples per step; limits the micro-batch to a rank's share; 0: no limit",
        least=0,
        group="optimisation",
    )
    gpus: int = option(8, "devices in all", least=ABOVE_0, group="parallelism")
    host_memory: float = option(
        0.0,
        "GiB of each node for offload; 0: no offload",
        least=0,
        group="parallelism",
    )
    nvme_space: float = option(
        0.0, "GB of each node's disk for offload; 0: none", least=0, group="parallelism"
    )
    gpu_memory: float = option(
        80.0, "GiB per device; default: that of --device", least=ABOVE_0, group="parallelism"
    )
    device: str = option(
        "", "device by name, to predict speed too", ("", *MACHINES), group="machine"
    )
    gpus_per_node: int = option(8, "devices of a node", least=1, group="machine")
    efficiency: float = option(
        0.45,
        "share of the device's peak that matrix products reach",
        least=ABOVE_0,
        most=1,
        group="machine",
    )
    link_bandwidth: float = option(
        0.0, "GB/s between devices of a node; default: that of --device", least=0, group="machine"
    )
    network_bandwidth: float = option(
        0.0,
        "GB/s of each device's share of the network; default: that of --device",
        least=0,
        group="machine",
    )
    overlap: float = option(
        0.0,
        "share of ZeRO's communication that the backward pass hides",
        least=0,
        most=1,
        group="machine",
    )
    host_link_bandwidth: float = option(
        0.0,
        "GB/s between a device and its host; default: that of --device",
        least=0,
        group="machine",
    )
    nvme_bandwidth: float = option(
        3.0, "GB/s of each device's share of a node's disks", least=ABOVE_0, group="machine"
    )
    reserve: float = option(0.1, "share of the memory to leave free", group="parallelism")
    fp32: bool = option(False, "compute in 32 bits instead of 16", group="parallelism")
    sequence_parallel: bool = option(
        False,
        "tensor-parallel ranks also split the tokens between layers",
        group="parallelism",
    )
    kernels: str = option("triton", "fused kernels", ("triton", "torch"), group="parallelism")
    search: str = option(
        "", "folder for the flags and DeepSpeed's JSON of the fastest layout", group="logging"
    )
    output: str = option("", "JSON file for the figures", group="logging")

    def check(self) -> None:
        """Raise UsageError for settings that contradict each other or have no meaning."""
        super().check()
        if "micro_batch_size" in self.given and self.micro_batch_size < 1:
            raise UsageError(f"--micro-batch-size is {self.micro_batch_size}, expected more than 0")
        if not 0 <= self.reserve < 1:
            raise UsageError(
                f"--reserve is {self.reserve}, expected a share of the memory from 0 up to 1, such"
                " as 0.1"
            )
        if self.nvme_space and not self.host_memory:
            raise UsageError("--nvme-space needs --host-memory, through which all data pass")
        if self.search and not self.device:
            raise UsageError("--search needs --device, by whose speed it chooses")
        if self.search:
            check_writable(Path(self.search), "--search")

    def sizes(self) -> tuple[ModelConfig, str]:
        """Return the model, and a note if sizes that follow from data are assumed, else ""."""
        sizes = load_model_config(self.model)
        sizes = with_experts(sizes, self.experts, self.prototypes, self.share_layers)

        return with_usual_data(sizes)

    def changes_of_model(self) -> dict[str, Any]:
        """Return the flags that change the model, by name, as far as they are given."""
        names = ("experts", "prototypes", "share_layers")
        return {name.replace("_", "-"): getattr(self, name) for name in names if name in self.given}

    def machine(self) -> Machine | None:
        """Return the device with what flags change of it; None without --device."""
        if not self.device:
            return None

        found = MACHINES[self.device]

        return dataclasses.replace(
            found,
            per_node=self.gpus_per_node,
            efficiency=self.efficiency,
            overlap=self.overlap,
            link_gb_s=self.link_bandwidth or found.link_gb_s,
            network_gb_s=self.network_bandwidth or found.network_gb_s,
            host_link_gb_s=self.host_link_bandwidth or found.host_link_gb_s,
            disk_gb_s=self.nvme_bandwidth,
        )

    def room(self) -> Room:
        """Return what each device's rank may take."""
        ranks = min(self.gpus, self.gpus_per_node)
        return Room(
            self.gpu_memory * GIB * (1 - self.reserve),
            self.host_memory * GIB / ranks,
            self.nvme_space * 1e9 / ranks,
        )

    def batches(self) -> Batches:
        """Return the batch sizes, and a sample of mean length."""
        sample = Load(1, sum(self.words) / 2, sum(self.regions) / 2, self.words[1], self.regions[1])
        return Batches(sample, self.micro_batch_size, self.global_batch_size)
