"""What a plan is made from: a checked recipe, and everything that it names, opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eutectic.methods import Method
from eutectic.planning.inputs import Inputs
from eutectic.recipes.document import Source as Document
from eutectic.recipes.schema import Recipe


@dataclass(frozen=True)
class MergeRequest:
    """A recipe with its inputs. Planning reads it; nothing that runs afterwards does.

    Attributes:
        recipe: what was asked for.
        inputs: base, experts and statistics, of which headers are known.
        document: where the recipe was written, for the lines of faults.
        method: the recipe's method.
        parameters: its checked parameters.
        scale: α where no rule says otherwise; while it is to be searched, the method's default.
        own_parameters: expert -> its parameters, for experts that have some of their own.
        tied: tensor -> the earlier tensor of the file that it is a copy of.
        statistics_names: expert -> base name (with the part of a packed tensor) -> name in its
            statistics.
    """

    recipe: Recipe
    inputs: Inputs
    document: Document
    method: Method
    parameters: Any
    scale: float
    own_parameters: Mapping[str, Any]
    tied: Mapping[str, str]
    statistics_names: Mapping[str, Mapping[str, str]]

    def named_by(self, name: str) -> str:
        """Return whose rules and random numbers a tensor takes: its own, or its tied partner's."""
        return self.tied.get(name, name)
