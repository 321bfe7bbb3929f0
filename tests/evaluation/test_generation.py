"""Sequence to sequence is decoded as the folder's generation_config.json says, greedily."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.errors import CheckpointError, RequestError
from eutectic.evaluation import load_model, load_tasks, outputs, pairs, prepare
from evaluation import world

FILE = "generation_config.json"


def _bart(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = world.hf.BartForConditionalGeneration(
        world.hf.BartConfig(
            vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=24, pad_token_id=0, bos_token_id=1,
            eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape))
    model.generation_config.forced_bos_token_id = 7
    model.generation_config.suppress_tokens = [3, 4, 5]
    # Searches of the folder's that exact match must not follow.
    model.generation_config.num_beams = 4
    model.generation_config.num_return_sequences = 2
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.min_length = 5
    return world.save(model, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _bart(tmp_path / "m")
    texts = world.sentences(12)
    rows = [{"source": t, "target": " ".join(t.split()[:3])} for t in texts]
    world.jsonl(tmp_path / "d.jsonl", rows)
    world.tasks(tmp_path / "t.yaml", a={"kind": "sequence-to-sequence", "data": "d.jsonl"})
    return tmp_path


@pytest.mark.transformers_versions
def test_tokens_are_those_of_transformers(folder: Path):
    task = load_tasks(folder / "t.yaml")["a"]
    ready = prepare(task, "test", folder / "m", batch_size=1)
    found = outputs(load_model(folder / "m", task), ready)
    plain = world.hf.AutoModelForSeq2SeqLM.from_pretrained(folder / "m")
    words = world.hf.AutoTokenizer.from_pretrained(folder / "m")
    for text, row in zip(world.sentences(12), found.tolist(), strict=True):
        wanted = plain.generate(
            input_ids=words(text, return_tensors="pt")["input_ids"], do_sample=False,
            num_beams=1, num_return_sequences=1, max_new_tokens=ready.generate_tokens,
            repetition_penalty=1.0, no_repeat_ngram_size=0, min_length=0,
        )[0, 1:].tolist()  # fmt: skip
        assert row[: len(wanted)] == wanted
        assert wanted[0] == 7 and not {3, 4, 5} & set(wanted)


def test_a_body_takes_the_files_beside_its_configuration(folder: Path):
    task = load_tasks(folder / "t.yaml")["a"]
    own = folder / "merged" / "experts" / "a"
    _bart(own)
    (own / FILE).rename(folder / "merged" / FILE)
    assert load_model(folder / "merged", task).generation_config.forced_bos_token_id == 7
    (folder / "merged" / FILE).unlink()
    assert load_model(folder / "merged", task).generation_config.forced_bos_token_id is None
    (folder / "m" / FILE).write_text("{")
    with pytest.raises(CheckpointError, match=FILE):
        load_model(folder / "m", task)


def test_a_changed_file_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    original = pairs.outputs
    monkeypatch.setattr(pairs, "outputs", lambda *a, **k: calls.append(1) or original(*a, **k))

    def evaluate() -> None:
        eutectic.evaluate(
            folder / "t.yaml", models=[folder / "m"], output=folder / "r.json", resamples=0
        )

    evaluate()
    evaluate()
    assert len(calls) == 1
    values = json.loads((folder / "m" / FILE).read_text())
    (folder / "m" / FILE).write_text(json.dumps({**values, "forced_bos_token_id": 8}))
    evaluate()
    assert len(calls) == 2


def test_targets_longer_than_inputs_are_generated_in_full(folder: Path):
    task = load_tasks(folder / "t.yaml")["a"]
    long = prepare(task, "test", folder / "m").generate_tokens
    world.jsonl(folder / "d.jsonl", [{"source": "w1 w2", "target": "w3 " * 9}])
    spec = {"kind": "sequence-to-sequence", "data": "d.jsonl", "max_length": 4}
    task = load_tasks(world.tasks(folder / "t.yaml", a=spec))["a"]
    ready = prepare(task, "test", folder / "m")
    assert ready.batches[0]["labels"].shape == (1, 4)
    assert ready.generate_tokens == 9 + 1 + 1 and long < 9  # words, their end, one more
    world.jsonl(folder / "d.jsonl", [{"source": "w1 w2", "target": "w3 " * 90}])
    assert prepare(task, "test", folder / "m").generate_tokens == 24  # positions


def test_rows_without_targets_are_refused_in_words(folder: Path):
    world.jsonl(folder / "p.jsonl", [{"source": "w1 w2"}, {"source": "w3"}])
    data = {"proxy": "p.jsonl", "test": "d.jsonl"}
    spec = {"kind": "sequence-to-sequence", "data": data}
    task = load_tasks(world.tasks(folder / "t.yaml", a=spec))["a"]
    with pytest.raises(RequestError, match="split 'proxy': row 1 has no column 'target'"):
        prepare(task, "proxy", folder / "m")
