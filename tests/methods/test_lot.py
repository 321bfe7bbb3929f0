"""Guards LOT against a transcription, against the methods it is a case of, and where data end."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError, NumericalError
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

from .matching_cases import EXPERTS, IN, OUT, collect, randn

STATISTICS = collect()
DELTAS = randn(EXPERTS, OUT, IN).double()


def of(*inputs: torch.Tensor) -> list[LayerStatistics]:
    return [LayerStatistics(gram=x.T @ x, count=len(x)) for x in inputs]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens", [3, 40])
def test_against_the_pseudo_inverse(normalize, tokens):
    """The source multiplies from the left: its weights are ours transposed."""
    inputs = [randn(tokens + t, IN, seed=t).double() for t in range(EXPERTS)]
    weights = [1.0, 0.5, *[2.0] * (EXPERTS - 2)]
    found = merge_matrices(
        "lot", DELTAS, weights=weights, statistics=of(*inputs), normalize_counts=normalize
    )
    share = [w / (len(x) if normalize else 1) for w, x in zip(weights, inputs, strict=True)]
    left = sum(s * x.T @ x for s, x in zip(share, inputs, strict=True))
    right = sum(s * x.T @ x @ d.T for s, x, d in zip(share, inputs, DELTAS, strict=True))
    expected = (torch.linalg.pinv(left, rcond=1e-12) @ right).T
    assert float((found - expected).norm() / expected.norm()) < 1e-9


def test_it_is_the_end_of_the_flow_and_what_conjugate_gradients_find():
    given = {"statistics": STATISTICS}
    found = merge_matrices("lot", DELTAS, **given)
    flow = merge_matrices("flow", DELTAS, **given, filter="solution", init="zero")
    mats = merge_matrices(
        "mats", DELTAS, **given, operator="gram", init="zero", iterations=500, tolerance=1e-10
    )
    for other in (flow, mats):
        assert float((found - other).norm() / found.norm()) < 1e-5


def test_inputs_that_share_nothing_interfere_nowhere():
    """Each expert's outputs on its own inputs are its own; on others' those of the others."""
    inputs = torch.zeros(2, 20, IN, dtype=torch.float64)
    inputs[0, :, :3], inputs[1, :, 3:] = randn(20, 3), randn(20, IN - 3, seed=1)
    merged = merge_matrices("lot", DELTAS[:2], statistics=of(*inputs))
    for x, delta in zip(inputs, DELTAS, strict=False):
        assert torch.allclose(x @ merged.T, x @ delta.T, atol=1e-9)
    same = merge_matrices("lot", DELTAS, statistics=[STATISTICS[0]] * EXPERTS)
    assert float((same - DELTAS.mean(0)).norm() / same.norm()) < 1e-6


def test_what_no_input_reached_stays_the_base():
    x = torch.zeros(30, IN, dtype=torch.float64)
    x[:, 1:] = randn(30, IN - 1)
    merged = merge_matrices("lot", DELTAS[:1], statistics=of(x), full_output=True)
    assert torch.allclose(merged.delta[:, 1:], DELTAS[0, :, 1:], atol=1e-9)
    assert not merged.delta[:, 0].abs().max() > 1e-9
    assert merged.record == {"determined": IN - 1}
    half = merge_matrices(
        "lot", DELTAS[:1], statistics=of(x), tolerance=0.5, full_output=True
    ).record["determined"]
    assert half < IN - 1


def test_rounding_of_stored_grams_is_no_direction():
    x = randn(3, IN)
    stored = LayerStatistics(gram=(x.T @ x).float(), count=3)
    merged = merge_matrices("lot", DELTAS[:1], statistics=[stored], full_output=True)
    assert merged.record["determined"] == 3
    span = torch.linalg.qr(x.double().T)[0]
    expected = DELTAS[0] @ span @ span.T
    assert float((merged.delta - expected).norm() / expected.norm()) < 1e-5


def test_refusals_and_lacks():
    with pytest.raises(MethodError, match="at least 0"):
        merge_matrices("lot", DELTAS, statistics=STATISTICS, weights=[-1.0] * EXPERTS)
    indefinite = LayerStatistics(gram=-torch.eye(IN, dtype=torch.float64), count=4)
    with pytest.raises(NumericalError):
        merge_matrices("lot", DELTAS[:1], statistics=[indefinite])
    empty = LayerStatistics(gram=torch.zeros(IN, IN), count=4)
    merged = merge_matrices("lot", DELTAS[:1], statistics=[empty], full_output=True)
    assert merged.record["rest"] == "average" and torch.equal(merged.delta, DELTAS[0])
