"""Guards the translation of mergekit's methods against transcriptions of what mergekit computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.methods import get_method
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context
from eutectic.recipes.mergekit_methods import METHODS, Translated, known_method, translate

GENERATOR = torch.Generator().manual_seed(5)
BASE = torch.randn(9, 14, generator=GENERATOR, dtype=torch.float64)
MODELS = [BASE + 0.1 * torch.randn(9, 14, generator=GENERATOR, dtype=BASE.dtype) for _ in range(3)]


def translated(name, parameters=None, each=({}, {}, {}), base=True) -> Translated:
    found = translate(name, parameters or {}, list(each), base)
    assert isinstance(found, Translated), [str(f) for f in found]
    return found


def merged(name, parameters=None, each=({}, {}, {}), base: Tensor | None = BASE) -> Tensor:
    """Return the merged weight, as an engine would make it of the translation."""
    found = translated(name, parameters, each, base is not None)
    if found.method == "copy":
        assert base is not None
        return base
    models = MODELS[: len(each)]
    if found.base_first:
        assert base is not None
        models = [base, *models]
    origin = torch.zeros_like(BASE) if base is None or found.space == "weight" else base
    context = Context(
        weights=found.weights,
        experts=tuple(f"m{t}" for t in range(len(models))),
        tensor="w",
        base=origin,
        own=found.own,
    )
    deltas = torch.stack([m - origin for m in models])
    run = run_method(get_method(found.method), deltas, found.parameters, context)
    return origin + found.scale * run.delta


def largest(values: Tensor, count: int) -> Tensor:
    keep = torch.zeros(values.numel(), dtype=values.dtype)
    keep[values.abs().flatten().argsort(descending=True)[:count]] = 1
    return values * keep.view_as(values)


def by_sign(kept: list[Tensor], weights, normalize=True) -> Tensor:
    """The sign consensus of mergekit, entry by entry."""
    scaled = torch.stack([w * k for w, k in zip(weights, kept, strict=True)])
    out = torch.zeros_like(kept[0])
    for place in torch.cartesian_prod(*(torch.arange(s) for s in out.shape)).tolist():
        column = scaled[(slice(None), *place)]
        elected = 1.0 if float(column.sum()) >= 0 else -1.0
        taken = [t for t in range(len(kept)) if float(column[t].sign()) == elected]
        divisor = sum(weights[t] for t in taken) if normalize else 1.0
        out[tuple(place)] = sum(float(column[t]) for t in taken) / (divisor or 1.0)
    return out


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-11, atol=1e-13)


EACH = ({"weight": 0.5}, {"weight": 1.25}, {"weight": -0.25})
W = [0.5, 1.25, -0.25]
DELTAS = [m - BASE for m in MODELS]


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize):
    total = sum(w * m for w, m in zip(W, MODELS, strict=True))
    expected = total / sum(W) if normalize else total
    assert close(merged("linear", {"normalize": normalize}, EACH, None), expected)
    assert close(merged("linear", {"normalize": normalize}, EACH), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(normalize):
    total = sum(w * d for w, d in zip(W, DELTAS, strict=True))
    expected = BASE + 0.7 * (total / sum(W) if normalize else total)
    found = merged("task_arithmetic", {"normalize": normalize, "lambda": "0.7"}, EACH)
    assert close(found, expected)


def test_weights_that_balance_out_are_not_divided_by():
    each = ({"weight": 1.0}, {"weight": -1.0})
    found = merged("task_arithmetic", {"normalize": True}, each)
    assert close(found, BASE + DELTAS[0] - DELTAS[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_ties(normalize, rescale):
    densities = [0.3, 1.0, 0.001]
    each = [{**e, "density": d} for e, d in zip(EACH, densities, strict=True)]
    n = BASE.numel()
    kept = [
        largest(d, n if p >= 1 else max(1, int(p * n)))
        for d, p in zip(DELTAS, densities, strict=True)
    ]
    if rescale:
        kept = [k * d.abs().sum() / k.abs().sum() for k, d in zip(kept, DELTAS, strict=True)]
    found = merged("ties", {"normalize": normalize, "rescale": rescale, "lambda": 0.5}, each)
    assert close(found, BASE + 0.5 * by_sign(kept, W, normalize))


def test_a_ties_density_of_nothing():
    each = ({"weight": 1, "density": 0}, {"weight": 1})
    assert close(merged("ties", {}, each), BASE + DELTAS[1])


def dropped(weights_alone: int, density: float) -> Tensor:
    """Return what DARE keeps of one model, rescaled by mergekit's rule."""
    each = [{"weight": float(t == weights_alone), "density": density} for t in range(3)]
    return merged("dare_linear", {}, each) - BASE


def test_dare_keeps_the_sum_of_magnitudes():
    for t, delta in enumerate(DELTAS):
        kept = dropped(t, 0.4)
        held = kept != 0
        assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-10)
        ratio = kept[held] / delta[held]
        assert float(ratio.std()) < 1e-9
        assert 0.2 < float(held.double().mean()) < 0.6


def test_dare_linear_and_dare_ties_add_up_what_was_kept():
    kept = [dropped(t, 0.4) for t in range(3)]
    each = [{**e, "density": 0.4} for e in EACH]
    total = sum(w * k for w, k in zip(W, kept, strict=True))
    assert close(merged("dare_linear", {}, each), BASE + total)
    assert close(merged("dare_linear", {"normalize": True}, each), BASE + total / sum(W))
    assert close(merged("dare_ties", {}, each), BASE + by_sign(kept, W, normalize=False))
    assert close(merged("dare_ties", {"normalize": True}, each), BASE + by_sign(kept, W))


def test_dare_with_a_density_of_nothing_still_counts_its_weight():
    each = ({"weight": 1.0, "density": 0.0}, {"weight": 3.0, "density": 1.0})
    found = merged("dare_linear", {"normalize": True}, each)
    assert close(found, BASE + 3 * DELTAS[1] / 4)


def test_slerp_goes_from_the_base_to_the_model():
    a, b = BASE, MODELS[0]
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    if float(torch.cos(angle)) > 0.9995:
        raise AssertionError("the models are too near for this test")
    expected = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    assert close(merged("slerp", {"t": 0.3}, ({},)), expected)


def test_models_that_are_only_the_base_give_the_base():
    for name in ("ties", "task_arithmetic", "dare_ties"):
        assert translated(name, each=()).method == "copy"


def faults(name, parameters=None, each=({}, {}, {}), base=True) -> list[str]:
    found = translate(name, parameters or {}, list(each), base)
    assert not isinstance(found, Translated)
    return [f.kind for f in found]


def test_all_faults_at_once():
    each = ({"weight": "much"}, {"density": float("nan"), "weight": 1}, {"wieght": 1, "weight": 1})
    found = faults("ties", {"lambada": 1}, each, base=False)
    assert found == [
        "no_base",
        "unknown_parameter",
        "parameter_type",
        "not_finite",
        "unknown_parameter",
    ]


def test_what_is_missing_and_how_many():
    assert faults("slerp", {}, ({}, {})) == ["models", "missing_parameter"]
    assert faults("linear", {}, ({},), base=False) == ["missing_parameter"]
    assert faults("linear", {}, ({"weight": 1}, {"weight": -1}), base=False) == ["method_check"]
    assert faults("no_such", {}, ()) == ["unknown_method"]


def test_names_and_defaults_are_mergekits():
    assert METHODS["ties"].shared["normalize"].default is True
    assert METHODS["dare_ties"].shared["normalize"].default is False
    assert METHODS["dare_linear"].shared["rescale"].default is True
    assert METHODS["ties"].shared["int8_mask"].idle
    assert known_method("iso_c") is not None and known_method("iso_d") is None


def test_our_own_methods_by_the_same_syntax():
    each = ({"weight": 0.5}, {}, {})
    found = translated("iso_c", {"lambda": 0.5}, each)
    assert found.weights == (0.5, 1.0, 1.0)
    assert found.scale == 0.5 * get_method("iso_c").default_scale(3)
    assert translated("iso_c", {"scale": 0.25}, each).scale == 0.25
    assert faults("iso_c", {"support": "nothing"}, each) == ["literal_error"]


@pytest.mark.parametrize(
    ("flatten", "row_wise", "vectors"),
    [(True, False, "tensor"), (True, True, "tensor"), (False, False, "rows"),
     (False, True, "columns")],
)  # fmt: skip
@pytest.mark.parametrize("base", [True, False])
def test_nuslerp(flatten, row_wise, vectors, base):
    shared = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    found = translated("nuslerp", shared, EACH[:2], base)
    assert (found.parameters.vectors, found.weights) == (vectors, (0.5, 1.25))
    assert found.space == found.parameters.space == ("delta" if base else "weight")


def test_nuslerp_of_weights_that_balance_out_is_the_middle():
    assert translated("nuslerp", each=({"weight": 1}, {"weight": -1})).weights == (0.5, 0.5)


def test_multislerp_of_one_model_is_the_model():
    found = merged("multislerp", {"normalize_weights": False}, ({"weight": 0.3},))
    assert close(found, MODELS[0])


def test_karcher_takes_every_model_alike_and_no_base():
    found = translated("karcher", {"max_iter": "20"}, base=False)
    assert (found.weights, found.space, found.parameters.max_iter) == ((1.0,) * 3, "weight", 20)
    flat = torch.stack(MODELS).flatten(1)
    units = flat / flat.norm(dim=1, keepdim=True)
    expected = units.mean(0) / units.mean(0).norm() * flat.norm(dim=1).mean()
    # Directions this near have a Karcher mean that is nearly the normalised mean.
    assert torch.allclose(merged("karcher", base=None).flatten(), expected, rtol=1e-3)


@pytest.mark.parametrize("scale", [None, 0.0, -0.7])
def test_passthrough(scale):
    found = merged("passthrough", {}, ({"scale": scale},), None)
    assert close(found, MODELS[0] * (1.0 if scale is None else scale))


def test_what_mergekit_neglects():
    assert translated("sce").parameters.negligible == 1e-6
    assert translated("model_stock", {"filter_wise": True}).parameters.negligible == 1e-6
    assert translated("sce", each=()).method == "copy"


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(name):
    each = [{**e, "density": 0.5, "gamma": g} for e, g in zip(EACH, (0.0, 0.1, 0.9), strict=True)]
    n = BASE.numel()
    kept = []
    for delta, gamma in zip(DELTAS, (0.0, 0.1, 0.9), strict=True):
        dropped = min(int(gamma * n), n - n // 2)
        kept.append(largest(delta, dropped + n // 2) - largest(delta, dropped))
    total = sum(w * k for w, k in zip(W, kept, strict=True))
    expected = by_sign(kept, W) if name.endswith("ties") else total / sum(W)
    assert close(merged(name, {"normalize": True}, each), BASE + expected)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_that_keeps_everything_or_nothing(name):
    whole = [{**e, "density": d} for e, d in zip(EACH, (1.0, 2.0, 0.0), strict=True)]
    kept = [*DELTAS[:2], torch.zeros_like(BASE)]
    total = sum(w * k for w, k in zip(W, kept, strict=True))
    expected = by_sign(kept, W) if name == "della" else total
    assert close(merged(name, {"rescale": False}, whole), BASE + expected)
    assert faults(name, {}, [{**e, "density": 0.1} for e in EACH])


def test_every_method_of_mergekit_has_its_defaults_here():
    for name, kind in METHODS.items():
        count = kind.fewest or 2
        each = [{n: 0.5 for n, p in kind.each.items() if p.required}] * count
        shared = {n: 0.5 for n, p in kind.shared.items() if p.required}
        found = translated(name, shared, each)
        assert len(found.weights) == len(found.own) == count + found.base_first
        assert bool(torch.isfinite(merged(name, shared, each)).all())
