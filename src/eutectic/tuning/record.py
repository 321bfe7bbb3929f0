"""What `eutectic.json` says of a search."""

from __future__ import annotations

from typing import Any

from eutectic.tuning.search import ScaleCurve

OBJECTIVES = {
    "validation": "mean over tasks of the metric's share of the expert's, on validation data",
    "divergence": "mean over tasks of the divergence from the expert's outputs, on proxy data",
    "gram": "squared error of layer outputs relative to the experts' shifts, from Grams",
}


def record_of(search: str, curve: ScaleCurve) -> dict[str, Any]:
    """Return the objective in words and the whole curve."""
    return {"search": search, "objective": OBJECTIVES[search], **curve.as_record()}
