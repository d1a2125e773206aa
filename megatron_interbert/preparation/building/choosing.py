"""Load the detector that the user names."""

import dataclasses
import os
import socket
from urllib.parse import urlsplit

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.detectors import (
    TORCHVISION,
    Detector,
    DetectorChoice,
    TransformersDetector,
)
from megatron_interbert.preparation.building.faster_rcnn import TorchvisionDetector
from megatron_interbert.preparation.building.grids import GridDetector, PooledDetector

SECONDS = 10.0  # to wait for the hub


def load_detector(choice: DetectorChoice) -> Detector:
    """Load the chosen detector or backbone; its device is taken with the first picture.

    Raises UsageError if it cannot be loaded.
    """
    if not choice.backbone:
        return load_boxes(choice)

    refuse_unreachable_hub(choice.backbone, choice.backbone_revision, "--backbone")
    try:
        if not choice.name:
            return GridDetector(choice)

        boxes = load_boxes(dataclasses.replace(choice, backbone=""))
        return PooledDetector(choice, boxes)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--backbone {choice.backbone} needs the package {error.name}: pip install"
            " 'megatron_interbert[features]'"
        ) from error


def load_boxes(choice: DetectorChoice) -> Detector:
    """Load a detector."""
    if choice.name.startswith(TORCHVISION):
        return TorchvisionDetector(choice)
    if choice.weights:
        raise UsageError(
            f"--weights {choice.weights}: only for torchvision detectors, but {choice.name} has its"
            " own weights; leave --weights out"
        )

    refuse_unreachable_hub(choice.name, choice.revision)
    try:
        return TransformersDetector(choice)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--detector {choice.name} needs the package {error.name}: pip install"
            " 'megatron_interbert[features]'"
        ) from error


def refuse_unreachable_hub(name: str, revision: str, flag: str = "--detector") -> None:
    """Raise UsageError if a model has to come from the hub, which cannot be reached:
    transformers would try for minutes, and then doubt the name.
    """
    if os.path.isdir(name):
        return

    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    except ValueError as error:  # of huggingface_hub: the name can be no repository's
        raise UsageError(f"{flag} {name[:200]}: neither a folder nor a name on the hub") from error

    proxy = any(variable.lower() == "https_proxy" for variable in os.environ)
    if isinstance(cached, str) or proxy or constants.HF_HUB_OFFLINE:
        return

    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), SECONDS).close()
    except OSError as error:
        raise UsageError(
            f"{flag} {name}: no such folder, and {address.hostname} cannot be reached"
            f" ({error.strerror or error}); download the model where there is a network (hf"
            f" download {name}) and give its folder"
        ) from error
