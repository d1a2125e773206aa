"""Choose the device of this process, by the rule that DeepSpeed follows too.

DS_ACCELERATOR=cpu or cuda decides if it is set, else whether torch sees a GPU (AMD's included:
torch calls those cuda). `check_deepspeed` compares DeepSpeed's own choice with this one.
"""

import os
import sys
from pathlib import Path

import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.parallel.launch import local_place, node_name

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
ACCELERATOR = "DS_ACCELERATOR"


def gpus() -> int:
    """Count the GPUs that this process may use; 0 means that it computes on the CPU.

    Raises UsageError if DS_ACCELERATOR names an unknown device, or GPUs that torch does not see.
    """
    asked = os.environ.get(ACCELERATOR, "")
    if asked not in ("", "cpu", "cuda"):
        raise UsageError(
            f"{ACCELERATOR} is '{asked}', expected cpu or cuda (which stands for AMD's GPUs too);"
            " unset it to take the GPUs that torch sees, else the CPU"
        )

    if asked == "cpu":
        return 0

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not there:
        reason = why_no_gpu() or "there is none on this machine"
        raise UsageError(
            f"{ACCELERATOR} is cuda, but torch {torch.__version__} sees no GPU on {node_name()}"
            f" ({reason}); unset it, or set it to cpu, to train on the CPU"
        )

    return there


def this_device() -> torch.device:
    """Choose the GPU of this process's local rank, else the CPU, and make a GPU torch's current
    device.

    If the launcher shows each process only its own GPU (srun --gpus-per-task=1), that is number 0
    for all of them. Raises UsageError, the same on all ranks of a machine, if there are more ranks
    than GPUs.
    """
    there = gpus()
    if not there:
        return torch.device("cpu")

    place = local_place()
    one_each = there == 1 and not place.sees_all_devices
    number = 0 if one_each else place.rank
    if not one_each and max(place.size, number + 1) > there:
        raise UsageError(
            f"{max(place.size, number + 1)} processes on {node_name()}, but torch sees {there}"
            f" GPU{'s' * (there > 1)} there; start {there} (deepspeed --num_gpus {there}, torchrun"
            f" --nproc-per-node {there}), or set {ACCELERATOR}=cpu to train on the CPU"
        )

    device = torch.device("cuda", number)
    torch.cuda.set_device(device)

    return device


def gpu_identity(device: torch.device) -> str:
    """Return the UUID of the GPU behind a device, whatever its number here; empty for the CPU."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))


def why_no_gpu() -> str:
    """Explain why torch sees no GPU on a machine that seems to have one; "" if all is well."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is '{hidden}'"
    if not NVIDIA_DRIVER.exists():
        return ""
    if torch.version.cuda is None:
        return "it has an NVIDIA driver, but this torch is a CPU build"

    return f"its NVIDIA driver does not support CUDA {torch.version.cuda}, which this torch needs"


def unused_gpu_note() -> str:
    """Return a note for a user whose GPU will stay idle unintentionally; empty if all is well."""
    if os.environ.get(ACCELERATOR) or "CUDA_VISIBLE_DEVICES" in os.environ or gpus():
        return ""

    reason = why_no_gpu()
    if not reason:
        return ""

    return (
        f"note: training on the CPU of {node_name()}: {reason} (torch {torch.__version__});"
        f" install a matching build of torch, or set {ACCELERATOR}=cpu if this is intended"
    )


def report_gpus() -> None:
    """Print the number of GPUs for a shell script, and a note to stderr if one stays idle."""
    print(gpus())
    if note := unused_gpu_note():
        print(note, file=sys.stderr)


def check_deepspeed(device: torch.device) -> None:
    """Raise UsageError if DeepSpeed has chosen another kind of device than this program."""
    from deepspeed.accelerator import get_accelerator

    theirs = get_accelerator().device_name()
    if theirs != device.type:
        raise UsageError(
            f"DeepSpeed would use '{theirs}' on {node_name()}, this program '{device.type}';"
            f" set {ACCELERATOR}={device.type} before the start"
        )
