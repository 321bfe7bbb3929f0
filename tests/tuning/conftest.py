"""Statistics files of inputs that a test knows."""

from __future__ import annotations

import pytest

from eutectic.statistics.statistics_file import RECORD_KEY, StatisticsFile


def _save(path, inputs, shapes):
    """Write the Grams of `inputs`: parameter name -> `[n, in]`; `shapes` are the parameters'."""
    layers = {
        name: {
            "count": len(x),
            "sample_count": len(x),
            "inputs": name,
            "same_as": name,
            "shape": [1, x.shape[1]],
            "parameter": list(shapes[name]),
        }
        for name, x in inputs.items()
    }
    record = {
        "format": 1,
        "data": {"rows": max(map(len, inputs.values()))},
        "checkpoint": {"fingerprint": "of nobody"},
        "settings": {},
        "layers": layers,
    }
    StatisticsFile(record, {f"{name}/gram": x.T @ x for name, x in inputs.items()}).save(path)
    return path


@pytest.fixture
def save_statistics():
    """Return a function (path, parameter -> inputs, parameter -> shape) -> path."""
    assert RECORD_KEY == "eutectic_statistics"
    return _save
