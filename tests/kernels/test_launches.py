"""Count how often Triton would compile: run our launches of 1,000 ragged steps through Triton's
real launcher, without a GPU.
"""

import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install -r requirements.txt)")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from megatron_interbert.kernels import triton_ops, triton_vocab
from megatron_interbert.kernels.sequences import Sequences
from megatron_interbert.kernels.triton_attention import packed_attention
from megatron_interbert.kernels.triton_embedding import embed_image, embed_text, region_rows
from tests.kernels.compiling import launched_kernels

STEPS = 1000
MOST_KEYS = {  # two tiles for each of two head sizes; one key for every other kernel
    "_row_forward": 4,
    "_row_backward": 4,
    "_tiled_forward": 4,
    "_tiled_backward": 4,
}
WIDTH = 16  # hidden size: only its divisibility by 16 matters, which real ones share
WORDS = 128
LONG = {"_tiled_forward", "_tiled_backward"}  # for sequences longer than a tile


class Card:
    """Answer what Triton's launcher asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Program:
    """Stand in for compiled code; running it does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        return None


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list]]:
    """Collect {kernel: keys for which the launcher called the compiler} while the test runs."""
    keys = defaultdict(list)
    touched = set()

    def compile_nothing(
        kernel: JITFunction, key: str, signature: dict, device: int, *rest: object
    ) -> Program:
        keys[kernel.fn.__name__].append(key)
        touched.add(kernel)
        program = kernel.device_caches[device][0][key] = Program()
        return program

    # in this thread: sums over uninitialised memory would be slow
    torch.set_flush_denormal(True)
    monkeypatch.setattr(driver, "_active", Card(), raising=False)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    yield keys
    torch.set_flush_denormal(False)
    for kernel in touched:
        kernel.device_caches.clear()


def leaf(*shape: int) -> torch.Tensor:
    """Make an uninitialised bfloat16 leaf: nothing computes with its values."""
    return torch.empty(*shape, dtype=torch.bfloat16).requires_grad_()


def backward(result: torch.Tensor) -> None:
    result.backward(torch.empty_like(result))


def attend(lengths: torch.Tensor, heads: int, head: int, dropout_p: float) -> None:
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    qkv = leaf(int(offsets[-1]), heads, 3, head)
    backward(packed_attention(qkv, Sequences(offsets, int(lengths.max())), dropout_p))


def step(micro_batch: int, ragged: torch.Generator) -> None:
    """Make all launches of a pretraining step: once for each use of a kernel in the model, not for
    each layer.
    """
    words = torch.randint(8, 21, (micro_batch,), generator=ragged)
    regions = torch.randint(10, 37, (micro_batch,), generator=ragged)
    joint = words + regions + 1
    total_words = int(words.sum())
    total_regions = int(regions.sum())
    total = int(joint.sum())
    few = micro_batch + random.Random(total).randrange(micro_batch * 2)

    attend(joint, 1, 64, 0.1)
    attend(words, 1, 64, 0.1)
    attend(regions + 1, 1, 96, 0.1)

    for rows in (total, total_words, total_regions + micro_batch, few):
        backward(triton_ops.bias_gelu(leaf(rows, 4 * WIDTH), leaf(4 * WIDTH)))
        norm = [leaf(WIDTH) for _ in range(2)]
        backward(
            triton_ops.dropout_add_norm(
                leaf(rows, WIDTH), leaf(WIDTH), leaf(rows, WIDTH), *norm, 0.1, 1e-12
            )
        )

    # aligned to 16 bytes or not
    numbers = torch.zeros(total_words + 1, dtype=torch.int64)[total_words % 2 :][:total_words]
    norm = [leaf(WIDTH) for _ in range(2)]
    backward(
        embed_text(
            leaf(total_words, WIDTH),
            numbers,
            numbers,
            leaf(8, WIDTH),
            leaf(2, WIDTH),
            *norm,
            0.1,
            1e-12,
        )
    )
    projected = leaf(total_regions + micro_batch, WIDTH)
    places = torch.empty(len(projected), 5, dtype=torch.bfloat16)
    backward(embed_image(projected, places, leaf(WIDTH, 5), leaf(WIDTH), *norm, 0.1, 1e-12))

    summaries = (regions + 1).cumsum(0) - regions - 1
    features = torch.empty(total_regions, WIDTH, dtype=torch.float16)
    region_rows(
        features, numbers[:3], regions, numbers.new_empty(total_regions), summaries, torch.bfloat16
    )

    logits = torch.empty(few, WORDS, dtype=torch.bfloat16)
    start = total % 2  # of a chunk of rows, whose labels need not be aligned
    labels = torch.zeros(few + 1, dtype=torch.int64)[start:][:few]
    normaliser, grad = (torch.empty(few + 3)[total % 3 :][:few] for _ in range(2))
    triton_vocab.vocab_statistics(logits, labels, WORDS - 6)
    triton_vocab.vocab_gradient(logits, labels, normaliser, grad, WORDS - 6)


@pytest.mark.parametrize("micro_batch", [32, 256, 1024])
def test_few_keys_in_1000_ragged_steps(compiled: dict[str, list], micro_batch: int) -> None:
    ragged = torch.Generator().manual_seed(micro_batch)
    for _ in range(STEPS):
        step(micro_batch, ragged)

    found = {name: len(keys) for name, keys in compiled.items()}
    print(f"micro-batch {micro_batch}: {found}")
    assert set(found) == {kernel.fn.__name__ for kernel in launched_kernels()} - LONG
    assert all(count <= MOST_KEYS.get(name, 1) for name, count in found.items()), found


def test_few_keys_for_long_sequences(compiled: dict[str, list]) -> None:
    """Check sequences as long as VCR's: two head sizes, with dropout (training) and without
    (evaluation).
    """
    ragged = torch.Generator().manual_seed(1)

    for number in range(STEPS):
        longest = int(torch.randint(100, 200, (1,), generator=ragged))
        lengths = torch.randint(65, longest + 1, (8,), generator=ragged)
        for head in (64, 96):
            attend(lengths, 1, head, 0.1 if number % 2 else 0.0)

    found = {name: len(keys) for name, keys in compiled.items()}
    assert set(found) == LONG
    assert all(count <= MOST_KEYS.get(name, 1) for name, count in found.items()), found
