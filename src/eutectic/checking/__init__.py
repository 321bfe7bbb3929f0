"""What is wrong or unusual in checkpoints and adapters, before anyone merges them."""

from eutectic.checking.check import check
from eutectic.checking.report import Checked, CheckReport

__all__ = ["CheckReport", "Checked", "check"]
