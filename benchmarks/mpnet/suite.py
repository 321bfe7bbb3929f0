"""The text suite on all-mpnet-base-v2 as a record that tables are made from."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

TEXT = Path(__file__).resolve().parents[1] / "text"
sys.path[:0] = [str(TEXT)]
from bases import MPNET
from table.suite import Suite


def load_suite(work: Path, regime: str, count: int) -> Suite:
    """Read what `text/experts.py --base mpnet` has made."""
    spec = util.spec_from_file_location("text_suite", TEXT / "suite.py")  # this file is `suite`
    assert spec is not None and spec.loader is not None
    text = util.module_from_spec(spec)
    spec.loader.exec_module(text)
    return text.load_suite(work, regime, count, MPNET)
