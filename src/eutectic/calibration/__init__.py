"""Calibration: the layers of a merged model fitted to its experts, in closed form."""

from eutectic.calibration.calibrate import CalibrationReport, calibrate

__all__ = ["CalibrationReport", "calibrate"]
