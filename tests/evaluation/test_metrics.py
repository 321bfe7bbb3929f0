"""Metrics against scikit-learn and scipy, on whole data and on resamples."""

from __future__ import annotations

import numpy as np
import pytest

from eutectic.evaluation.metrics import Outcomes, metric_value, per_example, resampled_values

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")
REFERENCE = {
    "accuracy": sklearn_metrics.accuracy_score,
    "macro_f1": lambda t, p: sklearn_metrics.f1_score(t, p, average="macro", zero_division=0),
    "matthews": sklearn_metrics.matthews_corrcoef,
    "pearson": lambda t, p: stats.pearsonr(t, p).statistic,
    "spearman": lambda t, p: stats.spearmanr(t, p).statistic,
}


@pytest.mark.parametrize("metric", REFERENCE)
@pytest.mark.parametrize("classes", [2, 5])
def test_equal_to_the_reference_on_every_resample(metric, classes):
    draw = np.random.default_rng(classes)
    truth = draw.integers(0, classes, 60).astype(float)
    guess = np.where(draw.random(60) < 0.6, truth, draw.integers(0, classes + 1, 60))
    outcomes = Outcomes(guess, truth)
    assert metric_value(metric, outcomes) == pytest.approx(REFERENCE[metric](truth, guess))
    rows = draw.integers(0, 60, (20, 60))
    expected = [REFERENCE[metric](truth[r], guess[r]) for r in rows]
    assert resampled_values(metric, outcomes, rows) == pytest.approx(expected, abs=1e-12)


def test_degenerate_predictions():
    constant = Outcomes(np.zeros(4), np.array([0.0, 1, 0, 1]))
    assert metric_value("matthews", constant) == 0
    assert metric_value("macro_f1", constant) == pytest.approx(1 / 3)
    assert np.isnan(metric_value("pearson", constant))


def test_language_models_weigh_rows_by_their_tokens():
    outcomes = Outcomes(np.array([6.0, 2.0]), np.array([2.0, 2.0]))
    assert metric_value("loss", outcomes) == pytest.approx(2.0)
    assert metric_value("perplexity", outcomes) == pytest.approx(np.exp(2.0))
    assert per_example("loss", outcomes).tolist() == [3.0, 1.0]


def test_without_predicted_tokens_there_is_no_loss():
    outcomes = Outcomes(np.array([6.0, 0.0]), np.array([2.0, 0.0]))
    assert metric_value("loss", outcomes) == pytest.approx(3.0)
    rows = np.array([[0, 0], [1, 1]])
    for metric, known in (("loss", 3.0), ("perplexity", np.exp(3.0))):
        found = resampled_values(metric, outcomes, rows)
        assert found[0] == pytest.approx(known) and np.isnan(found[1])
    assert np.isnan(per_example("loss", outcomes)[1])
