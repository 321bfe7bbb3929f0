"""Names and configurations of tied tables, checked against transformers."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

from eutectic import conventions_ties
from eutectic.conventions_ties import is_output_table, is_tied, is_token_table, with_tie


def test_examples() -> None:
    failures, count = doctest.testmod(conventions_ties)
    assert count > 5 and not failures


def test_nested_configurations() -> None:
    text = {"model_type": "qwen2_5_vl_text", "tie_word_embeddings": True}
    assert is_tied({"model_type": "qwen2_5_vl", "text_config": text})
    assert not is_tied({"model_type": "qwen2_5_vl", "text_config": {}})
    written = with_tie({"model_type": "qwen2_5_vl", "text_config": text}, False)
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False
    assert with_tie({"model_type": "t5"}, False)["scale_decoder_outputs"] is True
    flan = {"model_type": "t5", "tie_word_embeddings": False}
    assert "scale_decoder_outputs" not in with_tie(flan, False)


def test_what_transformers_takes_for_granted() -> None:
    transformers = pytest.importorskip("transformers")
    # Text models of these have the key in transformers 5 no longer: nobody asks them for it.
    wrong: list[str] = []
    for kind in ("albert", "bart", "bert", "bloom", "gemma", "gpt2", "gpt_neox", "gptj", "llama",
                 "marian", "mistral", "mpnet", "olmo", "opt", "phi", "qwen2", "qwen3", "roberta",
                 "t5", "whisper"):  # fmt: skip
        config = transformers.CONFIG_MAPPING[kind]()
        if is_tied({"model_type": kind}) is not config.tie_word_embeddings:
            wrong.append(kind)
    assert not wrong


def test_names_of_tied_tables_of_transformers() -> None:
    """Every table that a model of transformers ties is known, on both of its ends."""
    pytest.importorskip("transformers")
    kinds = ("albert", "bart", "bert", "distilbert", "electra", "gpt2", "llama", "mamba", "marian",
             "modernbert", "mpnet", "opt", "roberta", "t5", "whisper", "xlm")  # fmt: skip
    rooms = [import_module(f"transformers.models.{kind}") for kind in kinds]
    pairs: set[tuple[str, str]] = set()
    for room in rooms:
        for name in dir(room):
            keys = getattr(getattr(room, name), "_tied_weights_keys", None)
            pairs |= set(keys.items()) if isinstance(keys, dict) else set()
    tables = {pair for pair in pairs if pair[0].endswith("weight")}
    assert len(tables) > 15
    for target, source in tables:
        assert is_token_table(source), source
        assert is_output_table(target) or is_token_table(target), target
    for first, second in pairs - tables:
        assert set(conventions_ties.bias_names(first)) == {first, second}
