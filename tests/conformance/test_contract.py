"""Every registered method keeps the contract: shapes, dtypes, purity, determinism, chunks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.methods import all_posts, merge_matrices, methods
from eutectic.types import LayerStatistics

from .cases import METHODS, Case, make_case, relative_error

ELEMENTWISE = [name for name, method in METHODS.items() if method.elementwise]
DOCS = Path(__file__).parents[2] / "docs" / "methods"
SHAPES = [(1, 1), (1, 6), (6, 1), (5, 7), (7, 5), (6, 6)]


def call(case: Case, deltas: Tensor | None = None, **more) -> Tensor:
    """Go through the public entry, as users do."""
    return merge_matrices(
        case.method.name,
        case.deltas if deltas is None else deltas,
        weights=case.weights,
        experts=case.names,
        base=case.base,
        statistics=case.statistics,
        tensor="layer.0.weight",
        **more,
    )


def tensors_of(case: Case) -> list[Tensor]:
    held = [case.deltas, *([] if case.base is None else [case.base])]
    for entry in case.statistics or ():
        values = (getattr(entry, f.name) for f in dataclasses.fields(LayerStatistics))
        held += [value for value in values if isinstance(value, Tensor)]
    return held


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_and_dtype(name, shape, dtype):
    merged = call(make_case(name, shape, dtype=dtype))
    assert merged.shape == shape
    assert merged.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(torch.isfinite(merged).all())


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_computed_in_float32(name):
    case = make_case(name, dtype=torch.bfloat16)
    wide = replace(
        case, deltas=case.deltas.float(), base=None if case.base is None else case.base.float()
    )
    assert torch.equal(call(case), call(wide))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.vectors])
def test_vectors(name):
    case = make_case(name, (6,))
    merged = call(case)
    assert merged.shape == (6,)
    assert bool(torch.isfinite(merged).all())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_inputs_are_left_alone(name, experts):
    case = make_case(name, experts=experts, weights=(0.5, 2.0, 1.0, 1.0, 1.0))
    held = tensors_of(case)
    before = [x.clone() for x in held]
    merged = call(case)
    merged.fill_(float("nan"))  # a result that shares memory with an input would spoil it
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deterministic(name, dtype):
    case = make_case(name, (24, 16), dtype=dtype)
    assert torch.equal(call(case), call(case))


@pytest.mark.parametrize("name", METHODS)
def test_memory_layout_does_not_matter(name):
    case = make_case(name, (6, 8))
    strided = case.deltas.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert relative_error(call(case, strided), call(case)) < 1e-9


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thread_count_does_not_matter(name, dtype):
    case = make_case(name, (96, 64), dtype=dtype, experts=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = call(case)
        torch.set_num_threads(2)
        two = call(case)
    finally:
        torch.set_num_threads(before)
    assert relative_error(two, one) <= 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_float32_agrees_with_float64(name):
    case = make_case(name, (12, 10), dtype=torch.float32)
    wide = replace(
        case,
        deltas=case.deltas.double(),
        base=None if case.base is None else case.base.double(),
    )
    assert relative_error(call(case), call(wide)) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_precision_changes_rounding_only(name):
    case = make_case(name, (12, 10), dtype=torch.float32)
    assert relative_error(call(case), call(case, precision="exact")) < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_not_ignored(name):
    case = make_case(name, experts=3)
    weighted = replace(case, weights=(0.25, 2.0, 1.5)[: len(case.weights)])
    assert relative_error(call(weighted), call(case)) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_the_record_is_json(name):
    record = make_case(name).run().record
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("name", METHODS)
def test_nan_is_refused_by_name(name):
    case = make_case(name)
    deltas = case.deltas.clone()
    deltas[-1, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=rf"expert \[{len(deltas) - 1}\]"):
        call(case, deltas)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_parameter_is_refused(name):
    with pytest.raises(MethodError, match="no_such_parameter"):
        call(make_case(name), no_such_parameter=1)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.experts != (1, None)])
def test_a_wrong_number_of_experts_is_refused(name):
    low, high = METHODS[name].experts
    for count in {low - 1, low if high is None else high + 1} - {0, low}:
        with pytest.raises(MethodError, match=f"got {count}"):
            merge_matrices(name, torch.ones(count, 2, 2), base=torch.ones(2, 2))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.needs(m.parse({}))])
def test_lacking_inputs_are_reported_or_recorded(name):
    case = make_case(name)
    bare = replace(case, statistics=None, base=None)
    if METHODS[name].fallback(METHODS[name].parse({})) == name:
        assert bare.run().record["reason"]
    else:
        with pytest.raises(MethodError, match="needs"):
            call(bare)


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("cuts", [(1,), (5, 6), (3, 17, 30)])
def test_elementwise_methods_do_not_see_chunks(name, cuts):
    case = make_case(name, (5, 7), dtype=torch.float32)
    method, values = case.method, case.method.parse({})
    in_weights = method.space(values) == "weight"
    inputs = case.deltas if case.base is None or not in_weights else case.deltas + case.base
    if "base" in method.needs(values):
        inputs = torch.cat([case.base.unsqueeze(0), inputs])
    if method.rows:
        cuts = [7 * (cut // 7) for cut in cuts]
    chunks = torch.tensor_split(inputs.flatten(1), cuts, dim=1)
    context = replace(case.context(), shape=(5, 7))
    if method.prepare is not None:
        state = method.prepare(lambda: iter(chunks), values, context)
        context = replace(context, state=state)
    parts, offset = [], 0
    for chunk in chunks:
        parts.append(method.function(chunk, values, replace(context, offset=offset)))
        offset += chunk.shape[1]
    whole = torch.cat(parts).view(5, 7)
    whole = whole - case.base if in_weights else whole
    if method.space(values) == "weight":
        assert relative_error(whole, case.merged()) < 1e-6
    else:
        assert torch.equal(whole, case.merged())


@pytest.mark.parametrize(
    "name", [n for n, m in METHODS.items() if m.space(m.parse({})) == "either"]
)
def test_methods_of_either_space_commute_with_the_base(name):
    case = make_case(name, weights=(0.5, 2.0, 1.0))
    base = make_case(name, seed=1).deltas[0]
    of_weights = replace(case, deltas=case.deltas + base).merged()
    assert relative_error(of_weights, base + case.merged()) < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_words_for_tables_and_pages(name):
    method, entry = METHODS[name], methods()[name]
    assert method.summary.endswith(".") and len(method.summary) <= 100
    assert method.paper
    assert "Return" in entry["description"]
    assert method.fallback(method.parse({})) in METHODS
    assert method.default_scale(8) > 0
    for field in dataclasses.fields(method.parameters):
        assert f"{field.name}:" in (method.parameters.__doc__ or ""), field.name


@pytest.mark.parametrize("name", all_posts())
def test_so_it_is_of_post_processors(name):
    entry, page = all_posts()[name], (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert entry.summary.endswith(".") and len(entry.summary) <= 100 and entry.paper
    assert page.startswith(f"# {name}\n") and "**When.**" in page and "**Source.**" in page
    assert name not in METHODS
    for field in dataclasses.fields(entry.parameters):
        assert f"{field.name}:" in (entry.parameters.__doc__ or ""), field.name
        assert f"| `{field.name}` |" in page, field.name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_page(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert "**When.**" in page and "**Source.**" in page
    for field in dataclasses.fields(METHODS[name].parameters):
        assert f"| `{field.name}` |" in page, field.name
