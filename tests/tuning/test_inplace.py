"""W₀ + αΔ in loaded models, and what of language models is compared."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from eutectic.evaluation.splits import prepare
from eutectic.evaluation.task_files import load_tasks
from eutectic.tuning.inplace import Lazily, set_scale, share_bodies
from eutectic.tuning.search_tasks import _token_logits

hf = pytest.importorskip("transformers")
from helpers.configs import tiny_model  # noqa: E402
from tuning import world  # noqa: E402 - after the check that transformers is there


def test_set_scale():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    deltas = {name: torch.randn_like(p) for name, p in base.items() if name != "1.bias"}
    where = module[0].weight.data_ptr()
    for alpha in (0.7, 0.0, -2.0):
        set_scale(module, base, deltas, alpha)
        for name, values in module.named_parameters():
            expected = base[name] + alpha * deltas[name] if name in deltas else base[name]
            assert torch.allclose(values, expected), name
    assert module[0].weight.data_ptr() == where
    set_scale(module, base, {"0.weight": deltas["0.weight"]}, 1.0, dtypes={"0.weight": torch.half})
    rounded = (base["0.weight"] + deltas["0.weight"]).half().float()
    assert torch.equal(module[0].weight, rounded)


def test_lazily_computes_when_asked():
    asked = []
    table = Lazily(["a", "b"], lambda name: asked.append(name) or torch.ones(1))
    assert list(table) == ["a", "b"] and len(table) == 2 and "a" in table and not asked
    assert table["b"] == 1 and asked == ["b"]
    with pytest.raises(KeyError):
        _ = table["c"]


def test_bodies_are_held_once():
    first, second = (
        nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, n)}) for n in (2, 5)
    )
    shapes = {"body.weight": (3, 3), "body.bias": (3,)}
    parts = share_bodies([first, second, first], [shapes] * 3)
    assert [len(keys) for _, keys in parts] == [2, 0]
    with torch.no_grad():
        first["body"].weight.fill_(7.0)
    assert bool((second["body"].weight == 7).all()) and second["head"].weight.shape == (5, 3)


@pytest.mark.parametrize("positions", [512, 10])
def test_next_token_logits(tmp_path, monkeypatch, positions):
    monkeypatch.setattr("eutectic.tuning.search_tasks.POSITIONS", positions)
    torch.manual_seed(0)
    model = tiny_model("GPT2LMHeadModel", n_layer=1, initializer_range=0.3).eval()
    model.save_pretrained(tmp_path)
    words = world.tokenizer()
    words.save_pretrained(tmp_path)
    rows = world.texts(70, 1)  # two batches
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    tasks = "tasks: {lm: {kind: language-model, data: {proxy: rows.jsonl}}}"
    (tmp_path / "tasks.yaml").write_text(tasks)
    prepared = prepare(load_tasks(tmp_path / "tasks.yaml")["lm"], "proxy", tmp_path)
    found = _token_logits(model, prepared)
    total = sum(len(t.split()) - 1 for t in rows)
    if positions == 10:
        assert 5 <= len(found) <= 10 and found.shape[1] == 40
        return
    with torch.inference_mode():
        expected = [
            model(**words(rows[int(i)], return_tensors="pt")).logits[0, :-1] for i in prepared.order
        ]
    step = -(-total // positions)
    assert torch.allclose(found, torch.cat(expected)[::step], atol=1e-4)
