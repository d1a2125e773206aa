"""Test that processes on several machines share the preparation of data, that others do the work of
killed ones, and that the result has the same bytes whoever has made it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_interbert.preparation.sharing import Claims, Team, WorkIsOver
from tests.launching import ends, free_ports, launch, start, start_ranks
from tests.preparation.formats import lxmert_line, made_up_images
from tests.tools.building import build, content, refused
from tests.tools.test_extract_features import PHOTOS, make_detector

MAIN = "megatron_interbert"
TIMEOUT = ("--claim-timeout", 4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write features and captions of 3,000 images; return flags of a build, and the hashes of the
    store that one process builds.
    """
    folder = tmp_path_factory.mktemp("corpus")
    images = made_up_images(3000, features=64)
    (folder / "x.tsv").write_text("".join(map(lxmert_line, images)))
    (folder / "c.tsv").write_text(
        "".join(f"{image['image_id']}\ta cat by {image['image_id']}\n" for image in images[50:])
    )
    flags = (folder / "x.tsv", "--captions", folder / "c.tsv", "--images-per-shard", 10)
    build(folder / "expected", *flags, "--workers", 1)

    return flags, content(folder / "expected")


def agent(number, port, *command, nodes=2, ranks=2):
    """Start torchrun as on one of several machines."""
    where = ("--nnodes", nodes, "--node-rank", number, "--nproc-per-node", ranks)
    meeting = ("--master-addr", "127.0.0.1", "--master-port", port)
    run = (sys.executable, "-m", "torch.distributed.run", *where, *meeting, "-m", MAIN)

    return start(*run, *command, warm=False, SLURMD_NODENAME=f"node{number}")


def kill_node(number):
    """Kill all processes of a machine at once, as a power failure does."""
    mark = f"SLURMD_NODENAME=node{number}\0".encode()
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and mark in (place / "environ").read_bytes():
                os.kill(int(place.name), signal.SIGKILL)


def wait_for(folder, pattern, number):
    """Wait until so many files of a kind are there."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < number:
        assert time.monotonic() < deadline, sorted(folder.iterdir())[:5]
        time.sleep(0.02)


def test_a_node_is_killed_and_the_other_does_its_work(corpus, tmp_path):
    """Check two torchrun agents of two ranks each, of which the second dies with units taken."""
    flags, expected = corpus
    port = free_ports(1)[0]
    output = tmp_path / "store"
    command = ("build-features", *flags, "--output", output, "--workers", 1, *TIMEOUT)
    agents = [agent(number, port, *command) for number in (0, 1)]
    wait_for(tmp_path / "store.partial", "shard-*.h5.json", 40)
    kill_node(1)
    wait_for(tmp_path, "store/manifest.json", 1)
    deadline = time.monotonic() + 10
    while (output / "finish.claim").exists():  # removed just after the folder got its name
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert content(output) == expected
    assert not (tmp_path / "store.partial").exists()
    kill_node(0)  # torchrun itself waits for the lost machine, for five minutes
    (_, out, err), (killed, _, _) = ends(agents)
    assert killed == -signal.SIGKILL
    assert "Traceback" not in err, err
    assert out.count("captions: ") <= 1, "one rank of both machines has read them"


def test_all_are_killed_and_others_resume(corpus, tmp_path):
    """Check three ranks that die at once, two of them started again on other machines, and a single
    process that wants the folder meanwhile.
    """
    flags, expected = corpus
    output = tmp_path / "store"
    command = ("build-features", *flags, "--output", output, "--workers", 1, *TIMEOUT)
    ranks = start_ranks(*[command] * 3, module=MAIN)
    wait_for(tmp_path / "store.partial", "shard-*.h5.json", 20)
    for rank in ranks:
        rank.kill()
    ends(ranks)

    again = start_ranks(command, command, module=MAIN)
    wait_for(tmp_path / "store.partial", "shard-*.h5.json", 60)
    assert "another process is building there" in refused(*flags, "--output", output)
    found = ends(again)
    assert [code for code, _, _ in found] == [0, 0], found
    assert content(output) == expected


def test_bad_input_ends_all_ranks_in_one_line(corpus, tmp_path):
    flags, _ = corpus
    (tmp_path / "c.tsv").write_text("no-image\ta cat\n")
    command = ("build-features", flags[0], "--captions", tmp_path / "c.tsv")
    ranks = start_ranks(*[(*command, "--output", tmp_path / "store")] * 2, module=MAIN)
    found = ends(ranks)
    assert [code for code, _, _ in found] == [2, 2]
    for _, _, err in found:
        assert "Traceback" not in err
        assert "none of the 3000 images has a caption" in err
    assert not (tmp_path / "store").exists()


def test_photos_are_shared_among_ranks(tmp_path):
    model, processor = make_detector("detr")
    model.save_pretrained(tmp_path / "detr")
    processor.save_pretrained(tmp_path / "detr")
    flags = ("extract-features", PHOTOS, "--detector", tmp_path / "detr", "--device", "cpu")
    flags = (*flags, "--images-per-shard", 4, "--batch-size", 4, "--workers", 1)
    code, out, err = launch(sys.executable, "-m", MAIN, *flags, "--output", tmp_path / "one")
    assert code == 0, out + err
    command = (*flags, "--output", tmp_path / "two", *TIMEOUT)
    ranks = start_ranks(command, command, module=MAIN)
    wait_for(tmp_path / "two.partial", "shard-*.h5.json", 2)
    ranks[1].kill()
    (code, out, err), _ = ends(ranks)
    assert code == 0, out + err
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.parametrize("command", ["mine-negatives", "mine-neighbours"])
def test_mining_is_shared_among_machines(corpus, tmp_path, command):
    """Check two machines, one of which dies, and two that both live, against one process."""
    flags, _ = corpus
    stores = []
    for name in ("one", "two", "three"):
        build(tmp_path / name, flags[0], "--captions", flags[2], "--images-per-shard", 1000)
        stores.append(tmp_path / name)
    output = {"mine-negatives": "hard_negatives.npy", "mine-neighbours": "hard_images.npy"}[command]
    small = ("--block", 80, "--claim-timeout", 4)
    code, out, err = launch(sys.executable, "-m", MAIN, command, stores[0], *small)
    assert code == 0, out + err
    ranks = start_ranks(*[(command, stores[1], *small)] * 2, module=MAIN)
    wait_for(stores[1] / f"{output}.partial", "block-*.npy", 10)
    ranks[1].kill()
    (code, out, err), _ = ends(ranks)
    assert code == 0, out + err
    ranks = start_ranks(*[(command, stores[2], *small)] * 2, module=MAIN)
    assert [(code, err) for code, _, err in ends(ranks)] == [(0, "")] * 2
    for store in stores[1:]:
        assert (store / output).read_bytes() == (stores[0] / output).read_bytes()
        assert not list(store.glob("*.partial"))


def test_what_a_process_has_taken_others_leave_while_it_lives(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path, Team(timeout=0.5)) as two:
        assert one.take("a")
        assert one.take("a")
        assert not two.take("a")
        assert two.take("b")
        one.release("a")
        assert two.take("a")
        assert not one.take("a")

        assert one.take("c")
        (tmp_path / "d.claim").touch()  # left by a power failure
        assert one.take("d")
        assert not two.take("c")
        one._ended.set()  # it hangs: no sign of life any more
        deadline = time.monotonic() + 30
        while not two.take("c"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert not one.take("c")

    assert not list(tmp_path.glob("alive-*"))
    with Claims(tmp_path) as claims:
        shutil.rmtree(tmp_path)
        with pytest.raises(WorkIsOver):
            claims.take("a")


def test_many_take_each_thing_once(tmp_path):
    """Check four processes that all want the same 200 things."""
    script = (
        "import sys; from pathlib import Path\n"
        "from megatron_interbert.preparation.sharing import Claims\n"
        "with Claims(Path(sys.argv[1])) as claims:\n"
        "    print(*[n for n in range(200) if claims.take(str(n))])\n"
        "    sys.stdout.flush(); sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    taken = [list(map(int, process.stdout.readline().split())) for process in processes]
    for process in processes:
        process.communicate("")
    assert np.sort(np.concatenate(taken)).tolist() == list(range(200))
