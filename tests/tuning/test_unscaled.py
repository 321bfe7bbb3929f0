"""A model written from scratch deltas has the bytes of a merge with that scale."""

from __future__ import annotations

import json
import math

import pytest
import torch

import eutectic
from eutectic.errors import Note, RequestError
from eutectic.execution.run import merge as plain_merge
from eutectic.execution.schedule import Choice
from eutectic.storage.local_disk import LocalDisk
from helpers.folders import digests, load, make_base, make_expert
from helpers.merging import save_inputs

ALPHA = 0.731


def fixed(scale=ALPHA, calls=None):
    """Return a chooser that measures nothing."""

    def chooser(plan, inputs):
        def choose(unscaled):
            if calls is not None:
                calls.append(unscaled)
            return Choice(scale, Note("rule", ("hand",)), {"search": "hand", "scale": scale})

        return choose

    return chooser


@pytest.fixture
def inputs(tmp_path):
    base = make_base(width=13)  # odd sizes: vectorised kernels treat the last entries differently
    base["experts.weight"] = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(3))
    experts = {name: make_expert(base, seed) for seed, name in enumerate("abc", 1)}
    return {**save_inputs(tmp_path, base, experts), "fallback": "allow"}


RECIPES = [
    {"method": "iso_c"},
    {"method": "ties"},
    {"method": "average"},
    {"method": "linear"},
    {"method": "tsv_m", "dtype": "bfloat16"},
    {"method": "task_arithmetic", "scale_tensors": "matrix"},
    {"method": "esm", "parameters": {"preset": "vit"}},
    {
        "method": "iso_cts",
        "tensors": [
            {"match": "layers.0.*", "scale": 0.2},
            {"match": "embed*", "treatment": "copy"},
            {"match": "layers.1.proj.weight", "split": 2},
        ],
    },
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r["method"])
def test_bytes_are_those_of_a_merge(tmp_path, inputs, recipe):
    plain_merge(**inputs, **recipe, scale=ALPHA, output=tmp_path / "plain")
    search = {"scale": {"search": "gram"}}
    report = plain_merge(
        **inputs, **recipe, **search, output=tmp_path / "searched", choose=fixed(), threads=2
    )
    plain, searched = digests(tmp_path / "plain"), digests(tmp_path / "searched")
    assert report.scale == ALPHA
    differ = {name for name in plain | searched if plain.get(name) != searched.get(name)}
    assert differ <= {"README.md", "eutectic.json"}
    made, again = (
        json.loads((tmp_path / n / "eutectic.json").read_text()) for n in ("plain", "searched")
    )
    assert again.pop("search") == report.search == {"search": "hand", "scale": ALPHA}
    assert again.pop("notes") == [*made.pop("notes"), "rule 'hand'"]
    assert again.pop("request") != made.pop("request")
    assert made == again


def test_alpha_one_and_whole_weights(tmp_path, inputs):
    plain_merge(**inputs, method="average", scale=1.0, output=tmp_path / "plain")
    plain_merge(
        **inputs, method="average", scale="auto", output=tmp_path / "searched", choose=fixed(1.0)
    )
    plain, searched = load(tmp_path / "plain"), load(tmp_path / "searched")
    assert all(torch.equal(plain[name], searched[name]) for name in plain)


def test_delta_is_what_alpha_multiplies(tmp_path, inputs):
    """Δ with layer factors, of methods that give weights too."""
    for method, parameters in (("esm", {"preset": "vit"}), ("average", {})):
        seen = {}

        def chooser(plan, opened, seen=seen):
            def choose(unscaled):
                for t in plan.tensors:
                    if t.tunable:
                        seen[t.name] = unscaled.base(t) + ALPHA * unscaled.delta(t)
                return Choice(ALPHA, Note("rule", ("hand",)), {})

            return choose

        output = tmp_path / method
        plain_merge(
            **inputs,
            method=method,
            parameters=parameters,
            scale="auto",
            output=output,
            choose=chooser,
        )
        merged = load(output)
        assert len(seen) == len(merged) - 1  # without the integer buffer
        for name, value in seen.items():
            assert torch.allclose(value, merged[name], rtol=1e-5, atol=1e-6), name


def test_a_failed_search_keeps_the_deltas(tmp_path, inputs):
    def failing(plan, opened):
        def choose(unscaled):
            raise RuntimeError("killed")

        return choose

    request = {**inputs, "method": "iso_c", "scale": "auto", "output": tmp_path / "out"}
    with pytest.raises(RuntimeError, match="killed"):
        plain_merge(**request, choose=failing)
    deltas = tmp_path / "out.partial" / "deltas.safetensors"
    before = deltas.stat().st_mtime_ns
    assert not (tmp_path / "out").exists()
    calls = []
    report = plain_merge(**request, choose=fixed(calls=calls))
    assert report.resumed and len(calls) == 1
    assert before and not deltas.exists()
    plain_merge(**{**request, "scale": ALPHA, "output": tmp_path / "plain"})
    same = load(tmp_path / "plain")
    assert all(torch.equal(t, same[name]) for name, t in load(tmp_path / "out").items())


def test_killed_after_the_move(tmp_path, inputs, monkeypatch):
    """The model stands complete; only the work folder is left over."""
    request = {**inputs, "method": "iso_c", "scale": "auto", "output": tmp_path / "out"}
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(LocalDisk, "discard", killed)
        with pytest.raises(KeyboardInterrupt):
            plain_merge(**request, choose=fixed())
    before = digests(tmp_path / "out")
    report = plain_merge(**request, choose=fixed(scale=math.nan))  # not asked again
    assert report.scale == ALPHA and report.search == {"search": "hand", "scale": ALPHA}
    assert digests(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()


def test_a_search_is_never_taken_for_a_number(tmp_path, inputs):
    request = {**inputs, "method": "iso_c", "scale": "auto", "output": tmp_path / "out"}
    with pytest.raises(RequestError, match="the scale is a search"):
        plain_merge(**request)
    with pytest.raises(RequestError, match="the scale is a search"):
        eutectic.merge_state_dicts(
            load(inputs["base"]),
            {n: load(p) for n, p in inputs["experts"].items()},
            method="iso_c",
            scale="auto",  # type: ignore[arg-type]
        )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
