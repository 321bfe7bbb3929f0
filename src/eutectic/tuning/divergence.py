"""How far a merged model's outputs are from an expert's, without labels."""

import torch
from torch import Tensor

from eutectic.errors import RequestError


def kl_divergence(expert: Tensor, merged: Tensor) -> float:
    """Return the mean over rows of KL(softmax(expert) ‖ softmax(merged)), in nats.

    Σ_c p_c (log p_c − log q_c) with p the expert's probabilities and q the merged model's. For
    language models a row is one position.

    Args:
        expert: logits `[..., classes]` of the expert.
        merged: logits of the merged model on the same inputs, same shape.

    Returns:
        A number ≥ 0 up to rounding (float64); NaN when a logit is NaN. −inf logits (masked
        classes) are allowed: where the expert gives a class no probability it adds nothing; where
        only the merged model does, the divergence is infinite.

    Raises:
        RequestError: the shapes differ, or there is no row.

    Example:
        >>> kl_divergence(torch.zeros(3, 4), torch.zeros(3, 4))
        0.0
    """
    expert, merged = _pair(expert, merged)
    total = 0.0
    for p, q in zip(expert.split(_rows(expert)), merged.split(_rows(merged)), strict=True):
        log_p = p.double().log_softmax(-1)
        log_q = q.double().log_softmax(-1)
        probabilities = log_p.exp()
        terms = torch.where(probabilities == 0, 0.0, probabilities * (log_p - log_q))
        total += float(terms.sum())
    return total / len(expert)


def feature_distance(expert: Tensor, merged: Tensor) -> float:
    """Return ‖F_M − F_t‖² / ‖F_t − mean F_t‖², the share of the expert's features that is lost.

    0 for equal features, 1 for a model that answers every input with the expert's mean; tasks with
    large features do not outweigh others. With a single row, or rows all alike, the denominator is
    ‖F_t‖².

    Args:
        expert: features `[n, …]` of the expert.
        merged: features of the merged model on the same inputs, same shape.

    Raises:
        RequestError: the shapes differ, or there is no row.

    Example:
        >>> feature_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))
        1.0
    """
    expert, merged = _pair(expert, merged)
    expert, merged = expert.double(), merged.double()
    spread = float((expert - expert.mean(0)).square().sum())
    if spread <= 1e-20 * float(expert.square().sum()):
        spread = float(expert.square().sum())
    lost = float((merged - expert).square().sum())
    if spread == 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / spread


def _pair(expert: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as `[rows, last dimension]`."""
    if expert.shape != merged.shape or expert.ndim < 1 or expert.numel() == 0:
        raise RequestError(
            f"outputs to compare have one shape and at least one row; the expert's have "
            f"{list(expert.shape)}, the merged model's {list(merged.shape)}."
        )
    return expert.reshape(-1, expert.shape[-1]), merged.reshape(-1, merged.shape[-1])


def _rows(logits: Tensor) -> int:
    """Return how many rows to widen to float64 at a time: vocabularies are large."""
    return max(1, (1 << 22) // logits.shape[-1])
