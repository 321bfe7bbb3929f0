"""Metrics over many resamples at once; the definitions are scikit-learn's and scipy's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

METRICS_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "text-classification": ("accuracy", "macro_f1", "matthews"),
    "pair-classification": ("accuracy", "macro_f1", "matthews"),
    "image-classification": ("accuracy", "macro_f1", "matthews"),
    "zero-shot-image-classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "sentence-similarity": ("spearman", "pearson"),
    "retrieval": ("ndcg_at_10", "recall_at_10", "mrr_at_10"),
    "sequence-to-sequence": ("exact_match",),
    "language-model": ("loss", "perplexity"),
    "function": ("mean",),
    "lm-eval": ("acc",),  # and whatever else the harness averages over rows; see `Task.formula`
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


@dataclass(frozen=True)
class Outcomes:
    """What a model did with each row `[n]`, in the order of the data."""

    # Class, number, 1/0 for right and wrong, a query's own figure, summed negative log-likelihood.
    predictions: Array
    references: Array  # class, number, 1, number of predicted tokens


def metric_value(metric: str, outcomes: Outcomes) -> float:
    """Return the metric over all rows; NaN where it is undefined.

    As a correlation with a constant, and the loss of texts without a predicted token.
    """
    everything = np.arange(len(outcomes.predictions))[None]
    return float(resampled_values(metric, outcomes, everything)[0])


def resampled_values(metric: str, outcomes: Outcomes, rows: Integers) -> Array:
    """Return the metric of each resample, `[resamples]`; `rows` is `[resamples, n]`."""
    return _METRICS[metric](outcomes.predictions, outcomes.references, rows)


def per_example(metric: str, outcomes: Outcomes) -> Array:
    """Return what each row contributes, `[n]`: 1 or 0 for right and wrong.

    Regression and similarity: the squared difference; retrieval: the query's figure; language
    models: the mean over the row's tokens, NaN without any.
    """
    predictions, references = outcomes.predictions, outcomes.references
    if metric in ("loss", "perplexity"):
        return _ratio(predictions, references, undefined=np.nan)
    if metric in ("pearson", "spearman"):
        return (predictions - references) ** 2
    if metric in ("exact_match", "mean", *METRICS_OF_KIND["retrieval"]):
        return predictions
    return (predictions == references).astype(np.float64)


def _loss(predictions: Array, references: Array, rows: Integers) -> Array:
    summed = predictions[rows].sum(axis=1)
    return _ratio(summed, references[rows].sum(axis=1), undefined=np.nan)


def _perplexity(predictions: Array, references: Array, rows: Integers) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(_loss(predictions, references, rows))


def _macro_f1(predictions: Array, references: Array, rows: Integers) -> Array:
    """Mean over classes that occur among predictions or references of 2TP / (2TP + FP + FN)."""
    right, predicted, actual = _counts(predictions, references, rows)
    total = predicted + actual
    return _ratio((2 * _ratio(right, total)).sum(axis=1), (total > 0).sum(axis=1))


def _matthews(predictions: Array, references: Array, rows: Integers) -> Array:
    """(c·s − Σ p_k t_k) / √((s² − Σ p_k²)(s² − Σ t_k²)), 0 where a factor is 0."""
    right, predicted, actual = _counts(predictions, references, rows)
    size = float(rows.shape[1])
    covariance = right.sum(axis=1) * size - (predicted * actual).sum(axis=1)
    variance_p = size**2 - (predicted**2).sum(axis=1)
    variance_a = size**2 - (actual**2).sum(axis=1)
    return _ratio(covariance, np.sqrt(variance_p * variance_a))


def _counts(predictions: Array, references: Array, rows: Integers) -> tuple[Array, Array, Array]:
    """Return how often each class is predicted rightly, predicted, and true: `[resamples, C]`."""
    classes, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, actual = codes[: len(predictions)], codes[len(predictions) :]
    matched = np.where(predicted == actual, actual, len(classes))

    def count(values: Integers) -> Array:
        width = len(classes) + 1
        shifted = values[rows] + width * np.arange(len(rows))[:, None]
        table = np.bincount(shifted.ravel(), minlength=width * len(rows)).reshape(-1, width)
        return table[:, :-1].astype(np.float64)

    return count(matched), count(predicted), count(actual)


def _ranks(values: Array) -> Array:
    """Return average ranks along the last axis."""
    ranked = np.empty_like(values)
    for i, row in enumerate(values):
        _, codes, counts = np.unique(row, return_inverse=True, return_counts=True)
        ranked[i] = (np.cumsum(counts) - (counts - 1) / 2)[codes]
    return ranked


def _correlation(left: Array, right: Array) -> Array:
    # Rounding gives constants a variance, and a correlation of anything with it.
    constant = (np.ptp(left, axis=1) == 0) | (np.ptp(right, axis=1) == 0)
    left = left - left.mean(axis=1, keepdims=True)
    right = right - right.mean(axis=1, keepdims=True)
    norms = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    found = _ratio((left * right).sum(axis=1), norms, undefined=np.nan)
    return np.where(constant, np.nan, found)


def _ratio(numerator: Array, denominator: Array, undefined: float = 0.0) -> Array:
    found = np.full(np.shape(numerator), undefined)
    return np.divide(numerator, denominator, out=found, where=denominator > 0)


_METRICS: Mapping[str, Callable[[Array, Array, Integers], Array]] = {
    "accuracy": lambda p, r, rows: (p == r).astype(np.float64)[rows].mean(axis=1),
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": lambda p, r, rows: _correlation(p[rows], r[rows]),
    "spearman": lambda p, r, rows: _correlation(_ranks(p[rows]), _ranks(r[rows])),
    "exact_match": lambda p, r, rows: p[rows].mean(axis=1),
    "mean": lambda p, r, rows: p[rows].mean(axis=1),
    **dict.fromkeys(METRICS_OF_KIND["retrieval"], lambda p, r, rows: p[rows].mean(axis=1)),
    "loss": _loss,
    "perplexity": _perplexity,
}
