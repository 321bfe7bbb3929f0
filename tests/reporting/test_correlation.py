"""Correlations against scipy's, and what is left out of them."""

from __future__ import annotations

import pytest
from scipy import stats

from eutectic.reporting import correlate

SAR = {
    "ta": {"a": 0.41, "b": 0.52, "c": 0.52, "d": 0.38},
    "iso_c": {"a": 0.81, "b": 0.77, "c": 0.93, "d": 0.85},
    "tsv_m": {"a": 0.66, "b": 0.71, "c": 0.66, "d": 0.7},
}
NAI = {
    "ta": {"a": 0.2, "b": 0.45, "c": 0.3, "d": 0.3},
    "iso_c": {"a": 0.9, "b": 0.7, "c": 0.95, "d": 1.1},
    "tsv_m": {"a": 0.7, "b": 0.6, "c": 0.5, "d": 0.8},
}


def test_correlations_are_scipys():
    found = correlate(SAR, NAI)
    x = [v for tasks in SAR.values() for v in tasks.values()]
    y = [v for tasks in NAI.values() for v in tasks.values()]
    assert found.overall.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.overall.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    own = list(SAR["ta"].values()), list(NAI["ta"].values())
    assert found.within["ta"].pearson == pytest.approx(stats.pearsonr(*own).statistic)
    assert found.within["ta"].spearman == pytest.approx(stats.spearmanr(*own).statistic)
    means = [[sum(t.values()) / 4 for t in side.values()] for side in (SAR, NAI)]
    assert found.means.pearson == pytest.approx(stats.pearsonr(*means).statistic)
    assert (found.overall.count, found.means.count) == (12, 3)


def test_what_is_missing_on_a_side_is_left_out():
    nai = {"ta": {"a": 0.2, "b": None, "c": float("nan")}, "other": {"a": 1.0}}
    found = correlate(SAR, nai)
    assert found.points == (("ta", "a", 0.41, 0.2),)
    assert found.overall.pearson is None


def test_a_constant_side_has_no_correlation():
    flat = {"ta": {"a": 1.0, "b": 1.0 - 1e-9, "c": 1.0}}
    found = correlate(flat, NAI)
    assert (found.overall.pearson, found.overall.spearman, found.overall.count) == (None, None, 3)
    assert correlate({}, {}).overall.count == 0
