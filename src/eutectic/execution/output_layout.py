"""The files of a planned output: which there are, and what they say of themselves."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eutectic.checkpoint.output_format import (
    InShards,
    LaidOutLikeBase,
    OutputFormat,
    OutputTensor,
    TensorFiles,
)
from eutectic.checkpoint.writer import OutputFile
from eutectic.errors import RequestError
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan


@dataclass(frozen=True)
class OutputLayout:
    """The weight files of an output, and the format that writes them."""

    format: OutputFormat
    files: tuple[OutputFile, ...]

    def open(self, folder: Path, *, resume: bool) -> AbstractContextManager[TensorFiles]:
        """Create the files in a folder, or take up those that are there."""
        return self.format.open(folder, self.files, resume=resume)


def output_layout(plan: Plan, inputs: Inputs) -> OutputLayout:
    """Return where every tensor of a plan will lie.

    Raises:
        RequestError: the base is in memory.
    """
    index = inputs.index
    if index is None:
        raise RequestError("a merge into files needs a base in files.")
    tensors: list[OutputTensor] = []
    for planned in plan.tensors:
        own = None if planned.base is None else index.entries.get(planned.base.tensor or "")
        file = None if own is None else own.file
        tensors.append(OutputTensor(planned.name, planned.dtype, planned.shape, file))
    recipe = json.dumps(stated_recipe(plan), sort_keys=True)
    bound = plan.output.shard_bytes
    form = LaidOutLikeBase(index) if bound is None else InShards(bound)
    files = form.lay_out(tensors, {"eutectic": version("eutectic"), "recipe": recipe})
    return OutputLayout(form, tuple(files))


def stated_recipe(plan: Plan) -> dict[str, Any]:
    """Return the recipe as a user would write it, with the scale that was used."""
    return {**plan.request.published, "scale": plan.scale}
