"""The choice of the scale α."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eutectic.on_first_use import names_on_first_use

if TYPE_CHECKING:
    from eutectic.tuning.divergence import feature_distance, kl_divergence
    from eutectic.tuning.entry import TuneReport, merge, tune
    from eutectic.tuning.output_error import (
        ClosedForm,
        OutputTerms,
        closed_form_scale,
        output_terms,
    )
    from eutectic.tuning.search import Measured, ScaleCurve, search_scale

__all__ = [
    "ClosedForm",
    "Measured",
    "OutputTerms",
    "ScaleCurve",
    "TuneReport",
    "closed_form_scale",
    "feature_distance",
    "kl_divergence",
    "merge",
    "output_terms",
    "search_scale",
    "tune",
]

# A merge needs none of what searches.
__getattr__, __dir__ = names_on_first_use(
    __name__,
    {
        "divergence": ("feature_distance", "kl_divergence"),
        "entry": ("TuneReport", "merge", "tune"),
        "output_error": ("ClosedForm", "OutputTerms", "closed_form_scale", "output_terms"),
        "search": ("Measured", "ScaleCurve", "search_scale"),
    },
)
