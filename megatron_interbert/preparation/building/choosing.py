"""Load the detector that the user names."""

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.detectors import (
    TORCHVISION,
    Detector,
    DetectorChoice,
    TransformersDetector,
)
from megatron_interbert.preparation.building.faster_rcnn import TorchvisionDetector


def load_detector(choice: DetectorChoice) -> Detector:
    """Load the chosen detector; its device is taken with the first picture.

    Raises UsageError if it cannot be loaded.
    """
    if choice.name.startswith(TORCHVISION):
        return TorchvisionDetector(choice)
    if choice.weights:
        raise UsageError(
            f"--weights {choice.weights}: only for torchvision detectors, but {choice.name} has its"
            " own weights; leave --weights out"
        )

    try:
        return TransformersDetector(choice)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--detector {choice.name} needs the package {error.name}: pip install"
            " 'megatron_interbert[features]'"
        ) from error
