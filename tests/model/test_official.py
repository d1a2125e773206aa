"""The official model's answers: outputs, losses and gradient norms, at TP 1 and TP 2, from its own
checkpoint.
"""

import json

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_interbert.data.packing import Example, pack
from megatron_interbert.model.initialise import load_full_state
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.model.partition import partition_dimension
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.tasks.pretraining.task import PretrainingTask
from megatron_interbert.weights.fitting import from_foreign
from megatron_interbert.weights.foreign import to_official
from tests.dist import run_on_ranks
from tests.shared import ORACLE, needs_shared
from tests.sizes import ORACLE as CONFIG

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def oracle_batch():
    """The oracle's padded inputs as a packed batch.

    Features are put back in float32, beyond what a store holds.
    """
    x = load_file(ORACLE / "inputs.safetensors")
    tokens = x["attention_mask"].bool()
    regions = x["image_attention_mask"].bool()
    examples = []

    for i in range(len(tokens)):
        labels = x["masked_lm_labels"][i][tokens[i]].numpy()
        examples.append(
            Example(
                token_ids=x["input_ids"][i][tokens[i]].numpy(),
                token_types=x["token_type_ids"][i][tokens[i]].numpy(),
                features=x["image_feat"][i][regions[i]].numpy(),
                locations=x["image_loc"][i][regions[i]].numpy(),
                class_ids=np.tile(np.arange(23), (int(regions[i].sum()), 1)),
                class_probs=x["image_target"][i][regions[i]].numpy(),
                hidden_regions=(x["image_label"][i][regions[i]] == 1).numpy(),
                msm_positions=np.flatnonzero(labels != -1),
                msm_labels=labels[labels != -1],
                mismatched=int(x["next_sentence_label"][i]),
            )
        )

    batch = pack(examples, CONFIG.feature_dim)
    batch.features = x["image_feat"][regions]

    return batch, tokens, regions


def load_model(state, heads=("msm", "mrm", "itm"), file="pytorch_model.bin"):
    model = InterBert(CONFIG, heads, state=state).eval()
    full = from_foreign("official", torch.load(ORACLE / file, weights_only=True), CONFIG)
    load_full_state(model, full, state, file)
    return model


def check_answers(tensor_parallel):
    state = ParallelState(tensor_parallel)
    model, (batch, tokens, regions) = load_model(state), oracle_batch()
    expected = load_file(ORACLE / "outputs.safetensors")
    output = model(batch, everything=True)

    with_summary = torch.cat([torch.ones(len(regions), 1, dtype=torch.bool), regions], dim=1)
    torch.testing.assert_close(output.text_hidden, expected["text_hidden"][tokens], **TOLERANCE)
    torch.testing.assert_close(
        output.image_hidden, expected["image_hidden"][with_summary], **TOLERANCE
    )
    torch.testing.assert_close(output.pooled_text, expected["pooled_text"], **TOLERANCE)
    torch.testing.assert_close(output.pooled_image, expected["pooled_image"], **TOLERANCE)
    torch.testing.assert_close(output.itm_logits, expected["itm_scores"], **TOLERANCE)
    torch.testing.assert_close(
        output.mrm_logits, expected["region_scores"][with_summary][batch.mrm_positions], **TOLERANCE
    )
    columns = output.msm_logits.shape[1]
    words = expected["text_scores"][tokens][batch.msm_positions][:, columns * state.tensor_rank :][
        :, :columns
    ]
    torch.testing.assert_close(output.msm_logits[:, : words.shape[1]], words, **TOLERANCE)

    task = PretrainingTask()
    loss, report = task.loss(model(batch), batch, batch.target_counts())
    figures = task.metrics(report)

    for name in ("msm", "mrm", "itm"):
        torch.testing.assert_close(
            figures[f"{name}_loss"], float(expected[f"loss_{name}"]), rtol=1e-5, atol=1e-6
        )

    loss.backward()
    check_gradients(model, state)


def check_gradients(model, state):
    """Per-parameter gradient norms under the official names.

    Shards are put together by a sum of squares.
    """
    norms = json.loads((ORACLE / "grad_norms.json").read_text())
    gathered = {}

    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if partition_dimension(name) is not None and state.tensor_size > 1:
            parts = [torch.empty_like(gradient) for _ in range(state.tensor_size)]
            torch.distributed.all_gather(parts, gradient.contiguous(), group=state.tensor_group)
            gradient = torch.cat(parts, partition_dimension(name))

        gathered[name] = gradient

    ours = {name: float(g.norm()) for name, g in to_official(gathered, CONFIG).items()}
    assert set(norms) <= set(ours)

    for name, norm in norms.items():
        if name.endswith("key.bias"):  # mathematically zero: only rounding is left
            assert ours[name] < 1e-6, name
        else:
            torch.testing.assert_close(
                ours[name], norm, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


@needs_shared
def test_official_answers_on_one_rank():
    check_answers(1)


@needs_shared
def test_official_answers_on_two_ranks():
    run_on_ranks(2, check_answers, 2)


@needs_shared
def test_choice_head_of_the_downstream_checkpoint():
    model, (batch, *_) = (
        load_model(ParallelState(), ("choice",), "pytorch_model_vl.bin"),
        oracle_batch(),
    )
    expected = load_file(ORACLE / "outputs.safetensors")["choice_logit"]
    torch.testing.assert_close(model(batch).choice_logit, expected, **TOLERANCE)


@needs_shared
def test_there_and_back_gives_the_same_tensors():
    source = torch.load(ORACLE / "pytorch_model.bin", weights_only=True)
    back = to_official(from_foreign("official", source, CONFIG), CONFIG)
    assert set(back) == set(source)
    assert all(torch.equal(back[name], source[name]) for name in source)
