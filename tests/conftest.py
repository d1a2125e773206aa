"""Set up what many test files share."""

import os
import signal

os.environ["DS_ACCELERATOR"] = "cpu"  # even with a GPU; tests/gpu ask torch for theirs
os.environ["OMP_NUM_THREADS"] = "1"  # several files are tested at once, on all cores

import pytest

from tests.corpus import write_store

# Shells start background jobs with SIGINT ignored, which all processes of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files are tested in parallel. Those that take half a minute or more start first, the longest at
# the head, so that none runs alone at the end.
LONGEST_FILES = (
    "test_slurm.py",
    "test_dry_run.py",
    "test_together.py",
    "test_readme.py",
    "test_benchmark.py",
    "test_launch.py",
    "test_convert.py",
    "test_shared_work.py",
    "test_field_tasks.py",
    "test_locked_environment.py",
    "test_nothing_lost.py",
    "test_odd_input.py",
    "test_task_world.py",
    "test_memory.py",
    "test_resume.py",
    "test_real_images.py",
    "test_topologies.py",
    "test_help.py",
    "test_layouts.py",
    "test_defaults.py",
    "test_triton.py",
    "test_ablate.py",
    "test_build_features_faults.py",
    "test_injection.py",
    "test_experts.py",
    "test_environment.py",
    "test_tiles.py",
    "test_captions.py",
    "test_finetune.py",
    "test_experts_resume.py",
    "test_swap.py",
    "test_experts_faults.py",
    "test_loader.py",
    "test_retrieval.py",
    "test_hostfile.py",
    "test_extract_features.py",
    "test_acceptance.py",
    "test_wheel.py",
    "test_faults.py",
    "test_abuse.py",
    "test_traffic.py",
    "test_stops.py",
    "test_peaks.py",
    "test_update.py",
    "test_fast_path.py",
    "test_limits.py",
    "test_first_weights.py",
    "test_shared_weights.py",
    "test_streams.py",
    "test_zero_options.py",
    "test_patch_features.py",
    "test_cluster_features.py",
)


def pytest_collection_modifyitems(items):
    """Put the files that take longest first; keep the order of all others."""
    rank = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Write a small region store that no test changes; a file that needs another overrides this
    fixture.
    """
    return write_store(tmp_path_factory.mktemp("data") / "store")
