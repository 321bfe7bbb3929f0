"""Merges of small state dicts through files, for tests that compare numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import eutectic
from eutectic.execution.run import MergeReport
from helpers.folders import Tensors, load, save


def save_inputs(
    folder: Path,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Save a base and experts; return the options `base` and `experts` of a merge of them."""
    paths = {name: save(folder / name, tensors, config) for name, tensors in experts.items()}
    return {"base": save(folder / "base", base, config), "experts": paths}


def merge_files(
    folder: Path,
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensors, MergeReport]:
    """Save, merge into `folder/merged`, and return the merged tensors and the report."""
    inputs = save_inputs(folder, base, experts, config)
    report = eutectic.merge(**inputs, **options, output=folder / "merged")
    return load(folder / "merged"), report
