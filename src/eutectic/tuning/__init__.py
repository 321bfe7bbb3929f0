"""The choice of the scale α."""

from eutectic.tuning.divergence import feature_distance, kl_divergence
from eutectic.tuning.entry import TuneReport, merge, tune
from eutectic.tuning.output_error import ClosedForm, OutputTerms, closed_form_scale, output_terms
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
