"""Measure the peak memory of each rank of a run from its start to its third step, and compare it
with the formula of planning/memory.py.

    python -m tests.campaigns.peaks --hidden 1024 1536 --stages 1,2,3

What Python and its libraries take is measured with a tiny model, and taken off.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.model.presets import fit_to_data, load_model_config
from megatron_interbert.planning.layout import Layout, Load, rank_parameters
from megatron_interbert.planning.memory import predict
from tests.corpus import write_store
from tests.launching import start_ranks

RANKS = 2
SAMPLES = 4
LAYERS = (10, 9, 9)
LOAD = Load(SAMPLES, words=6, regions=6)
GIB = 2**30


def write_sizes(folder: Path, hidden: int, layers: tuple[int, int, int]) -> Path:
    """Write the sizes of a model, whose vocabulary and features are those of its data."""
    heads = max(hidden // 64, 1)
    sizes = {
        "hidden_size": hidden,
        "pooled_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
        "image_attention_heads": heads,
        **dict.fromkeys(("vocab_size", "feature_dim", "num_classes"), 0),
    }
    names = ("interaction_layers", "text_layers", "image_layers")
    file = folder / f"{hidden}.json"
    file.write_text(json.dumps(sizes | dict(zip(names, layers, strict=True))))

    return file


def peak_of_ranks(store: Path, model: Path, stage: int) -> int:
    """Train three steps; return the largest peak of a rank's own memory, in bytes.

    Ranks are started cold: forks of a server would count its pages.
    """
    flags = ("--data-path", store, "--model", model, "--bf16", "--zero-stage", stage)
    flags = (*flags, "--micro-batch-size", SAMPLES, "--global-batch-size", RANKS * SAMPLES)
    flags = (*flags, "--train-iters", 3, "--data-partitions", RANKS)
    ranks = start_ranks(*[flags] * RANKS, PYTHONUNBUFFERED="1", LOCAL_WORLD_SIZE=str(RANKS))
    peak = 0
    while any(rank.poll() is None for rank in ranks):
        peak = max([peak, *(own_memory(rank.pid) for rank in ranks)])
        time.sleep(0.02)

    for rank in ranks:
        assert rank.returncode == 0, "".join(rank.communicate())

    return peak


def own_memory(pid: int) -> int:
    """Return the bytes that a process holds of its own: anonymous and shared memory."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0

    found = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
    return 1024 * sum(map(int, found))


def compare(store: Path, model: Path, stage: int, libraries: int = 0) -> tuple[int, float, float]:
    """Return a model's parameters, and the bytes of its peak: measured without `libraries`, and
    predicted.
    """
    corpus = Corpus([str(store)])
    words = CaptionTokenizer(f"{store}/vocab.txt").vocab_size
    found = load_model_config(str(model))
    sizes = fit_to_data(found, words, corpus.feature_dim, corpus.num_classes, str(model))
    planned = predict(sizes, Layout(RANKS, zero_stage=stage, half=True), LOAD).peak

    return rank_parameters(sizes, 1), peak_of_ranks(store, model, stage) - libraries, planned


def libraries_of(store: Path, folder: Path) -> int:
    """Return the bytes that a rank takes for Python and libraries, with a model of next to none."""
    _, measured, planned = compare(store, write_sizes(folder, 64, (1, 1, 1)), 1)
    return int(measured - planned)


def main() -> None:
    """Run the campaign; exit with code 1 if a peak is more than 15 % from the formula."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 1536])
    parser.add_argument("--stages", default="1,2,3")
    options = parser.parse_args()
    worst = 0.0

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store = write_store(folder / "store")
        libraries = libraries_of(store, folder)
        print(f"Python and libraries: {libraries / GIB:.2f} GiB", flush=True)

        for hidden in options.hidden:
            model = write_sizes(folder, hidden, LAYERS)
            for stage in map(int, options.stages.split(",")):
                count, measured, planned = compare(store, model, stage, libraries)
                worst = max(worst, abs(measured / planned - 1))
                print(
                    f"{count / 1e6:.1f} M parameters, ZeRO-{stage}: peak {measured / GIB:.2f} GiB,"
                    f" by the formula {planned / GIB:.2f}",
                    flush=True,
                )

    raise SystemExit(worst > 0.15)


if __name__ == "__main__":
    main()
