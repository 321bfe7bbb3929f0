"""The closed forms of calibration: one linear map, its bias, one norm. torch alone.

Tasks t = 1 … T. A layer of the model that is being calibrated (the *student*) gets inputs x `[in]`
on the proxies of task t; the same layer of expert t gets z on the same proxies. The wanted output
is the expert's map of a mixture of both,

    y* = W_t x* + b_t,    x* = (1 − a) x + a z,

since what the student cannot give the layer, no weight can make good. With S_t = Σ x xᵀ and
R_t = Σ x x*ᵀ = (1 − a) S_t + a Σ x zᵀ, both divided by ‖S_t‖_F so that every task has the same say,

    Wᵀ = (Σ_t S_t + λI)⁻¹ (Σ_t R_t W_tᵀ + λ W_aᵀ),    W_a = ρ W_merged + (1 − ρ) W_base,

the minimum of Σ_t mean‖W x − W_t x*‖²/‖S_t‖_F + λ‖W − W_a‖². The bias takes over the mean output
that is still missing, every task counting once, with λ holding it at its own anchor:

    b = (Σ_t (b_t + W_t x̄*_t − W x̄_t) + λ b_a) / (T + λ).

A norm gives γ ∘ v + β + u, where v and u are what it makes of its input apart from γ and β
(LayerNorm: v the normalised input, u = 0; Gemma's 1 + γ: u = v). Channel by channel, (γ, β) solve
two equations of least squares towards γ_t ∘ v* + β_t + u*, with the same mixture and λ relative to
the mean of v².

Identities, which the tests hold to: at T = 1, λ → 0 the expert's outputs on its own inputs; λ → ∞
the anchor; T equal experts at λ what one gives at λ/T; W Q for inputs Qᵀx, P W for outputs P y;
sums over any batches and any order of tasks are the same up to rounding. Inputs that no proxy
showed keep the anchor, whatever λ.

Everything is in float64, because the Grams square the inputs' condition number.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack

# Below this share of a Gram's norm directions of the inputs cannot be told from rounding.
SMALLEST_RIDGE = 1e-10


@dataclass
class InputMoments:
    """Sums over the rows of one task: x of the student, z of the expert, row by row the same token.

    `gram` Σ x xᵀ and `cross` Σ x zᵀ are `[in, in]`; all are float64.
    """

    gram: Tensor
    cross: Tensor
    student_sum: Tensor
    expert_sum: Tensor
    count: int = 0

    @staticmethod
    def zeros(width: int) -> "InputMoments":
        """Return the sums of no row."""
        square = torch.zeros(width, width, dtype=torch.float64)
        return InputMoments(square, square.clone(), square.sum(0), square.sum(0))

    def add(self, student: Tensor, expert: Tensor) -> None:
        """Add rows `[n, in]` of both."""
        x, z = student.double(), expert.double()
        self.gram += x.T @ x
        self.cross += x.T @ z
        self.student_sum += x.sum(0)
        self.expert_sum += z.sum(0)
        self.count += len(x)


@dataclass(frozen=True)
class MapEquations:
    """The left side of the equations of a map, factorised once for all maps with these inputs."""

    total: Tensor  # Σ S_t/‖S_t‖ [in, in]
    crosses: Sequence[Tensor]  # R_t/‖S_t‖ of every task
    means: Sequence[tuple[Tensor, Tensor]]  # x̄_t and x̄*_t of every task
    factor: Tensor  # Cholesky, of total + λI
    ridge: float

    def matrix(self, weights: Sequence[Tensor], anchor: Tensor) -> Tensor:
        """Return W `[out, in]`, float64, for the experts' weights and W_a.

        The change from the anchor is solved for: exact where λ is large, and zero in directions
        that no input has.
        """
        anchor = anchor.double()
        wanted = sum(cross @ w.double().T for cross, w in zip(self.crosses, weights, strict=True))
        change = torch.cholesky_solve(wanted - self.total @ anchor.T, self.factor)
        return anchor + change.T

    def bias(
        self,
        matrix: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        anchor: Tensor,
    ) -> Tensor:
        """Return b `[out]`, float64, for a map whose matrix is `matrix`, calibrated or not."""
        total = self.ridge * anchor.double()
        for (mean, mixed), weight, bias in zip(self.means, weights, biases, strict=True):
            total = total + bias.double() + weight.double() @ mixed - matrix.double() @ mean
        return total / (len(self.means) + self.ridge)


def map_equations(moments: Iterable[InputMoments], ridge: float, share: float) -> MapEquations:
    """Return the equations of maps with these inputs, for λ = `ridge` and a = `share`.

    The moments of one task after the other are asked for, and not kept. A task that shows the layer
    nothing but zeros has no say in the matrix. λ below 1e-10 counts as 1e-10. Cost: n³/3 for n
    inputs; memory: T + 2 matrices of n².
    """
    total: Tensor | None = None
    crosses: list[Tensor] = []
    means: list[tuple[Tensor, Tensor]] = []
    for own in moments:
        total = torch.zeros_like(own.gram) if total is None else total
        size = lapack.norm(own.gram)
        unit = 1 / size if size > 0 else 0.0
        total += unit * own.gram
        crosses.append(unit * ((1 - share) * own.gram + share * own.cross))
        mean, theirs = own.student_sum / own.count, own.expert_sum / own.count
        means.append((mean, (1 - share) * mean + share * theirs))
    if total is None:
        raise ValueError("there are no tasks")
    ridge = max(ridge, SMALLEST_RIDGE)
    damped = total.clone()
    damped.diagonal().add_(ridge)
    factor = lapack.cholesky(damped)
    if factor is None:
        raise NumericalError("the inputs' Gram matrix is not positive semidefinite.")
    return MapEquations(total, crosses, means, factor, ridge)


@dataclass
class ScalingMoments:
    """Sums over the rows of one task at a norm, channel by channel, float64 `[d]`.

    v and u of the student; v* and u* − u of the mixture.
    """

    square: Tensor  # Σ v²
    cross: Tensor  # Σ v v*
    student_sum: Tensor  # Σ v
    mixed_sum: Tensor  # Σ v*
    offset: Tensor  # Σ (u* − u)
    offset_cross: Tensor  # Σ v (u* − u)
    count: int = 0

    @staticmethod
    def zeros(width: int) -> "ScalingMoments":
        """Return the sums of no row."""
        a, b, c, d, e, f = torch.zeros(6, width, dtype=torch.float64)
        return ScalingMoments(a, b, c, d, e, f)

    def add(
        self, student: tuple[Tensor, Tensor], expert: tuple[Tensor, Tensor], share: float
    ) -> None:
        """Add rows (v, u), each `[n, d]`, of both, mixed by a = `share`."""
        v, u = (part.double() for part in student)
        mixed = v + share * (expert[0].double() - v)
        offset = share * (expert[1].double() - u)
        self.square += v.square().sum(0)
        self.cross += (v * mixed).sum(0)
        self.student_sum += v.sum(0)
        self.mixed_sum += mixed.sum(0)
        self.offset += offset.sum(0)
        self.offset_cross += (v * offset).sum(0)
        self.count += len(v)


def calibrated_scaling(
    moments: Sequence[ScalingMoments],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor] | None,
    anchor: tuple[Tensor, Tensor | None],
    ridge: float,
) -> tuple[Tensor, Tensor | None]:
    """Return γ and β `[d]`, float64, of a norm; None for β where it has none (`shifts` is None).

    `anchor` has γ_a and β_a. Two equations a channel, solved for the change from the anchor.
    """
    scale_anchor = anchor[0].double()
    shift_anchor = torch.zeros_like(scale_anchor) if anchor[1] is None else anchor[1].double()
    square, mean = torch.zeros_like(scale_anchor), torch.zeros_like(scale_anchor)
    right, right_shift = torch.zeros_like(scale_anchor), torch.zeros_like(scale_anchor)
    for index, own in enumerate(moments):
        scale, n = scales[index].double(), own.count
        shift = torch.zeros_like(scale) if shifts is None else shifts[index].double()
        # What is wanted, less what the anchor gives.
        missing = own.mixed_sum * scale - own.student_sum * scale_anchor + own.offset
        right_shift += missing / n + shift - shift_anchor
        right += (own.cross * scale - own.square * scale_anchor + own.offset_cross) / n
        right += own.student_sum / n * (shift - shift_anchor)
        square += own.square / n
        mean += own.student_sum / n
    unit = float(square.mean()) / len(moments)  # 1 where the norm normalises
    if unit == 0:
        return scale_anchor, None if shifts is None else shift_anchor
    damping = max(ridge, SMALLEST_RIDGE)
    damped = square + damping * unit
    if shifts is None:
        return scale_anchor + right / damped, None
    damped_shift = len(moments) + damping
    determinant = damped * damped_shift - mean.square()
    scale = scale_anchor + (damped_shift * right - mean * right_shift) / determinant
    return scale, shift_anchor + (damped * right_shift - mean * right) / determinant
