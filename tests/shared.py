"""Locate real data and the official model's answers beside the checkout; tests that need them are
skipped only if they are absent.
"""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="../shared (real data, official answers) is not here"
)
ORACLE = SHARED / "oracle" / "official_small"


def needs_half_precision():
    """Return a mark for tests that train in float16, which not every processor supports."""
    from megatron_interbert.training.engine import half_precision_supported

    return pytest.mark.skipif(
        not half_precision_supported(), reason="this processor cannot compute in float16"
    )
