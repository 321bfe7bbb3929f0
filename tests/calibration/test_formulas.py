"""The closed forms: against plain least squares, and the identities that they must keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.calibration.formulas import (
    InputMoments,
    MapEquations,
    ScalingMoments,
    calibrated_scaling,
    map_equations,
)

IN, OUT, ROWS = 6, 4, 40
TASKS = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = [draw(ROWS, IN, seed=t) @ draw(IN, IN, seed=50 + t) + 0.5 for t in range(TASKS)]
Z = [x + 0.3 * draw(ROWS, IN, seed=10 + t) for t, x in enumerate(X)]
W = [draw(OUT, IN, seed=20 + t) for t in range(TASKS)]
B = [draw(OUT, seed=30 + t) for t in range(TASKS)]
ANCHOR, BIAS_ANCHOR = draw(OUT, IN, seed=40), draw(OUT, seed=41)


def moments(x: Tensor, z: Tensor, parts: int = 1) -> InputMoments:
    found = InputMoments.zeros(x.shape[1])
    for some, others in zip(x.chunk(parts), z.chunk(parts), strict=True):
        found.add(some, others)
    return found


def equations(
    ridge: float, share: float, students: list[Tensor] = X, experts: list[Tensor] = Z
) -> MapEquations:
    return map_equations(map(moments, students, experts), ridge, share)


@pytest.mark.parametrize("ridge", [0.005, 0.05, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_map_is_the_least_squares_solution(ridge: float, share: float) -> None:
    """Rows of all tasks, weighted, and rows that stand for the anchor, in one `lstsq`."""
    left, right = [ridge**0.5 * torch.eye(IN).double()], [ridge**0.5 * ANCHOR.T]
    for x, z, w in zip(X, Z, W, strict=True):
        weight = torch.linalg.matrix_norm(x.T @ x) ** -0.5
        left.append(weight * x)
        right.append(weight * ((1 - share) * x + share * z) @ w.T)
    wanted = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution.T
    found = equations(ridge, share).matrix(W, ANCHOR)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_bias_takes_over_the_missing_mean() -> None:
    matrix = equations(0.05, 0.25).matrix(W, ANCHOR)
    found = equations(0.05, 0.25).bias(matrix, W, B, BIAS_ANCHOR)
    missing = [
        ((0.75 * x + 0.25 * z) @ w.T + b - x @ matrix.T).mean(0)
        for x, z, w, b in zip(X, Z, W, B, strict=True)
    ]
    wanted = (sum(missing) + 0.05 * BIAS_ANCHOR) / (TASKS + 0.05)
    assert torch.allclose(found, wanted, rtol=1e-10)


def test_one_task_without_ridge_is_the_expert() -> None:
    one = equations(0.0, 1.0, X[:1], X[:1])
    matrix = one.matrix(W[:1], ANCHOR)
    assert torch.allclose(matrix, W[0], atol=1e-6)
    assert torch.allclose(one.bias(matrix, W[:1], B[:1], BIAS_ANCHOR), B[0], atol=1e-6)


def test_much_ridge_is_the_anchor() -> None:
    held = equations(1e12, 0.25)
    matrix = held.matrix(W, ANCHOR)
    assert torch.allclose(matrix, ANCHOR, rtol=1e-9)
    assert torch.allclose(held.bias(matrix, W, B, BIAS_ANCHOR), BIAS_ANCHOR, rtol=1e-9)


def test_unseen_directions_keep_the_anchor() -> None:
    """No row has the last input: its column is the anchor's, whatever λ."""
    x, z = X[0].clone(), Z[0].clone()
    x[:, -1] = z[:, -1] = 0
    for ridge in (0.0, 0.05):
        found = equations(ridge, 0.5, [x], [z]).matrix(W[:1], ANCHOR)
        assert torch.allclose(found[:, -1], ANCHOR[:, -1], rtol=1e-12)


def test_equal_experts_count_as_one_with_less_ridge() -> None:
    thrice = equations(0.3, 0.25, X[:1] * 3, Z[:1] * 3)
    once = equations(0.1, 0.25, X[:1], Z[:1])
    matrix = once.matrix(W[:1], ANCHOR)
    assert torch.allclose(thrice.matrix(W[:1] * 3, ANCHOR), matrix, rtol=1e-10)
    assert torch.allclose(
        thrice.bias(matrix, W[:1] * 3, B[:1] * 3, BIAS_ANCHOR),
        once.bias(matrix, W[:1], B[:1], BIAS_ANCHOR),
        rtol=1e-10,
    )


def test_rotations_go_through() -> None:
    left, right = (torch.linalg.qr(draw(n, n, seed=n)).Q for n in (OUT, IN))
    turned = equations(0.05, 0.25, [x @ right for x in X], [z @ right for z in Z])
    found = turned.matrix([left @ w @ right for w in W], left @ ANCHOR @ right)
    wanted = left @ equations(0.05, 0.25).matrix(W, ANCHOR) @ right
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_batches_and_the_order_of_tasks_do_not_matter() -> None:
    parts = map_equations((moments(x, z, 7) for x, z in zip(X, Z, strict=True)), 0.05, 0.25)
    back = equations(0.05, 0.25, X[::-1], Z[::-1])
    wanted = equations(0.05, 0.25).matrix(W, ANCHOR)
    assert torch.allclose(parts.matrix(W, ANCHOR), wanted, rtol=1e-10)
    assert torch.allclose(back.matrix(W[::-1], ANCHOR), wanted, rtol=1e-10)


def test_a_task_of_zeros_has_no_say_in_the_matrix() -> None:
    nothing = torch.zeros_like(X[0])
    found = equations(0.05, 0.25, [*X, nothing], [*Z, nothing]).matrix([*W, W[0]], ANCHOR)
    assert torch.allclose(found, equations(0.05, 0.25).matrix(W, ANCHOR), rtol=1e-10)


# --- Norms ---


def scaling_moments(share: float, parts: int = 1) -> list[ScalingMoments]:
    found: list[ScalingMoments] = []
    for x, z in zip(X, Z, strict=True):
        own = ScalingMoments.zeros(IN)
        for v, w in zip(x.chunk(parts), z.chunk(parts), strict=True):
            own.add((v, 0.1 * v), (w, 0.1 * w), share)
        found.append(own)
    return found


SCALES = [1 + 0.1 * draw(IN, seed=60 + t) for t in range(TASKS)]
SHIFTS = [0.1 * draw(IN, seed=70 + t) for t in range(TASKS)]
SCALE_ANCHOR, SHIFT_ANCHOR = draw(IN, seed=80), draw(IN, seed=81)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_norm_is_the_least_squares_solution(shifted: bool, share: float) -> None:
    ridge, unit = 0.05, float(sum(x.square().mean(0) for x in X).mean()) / TASKS
    found, shift = calibrated_scaling(
        scaling_moments(share, 5),
        SCALES,
        SHIFTS if shifted else None,
        (SCALE_ANCHOR, SHIFT_ANCHOR if shifted else None),
        ridge,
    )
    for channel in range(IN):
        left = [torch.diag(torch.tensor([(ridge * unit) ** 0.5, ridge**0.5])).double()]
        right = [left[0] @ torch.stack([SCALE_ANCHOR[channel], SHIFT_ANCHOR[channel]])]
        for x, z, g, s in zip(X, Z, SCALES, SHIFTS, strict=True):
            v, w = x[:, channel], z[:, channel]
            mixed = (1 - share) * v + share * w
            target = g[channel] * mixed + 0.1 * (mixed - v)
            target = target + s[channel] if shifted else target
            left.append(torch.stack([v, torch.ones_like(v)], 1) / ROWS**0.5)
            right.append(target / ROWS**0.5)
        columns = slice(None) if shifted else slice(0, 1)
        rows = torch.cat(left)[:, columns]
        if not shifted:
            rows, right = torch.cat([rows[:1], rows[2:]]), [right[0][:1], *right[1:]]
        wanted = torch.linalg.lstsq(rows, torch.cat(right)[:, None]).solution[:, 0]
        assert torch.allclose(found[channel], wanted[0], rtol=1e-8)
        assert (shift is None) if not shifted else torch.allclose(shift[channel], wanted[1])  # type: ignore[index]


def test_a_norm_between_its_limits() -> None:
    own = ScalingMoments.zeros(IN)
    own.add((X[0], 0 * X[0]), (X[0], 0 * X[0]), 1.0)
    anchor = (SCALE_ANCHOR, SHIFT_ANCHOR)
    scale, shift = calibrated_scaling([own], SCALES[:1], SHIFTS[:1], anchor, 0.0)
    assert torch.allclose(scale, SCALES[0], atol=1e-6) and shift is not None
    assert torch.allclose(shift, SHIFTS[0], atol=1e-6)
    scale, shift = calibrated_scaling([own], SCALES[:1], SHIFTS[:1], anchor, 1e12)
    assert torch.allclose(scale, SCALE_ANCHOR) and shift is not None
    assert torch.allclose(shift, SHIFT_ANCHOR)
