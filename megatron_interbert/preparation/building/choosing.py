"""From the detector that the user names to one that is loaded."""

from megatron_interbert.errors import UsageError
from megatron_interbert.preparation.building.detectors import (
    TORCHVISION,
    Detector,
    DetectorChoice,
    TransformersDetector,
)
from megatron_interbert.preparation.building.faster_rcnn import TorchvisionDetector


def load_detector(choice: DetectorChoice) -> Detector:
    """Load the detector that the user chose, on its device.

    UsageError when there is none of that name.
    """
    if choice.name.startswith(TORCHVISION):
        return TorchvisionDetector(choice)
    if choice.weights:
        raise UsageError(
            f"--weights {choice.weights}: only for torchvision detectors; {choice.name} brings"
            " its own"
        )

    try:
        return TransformersDetector(choice)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--detector {choice.name} needs {error.name}: pip install"
            " 'megatron_interbert[features]'"
        ) from error
