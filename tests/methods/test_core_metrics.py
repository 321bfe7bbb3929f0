"""Iso-A of thin factors from Grams between the rows that all adapters share."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Context, core_metrics, get_method
from eutectic.methods.matrices import run_method
from eutectic.types import LayerStatistics

OUT, IN, RANKS, TOKENS = 40, 60, (3, 5, 2), 30
NAMES = ("a", "b", "c")


def stack(twice: bool = False) -> LowRankStack:
    generator = torch.Generator().manual_seed(1)
    left = [torch.randn(OUT, r, generator=generator, dtype=torch.float64) for r in RANKS]
    right = [torch.randn(r, IN, generator=generator, dtype=torch.float64) for r in RANKS]
    if twice:
        right[1] = torch.cat([right[0], right[2]])
    return LowRankStack(tuple(left), tuple(right))


def entries(thin: LowRankStack) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.cat(thin.right)
    found: list[LayerStatistics] = []
    for _ in RANKS:
        X = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64)
        X.mul_(torch.arange(1, IN + 1) ** -0.5)
        seen = X @ rows.mT
        found.append(LayerStatistics(core_gram=seen.mT @ seen, core_rows=rows, count=TOKENS))
    return found


def projected(given: list[LayerStatistics]) -> list[LayerStatistics]:
    """Return P·C·P as whole Grams, by pseudo-inverses."""
    found: list[LayerStatistics] = []
    for entry in given:
        assert entry.core_rows is not None and entry.core_gram is not None
        inverse = torch.linalg.pinv(entry.core_rows, rtol=1e-10)
        gram = inverse @ entry.core_gram @ inverse.mT
        found.append(LayerStatistics(gram=(gram + gram.mT) / 2, count=entry.count))
    return found


def merged(deltas: LowRankStack | Tensor, statistics: list[LayerStatistics]) -> Tensor:
    method = get_method("iso_a")
    context = Context(weights=(1.0, 0.5, 1.0), experts=NAMES, statistics=tuple(statistics))
    return run_method(method, deltas, method.parameters(), context).delta


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("twice", [False, True])
def test_the_core_gives_what_dense_deltas_and_whole_grams_give(twice: bool):
    thin = stack(twice)
    given = entries(thin)
    expected = merged(thin.dense(), projected(given))
    assert apart(merged(thin, given), expected) < 1e-9
    assert apart(merged(thin.dense(), given), expected) < 1e-9


def test_rows_beyond_the_factors_widen_the_core():
    """Grams that were collected for more adapters than the ones that are merged."""
    thin = stack()
    rows = torch.cat([*thin.right, torch.eye(IN, dtype=torch.float64)[:4]])
    given: list[LayerStatistics] = []
    for entry in entries(thin):
        assert entry.core_gram is not None
        gram = torch.eye(len(rows), dtype=torch.float64)
        gram[:10, :10] += entry.core_gram
        given.append(LayerStatistics(core_gram=gram, core_rows=rows, count=TOKENS))
    assert apart(merged(thin, given), merged(thin.dense(), projected(given))) < 1e-9


def test_rows_that_differ_between_experts_go_as_factors():
    thin = stack()
    given = entries(thin)
    turned = given[1]
    assert turned.core_rows is not None and turned.core_gram is not None
    order = torch.arange(len(turned.core_rows) - 1, -1, -1)
    own = replace(
        turned, core_rows=turned.core_rows[order], core_gram=turned.core_gram[order][:, order]
    )
    assert apart(merged(thin, [given[0], own, given[2]]), merged(thin, given)) < 1e-9


def test_an_expert_without_inputs_has_the_identity():
    thin = stack()
    given = entries(thin)
    none = [given[0], replace(given[1], count=0), given[2]]
    whole = projected(given)
    whole[1] = replace(whole[1], count=0)
    assert apart(merged(thin, none), merged(thin.dense(), whole)) < 1e-9


def test_nothing_but_the_bases_is_as_wide_as_the_layer(monkeypatch: pytest.MonkeyPatch):
    """Neither a delta nor a factor of a Gram is multiplied out."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError

    thin = stack()
    given = entries(thin)
    monkeypatch.setattr(core_metrics, "with_factors", refuse)
    monkeypatch.setattr(LowRankStack, "dense", refuse)
    method = get_method("iso_a")
    context = Context(weights=(1.0,) * 3, experts=NAMES, statistics=tuple(given))
    assert method.thin is not None
    change = method.thin(thin, method.parameters(), context)
    assert change is not None and change.left.shape == (OUT, sum(RANKS))


def test_core_grams_that_cannot_be_are_refused():
    thin = stack()
    given = entries(thin)
    assert given[0].core_gram is not None
    wrong = replace(given[0], core_gram=-given[0].core_gram)
    with pytest.raises(NumericalError, match="expert 'a'"):
        merged(thin, [wrong, *given[1:]])
    short = replace(given[0], core_gram=given[0].core_gram[:2, :2])
    with pytest.raises(MethodError, match="core_gram has shape"):
        merged(thin, [short, *given[1:]])
