"""The linear system (Σ w_tC_t)(X) = Σ w_tC_t(Δ_t), one builder per operator C_t."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.cg import LinearMap
from eutectic.linalg.rows_and_diagonal import few_rows
from eutectic.methods.grams import Gram, Sums, participants, roundoff
from eutectic.methods.registry import Context

Operator = Literal["gram", "kfac", "diagonal_fisher", "block", "task_gram", "identity"]

NEEDS: dict[Operator, tuple[str, ...]] = {
    "gram": ("gram",),
    "kfac": ("gram", "output_gradient_gram"),
    "diagonal_fisher": ("fisher_diagonal",),
    "block": ("block_fisher",),
    "task_gram": (),
    "identity": (),
}
FISHER_FLOOR = 1e-8


@dataclass(frozen=True)
class System:
    """One linear system per tensor, on inputs of the shape of `right_side`.

    Attributes:
        apply: X -> Σ w_tC_t(X).
        right_side: Σ w_tC_t(Δ_t).
        diagonal: the diagonal of Σ w_tC_t, broadcastable to the shape.
        matrix: A when the operator is X -> X·A and A is held densely.
        left: H̄ of the nearest Kronecker product H̄ ⊗ Ā, None for the identity.
        right: Ā; None when the operator is its diagonal.
        thin: A when the operator is X -> X·A and A is held in few rows and a diagonal.
        unit_roundoff: the largest eps among the dtypes the statistics came in.
    """

    apply: LinearMap
    right_side: Tensor
    diagonal: Tensor
    matrix: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    thin: Gram | None = None
    unit_roundoff: float = 0.0


def build_system(
    operator: Operator,
    deltas: Tensor,
    context: Context,
    *,
    off_diagonal: float,
    normalize_counts: bool,
    dense: bool,
) -> System:
    """Set up an operator's system for deltas `[T, *shape]` (`block`: `[T, 1, n]`), in their dtype.

    Experts of weight 0 take no part. `dense` holds the Kronecker factors of "kfac" densely, for a
    preconditioner; for the others see `MatsParameters`.
    """
    if operator in ("identity", "diagonal_fisher"):
        return _elementwise_system(operator, deltas, context, normalize_counts)
    sums = Sums(context, normalize_counts, off_diagonal, deltas)
    if operator == "kfac":
        return _kfac_system(deltas, sums, dense)
    return _gram_system(operator, deltas, sums)


def damped(system: System, damping: float) -> System:
    """Return the system with damping·mean(diagonal)·I added to its operator.

    The nearest Kronecker product takes the ridge by factors, √damping of each one's mean diagonal
    (arXiv 1503.05671, §6.3), so that it stays a preconditioner of what is solved.
    """
    if damping == 0:
        return system
    diagonal = system.diagonal.expand(system.right_side.shape)
    ridge = damping * float(diagonal.mean(dtype=torch.float64))
    matrix = system.matrix
    if matrix is not None:
        matrix = matrix.clone()
        matrix.diagonal().add_(ridge)

    def apply(x: Tensor) -> Tensor:
        return system.apply(x).add_(x, alpha=ridge)

    if system.thin is not None:
        rest = system.thin.remainder
        even = torch.full_like(system.diagonal, ridge)
        factors = {"thin": replace(system.thin, remainder=even if rest is None else rest + ridge)}
    elif system.left is None or system.right is None:
        factors = {"right": matrix if system.matrix is system.right else system.right}
    else:
        factors = {"left": _ridged(system.left, damping), "right": _ridged(system.right, damping)}
    return replace(system, apply=apply, diagonal=system.diagonal + ridge, matrix=matrix, **factors)


def _ridged(gram: Tensor, damping: float) -> Tensor:
    ridge = damping**0.5 * float(gram.diagonal().mean(dtype=torch.float64))
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def scaled(system: System, factor: float) -> System:
    """Return the system with both sides multiplied: the same solution, without underflow."""

    def apply(x: Tensor) -> Tensor:
        return system.apply(x).mul_(factor)

    return replace(
        system,
        apply=apply,
        right_side=system.right_side * factor,
        diagonal=system.diagonal * factor,
        matrix=None,
    )


def shifted(system: System, base: Tensor) -> System:
    """Return the system for weights, W = W₀ + Δ, instead of deltas."""
    return replace(system, right_side=system.right_side + system.apply(base))


def fisher_weighted(
    deltas: Tensor, context: Context, *, floor: float, normalize_counts: bool
) -> tuple[Tensor, Tensor]:
    """Return Σ w_tF_t ⊙ Δ_t and Σ w_tF_t, in float64, with F_t at least `floor`."""
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    mass = torch.zeros_like(total)
    sums = Sums(context, normalize_counts, 1.0, total)
    for t in participants(context):
        fisher = sums.fisher_diagonal(t).clamp_min(floor)
        fisher.mul_(context.weights[t])
        mass.add_(fisher)
        total.addcmul_(fisher, deltas[t].double())
    return total, mass


def _weighted_gram(operator: Operator, deltas: Tensor, t: int, sums: Sums) -> Gram:
    """Return w_tA_t of an operator that multiplies from the right."""
    weight = sums.context.weights[t]
    if operator == "gram":
        return sums.gram(t, "gram", weight)
    if operator == "block":
        return sums.gram(t, "block_fisher", weight)
    square = lapack.norm(deltas[t], torch.float64) ** 2
    scale = weight / square if square > 0 else 0.0
    remainder = None
    if sums.off_diagonal != 1:
        remainder = (1 - sums.off_diagonal) * scale * deltas[t].square().sum(0)
    return Gram(None, deltas[t], remainder, roundoff(deltas), scale * sums.off_diagonal)


def _elementwise_system(
    operator: Operator, deltas: Tensor, context: Context, normalize_counts: bool
) -> System:
    if operator == "identity":
        mass = torch.tensor(sum(context.weights), dtype=deltas.dtype, device=deltas.device)
        total = torch.zeros_like(deltas[0])
        for t in participants(context):
            total.add_(deltas[t], alpha=context.weights[t])
    else:
        total, mass = (
            x.to(deltas.dtype)
            for x in fisher_weighted(
                deltas, context, floor=FISHER_FLOOR, normalize_counts=normalize_counts
            )
        )
    return System(lambda x: x * mass, total, mass)


def _gram_system(operator: Operator, deltas: Tensor, sums: Sums) -> System:
    """X -> X·ΣA_t: the sum is formed once, densely unless all are rows, together few of them."""
    size = deltas.shape[-1]
    right_side = torch.zeros_like(deltas[0])
    remainder = torch.zeros(size, dtype=deltas.dtype, device=deltas.device)
    matrix: Tensor | None = None
    factors: list[Tensor] = []
    unit_roundoff = 0.0
    for t in participants(sums.context):
        gram = _weighted_gram(operator, deltas, t, sums)
        unit_roundoff = max(unit_roundoff, gram.unit_roundoff)
        gram.add_product(right_side, deltas[t])
        if gram.factor is not None:
            factors.append(gram.factor * gram.scale**0.5)
            if gram.remainder is not None:
                remainder += gram.remainder
            continue
        if matrix is None:
            matrix = torch.zeros(size, size, dtype=deltas.dtype, device=deltas.device)
        assert gram.matrix is not None
        matrix.add_(gram.matrix, alpha=gram.scale)
    if matrix is None and few_rows(sum(map(len, factors)), size):
        total = Gram(None, torch.cat(factors), remainder, unit_roundoff)
        return System(
            lambda x: total.add_product(torch.zeros_like(x), x),
            right_side,
            total.diagonal(),
            thin=total,
            unit_roundoff=unit_roundoff,
        )
    if matrix is None:
        matrix = torch.zeros(size, size, dtype=deltas.dtype, device=deltas.device)
    for factor in factors:
        matrix.addmm_(factor.T, factor)
    matrix.diagonal().add_(remainder)
    summed = matrix
    return System(
        lambda x: x @ summed,
        right_side,
        summed.diagonal().clone(),
        matrix=summed,
        right=summed,
        unit_roundoff=unit_roundoff,
    )


def _kfac_system(deltas: Tensor, sums: Sums, dense: bool) -> System:
    """X -> ΣH_t·X·A_t.

    Expert by expert: products of stacked matrices take as long and T times the memory. The stored
    Grams, of inputs and of output gradients, are multiplied as they are, by their factors where
    that takes fewer products; only a preconditioner (`dense`) forms matrices of them. The
    nearest Kronecker product has the factors Σ tr(A_t)H_t and Σ tr(H_t)A_t, the partial traces
    of the operator, which are exact when the experts' Grams are multiples of each other.
    """
    members, weights = participants(sums.context), sums.context.weights
    out, size = deltas.shape[1:]
    grams = [sums.gram(t, "gram", weights[t]).cheapest() for t in members]
    outputs = [sums.gram(t, "output_gradient_gram", 1.0).cheapest() for t in members]
    left_diagonals = torch.stack([h.diagonal() for h in outputs])
    right_diagonals = torch.stack([g.diagonal() for g in grams])

    def add(total: Tensor, k: int, x: Tensor) -> None:
        grams[k].add_product(total, x, left=outputs[k])

    def apply(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for k in range(len(members)):
            add(total, k, x)
        return total

    right_side = torch.zeros_like(deltas[0])
    for k, t in enumerate(members):
        add(right_side, k, deltas[t])
    left = right = None
    if dense:
        left = torch.zeros(out, out, dtype=deltas.dtype, device=deltas.device)
        right = torch.zeros(size, size, dtype=deltas.dtype, device=deltas.device)
        for k, (output, gram) in enumerate(zip(outputs, grams, strict=True)):
            left.add_(output.dense(), alpha=float(right_diagonals[k].sum()))
            right.add_(gram.dense(), alpha=float(left_diagonals[k].sum()))
    return System(
        apply,
        right_side,
        torch.einsum("to,ti->oi", left_diagonals, right_diagonals),
        left=left,
        right=right,
        unit_roundoff=max(g.unit_roundoff for g in (*grams, *outputs)),
    )
