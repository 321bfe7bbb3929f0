"""What a recipe says of single tensors, whatever the dialect that it was written in.

A plain recipe says the same of every tensor and needs none of this. A `Script` answers for each
tensor of the output how it is merged (`Direction`), and which layers of which models the layers of
the output are made of (`Band`). Planning asks; after planning nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eutectic.errors import Fault, Note


@dataclass(frozen=True)
class Band:
    """Layers of the output that come from the same models.

    Attributes:
        count: how many layers.
        takes: model -> the first of the layers that it gives.
        base: (model, the first of its layers) whose values the others are differences from; None
            where there is none.
    """

    count: int
    takes: Mapping[str, int]
    base: tuple[str, int] | None = None
    line: int = 0


@dataclass(frozen=True)
class Place:
    """Where a tensor of the output stands.

    Attributes:
        name: its name in the output.
        own: model -> the tensor's name there, in the base's spelling: of another layer, perhaps.
        depth: 0 in the first layer of its band (or of the model), 1 in the last; 0 outside layers.
        module: the part of the model that it belongs to.
        band: which of the module's bands it belongs to: the first for what stands before the
            layers, the last for what stands behind them.
    """

    name: str
    own: Mapping[str, str]
    depth: float = 0.0
    module: str = ""
    band: int = 0


@dataclass(frozen=True)
class Direction:
    """How one tensor is merged.

    Attributes:
        method: a registered method.
        parameters: its checked parameters.
        weights: model -> w_t.
        own: model -> its own checked parameters, where they differ.
        scale: α; None takes the recipe's, which may be a search.
        from_base: whether the models count by their differences from the base. If not, they are
            merged as they are, as if the base were zero.
        whole: whether the method sees the tensor in its own shape, whatever kind of tensor it is.
    """

    method: str
    parameters: Any
    weights: Mapping[str, float]
    own: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scale: float | None = None
    from_base: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Script:
    """What a recipe says of every tensor.

    Attributes:
        direct: from the place of a tensor, and the models that hold it, to how it is merged.
        stated: the recipe as it was written, if in words of its own, for cards and for what
            identifies a run; None where the `Recipe` says it.
        bands: part of the model -> its layers, from the first; empty where they are the base's.
        takes: part of the model -> the models that are merged there; "" is the whole model. Parts
            of which nothing is said are the base's.
        bases: further models that only serve as the base of some layers: name -> path.
        based: whether the recipe names a base at all; without one, the recipe's base only lends
            names, shapes and configuration.
        notes: what a user should know of how the recipe was read.
    """

    direct: Callable[[Place, tuple[str, ...]], Direction | list[Fault]]
    stated: Mapping[str, Any] | None = None
    bands: Mapping[str, tuple[Band, ...]] = field(default_factory=dict[str, tuple[Band, ...]])
    takes: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    bases: Mapping[str, str] = field(default_factory=dict[str, str])
    based: bool = True
    notes: tuple[Note, ...] = ()
