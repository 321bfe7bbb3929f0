"""Every registered method keeps the laws that it claims; a method added later is held to its own.

All in float64, so that a law that holds only roughly does not pass for one that holds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.methods.registry import LAWS

from .cases import METHODS, cases, claiming, expert_count, make_case, orthogonal, relative_error

ROUNDING = 1e-9
CHECKED = ("permutation", "homogeneous", "zero", "single", "copies", "absent", "rotation")
quick = settings(deadline=None, max_examples=12)


def test_every_law_has_a_test_here():
    assert set(CHECKED) == set(LAWS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_claims_known_laws(name):
    assert METHODS[name].laws <= set(LAWS)


@pytest.mark.parametrize(("name", "form"), claiming("permutation"))
@quick
@given(data=st.data())
def test_permutation(name, form, data):
    case = data.draw(cases(name, form))
    order = data.draw(st.permutations(range(len(case.deltas))))
    assert relative_error(case.choose(order).merged(), case.merged()) < ROUNDING


@pytest.mark.parametrize(("name", "form"), claiming("homogeneous"))
@quick
@given(data=st.data(), factor=st.sampled_from([-2.5, -1.0, 1e-3, 0.75, 64.0]))
def test_homogeneous(name, form, data, factor):
    case = data.draw(cases(name, form))
    assert relative_error(case.scaled(factor).merged(), factor * case.merged()) < ROUNDING


@pytest.mark.parametrize(("name", "form"), claiming("zero"))
@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (6, 4)])
def test_zero(name, form, shape):
    case = make_case(name, shape, ranks=(2, 0) if form == "factors" else None)
    merged = case.scaled(0.0).merged()
    scale = 1.0 if case.base is None else float(case.base.norm())
    assert float(merged.norm()) <= 1e-14 * scale


@pytest.mark.parametrize(("name", "form"), claiming("single"))
@quick
@given(data=st.data())
def test_single(name, form, data):
    assert expert_count(METHODS[name], 1) == 1
    case = data.draw(cases(name, form)).choose([0])
    case = replace(case, weights=(1.0,))
    assert relative_error(case.merged(), case.deltas[0]) < ROUNDING


@pytest.mark.parametrize(("name", "form"), claiming("copies"))
@quick
@given(data=st.data())
def test_copies(name, form, data):
    case = data.draw(cases(name, form))
    copied = case.copied()
    assert relative_error(copied.merged(), copied.deltas[0]) < ROUNDING


@pytest.mark.parametrize(("name", "form"), claiming("absent"))
@pytest.mark.parametrize("absent", [0, 1, 2])
@pytest.mark.parametrize("rank", [None, 2])
def test_absent(name, form, absent, rank):
    ranks = (1, 2, 1) if form == "factors" else None
    case = make_case(name, (6, 5), rank=rank, ranks=ranks, weights=(0.5, 2.0, 1.25))
    weights = tuple(0.0 if t == absent else w for t, w in enumerate(case.weights))
    present = [t for t in range(len(weights)) if t != absent]
    silent = replace(case, weights=weights).merged()
    assert relative_error(silent, case.choose(present).merged()) < ROUNDING


@pytest.mark.parametrize(("name", "form"), claiming("rotation"))
@quick
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_rotation(name, form, data, seed):
    case = data.draw(cases(name, form))
    rows, columns = case.deltas.shape[1:]
    left, right = orthogonal(rows, seed), orthogonal(columns, seed + 1)
    turned = case.turned(left, right).merged()
    assert relative_error(turned, left @ case.merged() @ right) < ROUNDING
