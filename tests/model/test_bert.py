"""Initialisation from BERT in Hugging Face form: its layers land where the paper puts them, and
text flows as in BERT.
"""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from megatron_interbert.data.packing import Example, pack
from megatron_interbert.errors import UsageError
from megatron_interbert.model.initialise import initialise
from megatron_interbert.model.interbert import InterBert
from megatron_interbert.parallel.state import ParallelState
from megatron_interbert.training.first_weights import load_initial_weights
from tests.sizes import LIKE_BERT as CONFIG


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=150,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder / "hf")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")

    return folder, model


@pytest.mark.parametrize("form", ["hf", "pytorch_model.bin"])
def test_text_only_is_bert(bert, form):
    folder, theirs = bert
    ours = InterBert(CONFIG, ("msm",))
    initialise(ours, CONFIG, 0, ParallelState())
    loaded = load_initial_weights(ours, CONFIG, str(folder / form), ParallelState())
    assert "text_embedding.word.weight" in loaded
    assert "interaction.layers.1.attention.qkv.weight" in loaded
    assert not any(name.startswith("image") for name in loaded)
    ids = np.random.default_rng(0).integers(0, 150, (3, 9))
    batch = pack(
        [
            Example(
                token_ids=row,
                token_types=np.zeros(9, np.int64),
                msm_positions=np.arange(9),
                msm_labels=row,
            )
            for row in ids
        ],
        20,
    )
    with torch.no_grad():
        output = ours.eval()(batch, everything=True)
        expected = theirs(torch.from_numpy(ids), output_hidden_states=True)

    torch.testing.assert_close(
        output.text_hidden, expected.hidden_states[-1].flatten(0, 1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        output.msm_logits[:, :150], expected.logits.flatten(0, 1), rtol=1e-4, atol=1e-4
    )


def test_unfit_files_are_refused(bert, tmp_path):
    folder, _ = bert
    model = InterBert(CONFIG)
    deeper = dataclasses.replace(CONFIG, text_layers=3)
    with pytest.raises(UsageError, match="BERT needs 5 layers"):
        load_initial_weights(InterBert(deeper), deeper, str(folder / "hf"), ParallelState())

    wider = dataclasses.replace(CONFIG, vocab_size=151)
    with pytest.raises(UsageError, match="vocabulary of 150 entries, the model has 151"):
        load_initial_weights(InterBert(wider), wider, str(folder / "hf"), ParallelState())

    torch.save({"x": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(UsageError, match="neither one of our checkpoints"):
        load_initial_weights(model, CONFIG, str(tmp_path / "x.bin"), ParallelState())

    (tmp_path / "bad.safetensors").write_bytes(b"123")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        load_initial_weights(model, CONFIG, str(tmp_path / "bad.safetensors"), ParallelState())

    import pickle

    (tmp_path / "evil.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(UsageError, match="would run code"):
        load_initial_weights(model, CONFIG, str(tmp_path / "evil.bin"), ParallelState())
