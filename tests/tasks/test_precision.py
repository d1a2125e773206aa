"""Test the precision of evaluations: chosen by one rule, in force only while they run, reported,
and never mixed with another.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_interbert.command_line import parse
from megatron_interbert.data.corpus import Corpus
from megatron_interbert.data.packing import PackedBatch, pack
from megatron_interbert.data.text import CaptionTokenizer
from megatron_interbert.errors import UsageError
from megatron_interbert.hf import InterBertForImageTextRetrieval
from megatron_interbert.hf.configuration import InterBertConfig
from megatron_interbert.kernels.fit import Gpu
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.pair_scorer import PairScorer
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.serving.config import ServeConfig
from megatron_interbert.tasks import precision
from megatron_interbert.tasks.precision import Precision, choose_precision, settle_precision
from megatron_interbert.tasks.retrieval import evaluation as retrieval_evaluation
from megatron_interbert.tasks.retrieval.config import EvaluateRetrievalConfig
from megatron_interbert.tasks.retrieval.job import score_matrix
from megatron_interbert.tasks.shop.catalogue import Catalogue
from megatron_interbert.tasks.shop.scorer import ItemScorer
from megatron_interbert.training import evaluation
from megatron_interbert.training.evaluation import DownstreamEvaluation
from megatron_interbert.training.evaluation_copy import EvaluationCopy
from tests.corpus import write_store
from tests.model.test_model import SMALL, examples
from tests.tasks.test_retrieval import open_pairs, sizes

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
H100 = Gpu("NVIDIA H100", (9, 0), 232448)
V100 = Gpu("Tesla V100", (7, 0), 98304)
MI300X = Gpu("AMD Instinct MI300X", (9, 4), 65536)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s", images=14)


def make(head: str = "itm", **options: object) -> InterBert:
    model = InterBert(sizes(), (head,), **options)
    initialise(model, sizes(), 0, ParallelState())
    return model.eval()


@pytest.mark.parametrize(
    ("gpu", "asked", "chosen", "words"),
    [
        (None, "auto", "fp32", ""),
        (None, "fp32", "fp32", ""),
        (None, "bf16", "bf16", ""),
        (None, "tf32", "fp32", "a CPU has no TF32"),
        (H100, "auto", "tf32", ""),
        (H100, "fp32", "fp32", ""),
        (H100, "tf32", "tf32", ""),
        (H100, "bf16", "bf16", ""),
        (V100, "auto", "fp32", "Tesla V100 (compute capability 7.0) has neither"),
        (V100, "tf32", "fp32", "has neither"),
        (V100, "bf16", "fp32", "has neither"),
        (V100, "fp32", "fp32", ""),
        (MI300X, "auto", "fp32", "AMD Instinct MI300X has bf16"),
        (MI300X, "tf32", "fp32", "only NVIDIA GPUs have TF32"),
        (MI300X, "bf16", "bf16", ""),
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, asked: str, chosen: str, words: str
) -> None:
    monkeypatch.setattr(precision, "gpu_of", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", "6.4" if gpu is MI300X else None)
    config = EvaluateRetrievalConfig(precision=asked)
    found = settle_precision(config, CUDA if gpu else CPU)
    assert (found.name, config.precision) == (chosen, chosen)
    assert words in found.reason
    assert bool(found.reason) == bool(words)
    assert config.notes == [f"precision: {found}"]
    assert choose_precision(config.precision, CUDA if gpu else CPU).name == chosen, (
        "a chosen precision is chosen again"
    )


def test_old_names_hold() -> None:
    def read(*flags: str) -> str:
        config = parse(EvaluateRetrievalConfig, "", flags)
        config.check()
        config.check()
        return config.precision

    assert read() == "auto"
    assert read("--bf16") == "bf16"
    assert read("--no-bf16") == "fp32"
    assert read("--bf16", "--precision", "bf16") == "bf16"
    assert read("--no-bf16", "--precision", "tf32") == "tf32"
    with pytest.raises(UsageError, match="--bf16 and --precision fp32 exclude each other"):
        read("--bf16", "--precision", "fp32")


def switches() -> tuple[bool, str, str]:
    """Return torch's settings for fp32 products on a GPU; torch raises if they disagree."""
    matmul = torch.backends.cuda.matmul
    return matmul.allow_tf32, matmul.fp32_precision, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("before", [False, True])
def test_tf32_is_on_only_where_it_is_asked_for(before: bool) -> None:
    """Check this even if the container has switched TF32 on for everything: fp32 switches it
    off.
    """
    at_first = torch.backends.cuda.matmul.fp32_precision

    try:
        if before:
            torch.backends.cuda.matmul.allow_tf32 = True

        found = switches()
        assert found[0] == before

        for name in ("fp32", "tf32", "bf16"):
            for error in (False, True):
                with (
                    pytest.raises(ZeroDivisionError) if error else nullcontext(),
                    Precision(name).products(),
                ):
                    assert switches() == (
                        (True, "tf32", "high") if name == "tf32" else (False, "ieee", "highest")
                    )
                    assert 1 / (not error)

                assert switches() == found
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = at_first


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double()


@torch.no_grad()
def test_heads_stay_in_fp32() -> None:
    """Check the logits against float64 arithmetic on the 16-bit vectors that the heads are given:
    nothing is rounded again.
    """
    batch: PackedBatch = pack(examples(6), 20)

    for name in ("itm", "choice"):
        model = Precision("bf16").convert(bigger(name))
        output = model(batch)
        head = model.itm_head if name == "itm" else model.choice_head
        logits = output.itm_logits if name == "itm" else output.choice_logit
        kinds = {
            parameter.dtype for part, parameter in model.named_parameters() if "_head" not in part
        }
        assert kinds == {torch.bfloat16}
        assert output.pooled_text.dtype == torch.bfloat16
        fused = double(output.pooled_text * output.pooled_image)
        expected = fused @ double(head.weight).T + double(head.bias)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(logits, logits.bfloat16().float())


def bigger(head: str) -> InterBert:
    """Return a model that reads `examples`."""
    model = InterBert(SMALL, (head,))
    initialise(model, SMALL, 0, ParallelState())
    return model.eval()


@torch.no_grad()
def test_scores_in_bf16_are_those_of_fp32_to_its_rounding(store: Path) -> None:
    """Check scores of pairs from the fast scorer, and of items from the model itself and from
    vectors.
    """
    pairs = open_pairs(store)
    items = Catalogue(
        Corpus([str(store)]), CaptionTokenizer(str(store / "vocab.txt")), True, 30, 36
    )
    texts = ["a cat", "the dog runs"]
    found = []

    for name in ("fp32", "bf16"):
        model = Precision(name).convert(make())
        scorer = ItemScorer(model, items, CPU)
        pieces = scorer.pieces(texts)
        matched = scorer.match(pieces, np.repeat([0, 1], 14), np.tile(np.arange(14), 2))
        vectors = scorer.text_vectors(pieces) @ scorer.item_vectors(np.arange(14)).T
        found.append((score_matrix(PairScorer(model), pairs, CPU, 50), matched, vectors))

    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == np.float32
        assert not np.array_equal(exact, rounded)
        off = np.sqrt(np.mean((exact - rounded) ** 2))
        assert off < 0.1 * exact.std()
        assert len(np.unique(rounded)) > 0.9 * len(np.unique(exact)), (
            "rounding does not make scores tie"
        )


class Watching:
    """Stand in for the watchdog."""

    fed_by_modules = staticmethod(nullcontext)


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_evaluation_during_training(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Check that the copy computes in its own precision with weights taken from fp32, and that the
    precision of training's products does not change.
    """
    trained = make()
    state = SimpleNamespace(
        copy_into=lambda copy, kind: [
            p.copy_(q) for p, q in zip(copy.parameters(), trained.parameters(), strict=True)
        ]
    )
    monkeypatch.setattr(evaluation, "FragmentedState", lambda engine: state)
    before = switches()
    seen = []

    def evaluate(model: InterBert, state: ParallelState, device: torch.device) -> dict[str, float]:
        seen.append(
            (
                switches()[0],
                model.interaction.layers[0].mlp.up.weight.dtype,
                model.itm_head.weight.clone(),
            )
        )
        return {"R@1": 50.0}

    precision = Precision(name)
    copy = EvaluationCopy(precision.convert(InterBert(sizes(), ("itm",))), ParallelState())
    judge = DownstreamEvaluation(copy, evaluate, CPU, precision)
    figures, line = judge.run(SimpleNamespace(ema=None), Watching(), lambda: False)
    assert (figures, line) == ({"R@1": 50.0}, "R@1 50.00")
    allowed, dtype, head = seen[0]
    assert allowed == (name == "tf32")
    assert dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
    assert torch.equal(head, trained.itm_head.weight)
    assert switches() == before


def test_what_was_scored_in_another_precision_is_not_gone_on_with(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that, after a stopped evaluation has left tiles in fp32, one in bf16 begins anew and
    one in fp32 continues; the result records the precision.
    """
    InterBertForImageTextRetrieval(InterBertConfig.from_model_config(sizes())).save_pretrained(
        tmp_path / "model"
    )
    shutil.copy(store / "vocab.txt", tmp_path / "model" / "vocab.txt")
    missing = []
    fill = retrieval_evaluation.fill

    def run(name: str, tiles_until_stopped: int | None = None) -> dict:
        def some(tiles: object, places: list, *rest: object) -> None:
            missing.append(len(places))
            fill(tiles, places[:tiles_until_stopped], *rest)
            if tiles_until_stopped is not None:
                tiles.release()
                raise KeyboardInterrupt

        monkeypatch.setattr(retrieval_evaluation, "fill", some)
        config = EvaluateRetrievalConfig(
            load=str(tmp_path / "model"),
            data_path=str(store),
            output=str(tmp_path / "out"),
            precision=name,
            tile_captions=9,
            tile_images=7,
        )
        config.check()
        settle_precision(config, CPU)
        retrieval_evaluation.evaluate_retrieval(config, ParallelState(), CPU)

        return json.loads((tmp_path / "out" / "result.json").read_text())

    for name, stop in (("fp32", 3), ("fp32", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(name, stop)

    assert missing == [8, 5]
    assert run("bf16")["precision"] == "bf16"
    assert missing[-1] == 8
    with pytest.raises(KeyboardInterrupt):
        run("auto", 3)

    result = run("fp32")
    assert missing[-1] == 5, "auto is fp32 on a CPU"
    assert (result["precision"], result["configuration"]["precision"]) == ("fp32", "fp32")


def test_an_index_in_bf16_is_another_one() -> None:
    """Check that fp32 and TF32 share an index, including those built before there was a choice."""
    from megatron_interbert.serving.start import Opened

    facts = {}
    for name in ("fp32", "tf32", "bf16"):
        opened = Opened.__new__(Opened)
        opened.config = ServeConfig(precision=name)
        opened.source = SimpleNamespace(facts={"files": {}})
        opened.tokenizer = SimpleNamespace(sha256="x")
        facts[name] = opened.facts

    assert facts["fp32"] == facts["tf32"] != facts["bf16"]
    assert "precision" not in facts["fp32"]
