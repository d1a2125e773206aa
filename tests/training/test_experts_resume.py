"""Test that a checkpoint with experts of any layout resumes on any other, and that damage to it is
found.
"""

import json
import shutil
from pathlib import Path

import pytest

from megatron_interbert.errors import UsageError
from tests.dist import run_on_ranks
from tests.training.test_topologies import (
    LAST,
    SAVED,
    Run,
    check_every_bit,
    check_whole_copy,
    write_corpus,
)

EXPERTS = {"experts": 8, "prototypes": 2, "ema_decay": 0.9}
# processes -> (tensor-parallel, expert-parallel size, ZeRO stage)
LAYOUTS = {
    4: [(2, 4, 3), (1, 4, 1), (2, 2, 2), (1, 2, 3), (2, 1, 3)],
    2: [(2, 1, 1), (1, 2, 0), (2, 2, 3)],
    1: [(1, 1, 0)],
}


def name_of(processes, layout):
    tensor, expert, stage = layout
    return f"dp{processes // tensor}-tp{tensor}-ep{expert}-zero{stage}"


def start(store, folder, layout, source, **changes):
    """Start a run on a layout, of the model that was saved on `source`: the second one shares its
    layers.
    """
    from megatron_interbert.machines.processes import start_processes

    start_processes()
    tensor, expert, stage = layout
    settings = {**EXPERTS, "share_layers": source == LAYOUTS[4][1]}

    return Run(store, folder, tensor, stage, expert=expert, **settings, **changes)


def make_checkpoints(store, folder):
    """Train three steps on two layouts, save, and train on."""
    from megatron_interbert.training.fragments import FragmentedState

    for layout in LAYOUTS[4][:2]:
        name = name_of(4, layout)
        run = start(store, f"{folder}/{name}", layout, layout)
        run.engine.ema.update(1, FragmentedState(run.engine).tensors())
        run.train(SAVED)
        run.engine.ema.update(SAVED, FragmentedState(run.engine).tensors())
        run.save()
        undisturbed = run.train(LAST)
        if run.state.is_main:
            Path(f"{folder}/{name}.json").write_text(json.dumps(undisturbed))


def resume_everywhere(store, folder, processes):
    """Resume both checkpoints on the layouts of this world size."""
    from megatron_interbert.training.fragments import FragmentedState
    from megatron_interbert.weights.reader import CheckpointReader

    for source in LAYOUTS[4][:2]:
        expected = json.loads(Path(f"{folder}/{name_of(4, source)}.json").read_text())
        path = Path(folder, name_of(4, source), f"global_step{SAVED}")

        for layout in LAYOUTS[processes]:
            run = start(store, f"{folder}/resumed", layout, source, load=path)
            where = f"{name_of(4, source)} -> {name_of(processes, layout)}"
            check_every_bit(CheckpointReader(path), FragmentedState(run.engine), run.state, where)
            if layout[2]:
                check_whole_copy(run)

            for step, (loss, norm) in run.train(LAST).items():
                theirs = expected[str(step)]
                assert abs(loss - theirs[0]) < 2e-5 * abs(theirs[0]), (where, step, loss, theirs)
                assert abs(norm - theirs[1]) < 2e-4 * abs(theirs[1]), (where, step, norm, theirs)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    store, folder = write_corpus(tmp_path_factory.mktemp("experts"))
    run_on_ranks(4, make_checkpoints, store, folder)

    return store, folder


@pytest.mark.parametrize("processes", LAYOUTS)
def test_layouts_resume_from_one_another(corpus, processes):
    run_on_ranks(processes, resume_everywhere, *corpus, processes)


def test_a_flipped_bit_and_a_lost_expert_are_found(corpus, tmp_path):
    from megatron_interbert.weights.manifest import verify
    from megatron_interbert.weights.reader import CheckpointReader

    source = Path(corpus[1], name_of(4, LAYOUTS[4][0]), f"global_step{SAVED}")
    path = tmp_path / source.name
    shutil.copytree(source, path)
    assert verify(path) is None

    name = "interaction.layers.0.mlp.experts.up.weight"
    reader = CheckpointReader(path)
    piece = reader._pieces("weight", None, name)[1][-1]
    file = piece.file.path
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert verify(path) == f"{file.name} has another sha256"

    file.unlink()
    with pytest.raises(UsageError, match=f"{file.name}: missing"):
        CheckpointReader(path).get(name)
