"""Test which kernels are chosen on which machine; GPUs are simulated, a choice needs none."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from megatron_interbert.errors import UsageError
from megatron_interbert.kernels import attention, choice, fit
from megatron_interbert.kernels.choice import choose_kernels

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
Insert = Callable[..., None]


@pytest.fixture
def insert(monkeypatch: pytest.MonkeyPatch) -> Insert:
    """Return a function that simulates a GPU, and a machine that can build Triton's launcher."""

    def insert(name: str, capability: tuple[int, int], shared_memory: int | None = None) -> None:
        facts = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
        facts.shared_memory_per_block_optin = shared_memory or fit.SHARED_MEMORY.get(
            capability, 65536
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(choice, "why_no_launcher", lambda: None)
        fit.gpu_of.cache_clear()

    yield insert
    fit.gpu_of.cache_clear()


def test_a_cpu_has_its_own_and_refuses_what_cannot_run() -> None:
    assert "attention=cpu_ops.attention" in choose_kernels("auto", CPU).describe()
    for name in ("apex", "triton"):
        with pytest.raises(UsageError, match=name):
            choose_kernels(name, CPU)


@pytest.mark.parametrize(("there", "products"), [(True, "PlainProducts"), (False, "WideProducts")])
def test_a_processor_without_bfloat16(
    monkeypatch: pytest.MonkeyPatch, there: bool, products: str
) -> None:
    monkeypatch.setattr(choice, "has_bfloat16_products", lambda: there)
    chosen = choose_kernels("auto", CPU, dtype=torch.bfloat16)
    assert f"products=products.{products}" in chosen.describe()
    assert chosen.row_multiple == (choice.ROW_MULTIPLE if there else 1)
    assert "products=products.PlainProducts" in choose_kernels("auto", CPU).describe()


def test_attention_by_what_is_asked_of_it() -> None:
    """Check that flash attention is chosen only without dropout and --deterministic.

    It has no dropout, and it sums gradients in varying order.
    """
    pytest.importorskip(
        "triton", reason="triton is not installed (pip install -r requirements.txt)"
    )

    for dropout, deterministic, expected in (
        (False, False, "flash"),
        (True, False, "packed"),
        (False, True, "packed"),
    ):
        described = choose_kernels("auto", CUDA, dropout, deterministic).describe()
        assert f"attention=triton_attention.{expected}_attention" in described


@pytest.mark.parametrize(("name", "capability"), [("Tesla V100", (7, 0)), ("Tesla T4", (7, 5))])
def test_cards_that_are_too_old(insert: Insert, name: str, capability: tuple[int, int]) -> None:
    pytest.importorskip(
        "triton", reason="triton is not installed (pip install -r requirements.txt)"
    )
    insert(name, capability)
    kernels = choose_kernels("auto", CUDA)
    assert kernels.attention is attention.padded_sdpa, "flash attention asks for 8.0 as well"
    assert (
        f"plain torch: {name} (compute capability {capability[0]}.{capability[1]}) is older"
        in kernels.describe()
    )
    with pytest.raises(UsageError, match=f"--kernels triton: {name} .* use --kernels auto"):
        choose_kernels("triton", CUDA)


def test_what_is_said_of_heads_and_tiles(insert: Insert) -> None:
    pytest.importorskip(
        "triton", reason="triton is not installed (pip install -r requirements.txt)"
    )
    insert("NVIDIA L4", (8, 9))
    described = choose_kernels(
        "auto", CUDA, True, head_sizes=(64, 96, 160), dtype=torch.bfloat16
    ).describe()
    assert "heads of 64 in bfloat16: tiles of 64 tokens, 40 of 99 KiB" in described
    assert "heads of 96 in bfloat16: tiles of 64 tokens, 72 of 99 KiB" in described
    assert "heads of 160: padded SDPA, as Triton's tiles are at most 128 wide" in described
    assert (
        "heads of 96 in float32: tiles of 32 tokens, 68 of 99"
        in choose_kernels("auto", CUDA, True, head_sizes=(96,), dtype=torch.float32).describe()
    )

    insert("a small card", (9, 0), 20 << 10)
    described = choose_kernels(
        "auto", CUDA, True, head_sizes=(64, 128), dtype=torch.float32
    ).describe()
    assert "heads of 64 in float32: tiles of 16 tokens, 17 of 20 KiB" in described
    assert (
        "heads of 128 in float32: padded SDPA, as no tile of Triton's fits in 20 KiB" in described
    )


def test_the_limit_is_that_of_the_card(insert: Insert) -> None:
    insert("from the driver", (9, 0), 123 << 10)
    assert fit.gpu_of(CUDA).shared_memory == 123 << 10

    for dtype, head, room, expected in (
        (torch.bfloat16, 64, 40 << 10, 64),
        (torch.bfloat16, 64, (40 << 10) - 1, 32),
        (torch.float32, 64, 232448, 32),
        (torch.float32, 128, (68 << 10) - 1, 16),
        (torch.float32, 128, 1024, None),
        (torch.bfloat16, 129, 232448, None),
        (torch.float64, 64, 232448, None),
    ):
        assert fit.tile_for(head, dtype, room) == expected, (dtype, head, room)


def test_a_machine_that_cannot_build_the_launcher(
    insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "triton", reason="triton is not installed (pip install -r requirements.txt)"
    )
    check = choice.why_no_launcher
    insert("NVIDIA A100", (8, 0))
    monkeypatch.setattr(choice, "why_no_launcher", check)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    assert "plain torch: Triton finds no C compiler" in choose_kernels("auto", CUDA).describe()
    with pytest.raises(UsageError, match="--kernels triton: Triton finds no C compiler"):
        choose_kernels("triton", CUDA)

    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(choice.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "/nowhere/Python.h, which is missing" in choose_kernels("auto", CUDA).describe()


def test_float8_where_there_is_none(insert: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    insert("NVIDIA A100", (8, 0))
    with pytest.raises(UsageError, match="--fp8: NVIDIA A100 has no 8-bit products"):
        choose_kernels("torch", CUDA, fp8=True)

    assert "products=products.Float8Products" in choose_kernels("torch", CPU, fp8=True).describe()

    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    with pytest.raises(
        UsageError, match=r"--fp8: torch .* has no torch\.nn\.functional\.scaled_mm"
    ):
        choose_kernels("torch", CPU, fp8=True)
