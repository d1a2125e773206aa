"""Test that faulty flags of the service are reported before anything is opened."""

import pytest

from megatron_interbert.errors import UsageError
from megatron_interbert.serving.config import ServeConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_path": ""}, "--data-path is missing; give the region store of the items' pictures"),
        ({"data_path": " , "}, "--data-path is missing"),
        ({"recommendation_index": "index"}, "--recommendation-index needs --load-recommendation"),
    ],
)
def test_faulty_flags(given, message):
    with pytest.raises(UsageError, match=message):
        ServeConfig(load="none", **given).check()


@pytest.mark.parametrize("key", ["clé", " key", "a\nb"])
def test_keys_that_a_header_cannot_carry(monkeypatch, key):
    monkeypatch.setenv("INTERBERT_API_KEY", key)

    with pytest.raises(UsageError, match="INTERBERT_API_KEY: an HTTP header cannot carry it"):
        ServeConfig(load="none").check()
