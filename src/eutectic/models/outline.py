"""A model's modules without its weights: what kind each is, and what transformers calls it."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["linear", "conv1d", "embedding", "other"]


@dataclass(frozen=True)
class Outline:
    """The parameters of a model in memory."""

    kinds: Mapping[str, Kind]  # parameter -> kind of the module that holds it
    leaves: frozenset[str]  # modules without modules in them
    tables: tuple[str, ...]  # weights of the tables of tokens, read and written
    shapes: Mapping[str, tuple[int, ...]]
    twins: Mapping[str, tuple[str, ...]]  # parameter -> its names in other modules
    turned: frozenset[str] = frozenset()  # parameters of modules that keep inputs first

    def of_module(self, module: str) -> list[str]:
        """Return the parameters of a module, by their full names."""
        return [name for name in self.kinds if name.rpartition(".")[0] == module]


def outline_of(config: Mapping[str, Any]) -> Outline | None:
    """Return the outline of the model that a configuration names.

    None where transformers is not installed, or does not know it: custom code is not run.
    """
    architectures = config.get("architectures")
    if not (architectures and config.get("model_type")):
        return None
    logger = logging.getLogger("transformers")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _outline(config, str(architectures[0]))
    except Exception:  # whatever a configuration that this version does not know raises
        return None
    finally:
        logger.setLevel(level)


def _outline(config: Mapping[str, Any], architecture: str) -> Outline | None:
    import transformers
    from transformers import CONFIG_MAPPING, PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    chosen: Any = getattr(transformers, architecture, None)
    if not (isinstance(chosen, type) and issubclass(chosen, PreTrainedModel)):
        return None
    made = CONFIG_MAPPING[str(config["model_type"])].from_dict(dict(config))
    with torch.device("meta"):
        model: Any = chosen(made)
    model.tie_weights()
    kinds: dict[str, Kind] = {}
    names: dict[int, list[str]] = {}
    leaves: set[str] = set()
    turned: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    classes: tuple[tuple[Any, Kind], ...] = (
        (nn.Linear, "linear"),
        (Conv1D, "conv1d"),
        (nn.Embedding, "embedding"),
    )
    for path, module in model.named_modules():
        if not any(True for _ in module.children()):
            leaves.add(path)
        found: list[Kind] = [k for c, k in classes if isinstance(module, c)]
        kind: Kind = found[0] if found else "other"
        for name, parameter in module.named_parameters(path, recurse=False):
            kinds[name] = kind
            shapes[name] = tuple(parameter.shape)
            if getattr(module, "is_transposed", False) is True:
                turned.add(name)
            names.setdefault(id(parameter), []).append(name)
    ends = [_end(getattr(model, f"get_{side}_embeddings")) for side in ("input", "output")]
    modules = {id(module): path for path, module in model.named_modules()}
    tables = [f"{modules[id(m)]}.weight" for m in ends if m is not None and id(m) in modules]
    twins = {n: tuple(o for o in own if o != n) for own in names.values() for n in own}
    tables = tuple(dict.fromkeys(tables))
    others = {n: o for n, o in twins.items() if o}
    return Outline(kinds, frozenset(leaves), tables, shapes, others, frozenset(turned))


def _end(asked: Any) -> Any:
    """Return the table that a model reads or writes tokens by; None where it has several."""
    try:
        return asked()
    except NotImplementedError:
        return None
