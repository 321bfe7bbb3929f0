"""The closed form is the least-squares solution, from Grams in every form they are stored in."""

from __future__ import annotations

import json
import math

import pytest
import torch

import eutectic
from eutectic.errors import NumericalError, RequestError
from eutectic.tuning import closed_form_scale, output_terms
from eutectic.types import LayerStatistics
from helpers.folders import load, make_base, make_expert
from helpers.merging import save_inputs

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


LAYERS = [
    {
        "deltas": [randn(7, 5) for _ in range(3)],
        "inputs": [randn(n, 5) + 0.5 for n in (3, 20, 50)],
        "merged": randn(7, 5),
    }
    for _ in range(2)
]
for layer in LAYERS:
    layer["merged"] = 0.4 * layer["merged"] + sum(layer["deltas"])


def grams(inputs):
    return [LayerStatistics(gram=x.T @ x, count=len(x)) for x in inputs]


def naive(layers):
    """Return α and the relative error of least squares on the output shifts themselves."""
    rows, targets = [], []
    for layer in layers:
        for delta, x in zip(layer["deltas"], layer["inputs"], strict=True):
            rows.append((x @ layer["merged"].T).flatten() / math.sqrt(len(x)))
            targets.append((x @ delta.T).flatten() / math.sqrt(len(x)))
    a, b = torch.cat(rows), torch.cat(targets)
    scale = float(a @ b / (a @ a))
    return scale, float((scale * a - b).square().sum() / b.square().sum())


def terms(layers, form=grams):
    return [output_terms(la["deltas"], la["merged"], form(la["inputs"])) for la in layers]


def test_it_is_least_squares_on_the_outputs():
    form = closed_form_scale(terms(LAYERS))
    scale, error = naive(LAYERS)
    assert math.isclose(form.scale, scale, rel_tol=1e-10)
    assert math.isclose(form.error(form.scale), error, rel_tol=1e-9)
    assert math.isclose(form.error(0), 1, rel_tol=1e-12)
    assert form.error(form.scale) < min(form.error(0.9 * scale), form.error(1.1 * scale))


def test_factors_and_remainders_are_grams():
    def factors(inputs):  # thin for the first expert, thick for the others
        rest = torch.full((5,), 0.25, dtype=torch.float64)
        return [
            LayerStatistics(gram_factor=x[:2], gram_diagonal=rest, count=len(x)) for x in inputs
        ]

    def dense(inputs):
        return [LayerStatistics(gram=r.dense_gram(), count=r.count) for r in factors(inputs)]

    assert math.isclose(
        closed_form_scale(terms(LAYERS, factors)).scale,
        closed_form_scale(terms(LAYERS, dense)).scale,
        rel_tol=1e-12,
    )


def test_tokens_do_not_outvote():
    """Ten times the tokens of one expert change nothing, its weight does."""
    layer = LAYERS[0]
    often = [x.repeat(10 if t == 1 else 1, 1) for t, x in enumerate(layer["inputs"])]
    plain = closed_form_scale(terms([layer])).scale
    assert math.isclose(closed_form_scale(terms([{**layer, "inputs": often}])).scale, plain)
    single = output_terms(layer["deltas"], layer["merged"], grams(layer["inputs"]), (0, 1, 0))
    alone = {key: layer[key][1:2] for key in ("deltas", "inputs")} | {"merged": layer["merged"]}
    assert math.isclose(closed_form_scale([single]).scale, naive([alone])[0], rel_tol=1e-10)


def test_one_expert_merged_alone_has_scale_one():
    layer = LAYERS[0]
    own = {"deltas": layer["deltas"][:1], "inputs": layer["inputs"][:1]}
    form = closed_form_scale(terms([{**own, "merged": layer["deltas"][0]}]))
    assert math.isclose(form.scale, 1, rel_tol=1e-12) and abs(form.error(1)) < 1e-12


def test_no_solution():
    layer = LAYERS[0]
    for merged in (torch.zeros(7, 5), -sum(layer["deltas"])):
        with pytest.raises(NumericalError, match="no positive solution"):
            closed_form_scale(terms([{**layer, "merged": merged}]))
    with pytest.raises(RequestError, match="at least one layer"):
        closed_form_scale([])
    with pytest.raises(RequestError, match="a Gram of 4 inputs does not belong to"):
        output_terms(
            layer["deltas"][:1],
            layer["merged"],
            [LayerStatistics(gram=torch.eye(4), count=1)],
        )


@pytest.fixture
def request_with_statistics(tmp_path):
    base = make_base()
    base["h.0.mlp.c_fc.weight"] = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    experts = {name: make_expert(base, seed) for seed, name in enumerate("abc", 1)}
    options = save_inputs(tmp_path, base, experts, {"model_type": "gpt2"})
    inputs = {}
    for seed, name in enumerate(experts, 11):
        generator = torch.Generator().manual_seed(seed)
        width = {"layers.0.proj.weight": 16, "h.0.mlp.c_fc.weight": 6}
        inputs[name] = {k: torch.randn(30 * seed, w, generator=generator) for k, w in width.items()}
    return base, experts, options, inputs


def test_merge_with_scale_auto(tmp_path, request_with_statistics, save_statistics):
    """From files: orientation of Conv1D weights, layers without Grams, the record."""
    base, experts, options, inputs = request_with_statistics
    shapes = {name: tuple(weight.shape) for name, weight in base.items()}
    specs = {
        name: {
            "path": path,
            "statistics": save_statistics(
                tmp_path / f"{name}.stats.safetensors", inputs[name], shapes
            ),
        }
        for name, path in options["experts"].items()
    }
    options = {**options, "experts": specs, "method": "iso_c"}
    unscaled = load(eutectic.merge(**options, scale=1.0, output=tmp_path / "one").output)
    layers = []
    for name in ("layers.0.proj.weight", "h.0.mlp.c_fc.weight"):
        turn = (lambda m: m.T.double()) if "c_fc" in name else (lambda m: m.double())
        layers.append(
            {
                "deltas": [turn(e[name] - base[name]) for e in experts.values()],
                "inputs": [x[name].double() for x in inputs.values()],
                "merged": turn(unscaled[name] - base[name]),
            }
        )
    report = eutectic.merge(**options, scale="auto", output=tmp_path / "auto")
    scale, error = naive(layers)
    assert math.isclose(report.scale, scale, rel_tol=1e-4)
    assert "Grams of 2 of 3 matrices" in report.notes[-1]
    search = json.loads((tmp_path / "auto" / "eutectic.json").read_text())["search"]
    assert search["search"] == "gram" and search["layers"] == 2
    values = {p["scale"]: p["value"] for p in search["points"]}
    assert math.isclose(values[report.scale], error, rel_tol=1e-4)
    again = eutectic.merge(**options, scale=report.scale, output=tmp_path / "again")
    merged, direct = load(tmp_path / "auto"), load(again.output)
    assert all(torch.equal(merged[name], direct[name]) for name in direct)
    tuned = eutectic.tune(**options, search="auto")
    assert tuned.scale == report.scale and tuned.search == report.search


def test_auto_says_what_it_needs(tmp_path, request_with_statistics):
    _, _, options, _ = request_with_statistics
    with pytest.raises(RequestError, match=r"statistics of every expert, and a, b, c have none"):
        eutectic.merge(**options, method="iso_c", scale="auto", output=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(RequestError, match="no tensor takes the recipe's scale"):
        eutectic.merge(
            **options,
            method="iso_c",
            scale="auto",
            tensors=[{"match": "*", "scale": 0.5}],
            output=tmp_path / "out",
        )
