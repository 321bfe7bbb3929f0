"""The changes of an adapter's layers, and which way round the base keeps each."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from eutectic.checkpoint.adapter_config import LoraFields
from eutectic.checkpoint.adapter_keys import Group
from eutectic.checkpoint.adapter_places import misplaced, refuse_misplaced
from eutectic.checkpoint.changes import BaseWeights, Change, WholeChange, kept
from eutectic.checkpoint.expert_tensors import Factors
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.peft_kinds.formulas import (
    AdapterSettings,
    Formula,
    Layer,
    Parts,
    Shape,
    fits,
)
from eutectic.checkpoint.peft_kinds.kinds import Kind
from eutectic.checkpoint.peft_kinds.low_rank import (
    has_residual,
    lora_scaling,
    variant_of_lora,
    vera_size,
)
from eutectic.checkpoint.token_rows import trained_rows
from eutectic.conventions_ties import is_output_table
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource

PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
_ROWS = "trainable_tokens_delta"


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter's configuration and file."""

    settings: AdapterSettings
    kind: Kind | None  # None for a LoRA
    fields: LoraFields | None  # of a LoRA
    source: "TensorSource"
    shared: Mapping[str, TensorEntry]  # parts that all layers have in common
    label: str


def factor_pair(group: Mapping[str, TensorEntry]) -> tuple[TensorEntry, TensorEntry] | None:
    """Return the factors A and B of a LoRA."""
    return next(((group[a], group[b]) for a, b in PAIRS if a in group and b in group), None)


def layer_changes(
    adapter: OpenAdapter,
    groups: Mapping[str, Group],
    modules: Mapping[str, str],
    shapes: Mapping[str, Shape],
    base: BaseWeights,
    keys: Mapping[str, str],
    straight: Collection[str] = (),
) -> tuple[dict[str, Factors], dict[str, Change]]:
    """Return thin factors by the base's names, and changes of every other form.

    `groups` are the parts that act on a tensor, `modules` its path in the adapted model, `shapes`
    what the base has, `keys` its name in the base's file where that is another (tied tables),
    `straight` those known to be `[out, in]`.
    """
    acting = {n: group for n, group in groups.items() if group.keys() - {"full"} and n in shapes}
    scaled = {n: g["vera_lambda_b"] for n, g in acting.items() if "vera_lambda_b" in g}
    sizes = tuple(vera_size(entry.shape[0], shapes[n]) for n, entry in scaled.items())
    layers: dict[str, Layer] = {}
    formulas: dict[str, Formula | None] = {}
    for name, group in acting.items():
        held = {part: e.shape for part, e in {**group, **adapter.shared}.items() if part != "full"}
        layers[name] = Layer(modules[name], shapes[name], held, adapter.settings, sizes)
        formulas[name] = None if _ROWS in group else _formula(adapter, layers[name])
    turned = _orientations(adapter, layers, formulas, straight)
    _check_places(adapter, acting, layers, turned)
    factored: dict[str, Factors] = {}
    changes: dict[str, Change] = {}
    for name, group in acting.items():
        formula, shape = formulas[name], shapes[name]
        if _ROWS in group:
            config = adapter.settings.raw
            rows = trained_rows(adapter.source, group, modules[name], shape, config, adapter.label)
            changes[name] = rows
        elif formula is None:
            assert adapter.fields is not None
            a, b = factor_pair(group) or (group["lora_A"], group["lora_B"])
            scaling = lora_scaling(adapter.fields, layers[name])
            factored[name] = Factors(a, b, scaling, turned[name])
        else:
            parts = {part: e for part, e in {**group, **adapter.shared}.items() if part != "full"}
            key = keys.get(name, name)
            changes[name] = WholeChange(
                key,
                adapter.source,
                parts,
                formula,
                shape,
                turned[name],
                base,
                kept(),
                group.get("full"),
            )
    return factored, changes


def _check_places(
    adapter: OpenAdapter,
    acting: Mapping[str, Group],
    layers: Mapping[str, Layer],
    turned: Mapping[str, bool],
) -> None:
    """Refuse indices that point at nothing; CheckpointError, before anything is computed."""
    if adapter.kind is None or adapter.kind.places is None:
        return
    wrong: list[str] = []
    for name, group in acting.items():
        if name not in turned:
            continue
        shape = layers[name].shape
        matrix = (shape[0], math.prod(shape[1:]))
        places = adapter.kind.places(layers[name].parts, matrix[::-1] if turned[name] else matrix)
        wrong += misplaced(adapter.source, group, places)
    refuse_misplaced(wrong, adapter.label)


def acts_on(adapter: OpenAdapter, module: str, group: Group, shape: Shape) -> bool:
    """Tell whether parts make a change of a tensor of this shape, either way round."""
    if _ROWS in group:
        return len(shape) == 2 and group[_ROWS].shape[1:] == shape[1:]
    held = {part: e.shape for part, e in {**group, **adapter.shared}.items() if part != "full"}
    layer = Layer(module, shape, held, adapter.settings)
    return bool(_feasible(layer, _formula(adapter, layer)))


def parts_fit(adapter: OpenAdapter, module: str, group: Group, shape: Shape) -> bool:
    """Tell whether parts make a change of a tensor of this shape that is kept `[out, in]`."""
    held = {part: e.shape for part, e in {**group, **adapter.shared}.items()}
    sizes = ((shape[0], shape[1]),) if len(shape) == 2 else ()
    layer = Layer(module, shape, held, adapter.settings, sizes)
    return False in _feasible(layer, _formula(adapter, layer))


def module_of(own: str) -> str:
    """Return the module of a parameter, as PEFT's patterns see it; a bare parameter is its own."""
    return own.removesuffix(".weight").removesuffix(".bias")


def _formula(adapter: OpenAdapter, layer: Layer) -> Formula | None:
    """Return how a layer's change is computed; None for a plain product of thin factors."""
    if adapter.kind is not None:
        if adapter.kind.formula is None:
            raise CheckpointError(f"{adapter.label}: '{layer.module}' has parts of another kind.")
        try:
            return adapter.kind.formula(layer)
        except KeyError as lacking:
            raise CheckpointError(
                f"{adapter.label}: '{layer.module}' lacks the part {lacking.args[0]} of its change "
                f"(it has {', '.join(layer.parts)})."
            ) from None
    assert adapter.fields is not None
    if "lora_B.bias" in layer.parts:
        return _bias(lora_scaling(adapter.fields, layer))
    init = adapter.settings.raw.get("init_lora_weights")
    if "lora_magnitude_vector" in layer.parts or has_residual(layer, init):
        return variant_of_lora(layer, adapter.fields, init)
    return None


def _bias(scaling: float) -> Formula:
    """Return the change of a bias, where the factor B has one."""

    def compute(parts: Parts, base: Tensor) -> Tensor:
        return parts["lora_B.bias"].reshape(-1, 1) * scaling

    return Formula(compute, transposed=False)


def _feasible(layer: Layer, formula: Formula | None) -> tuple[bool, ...]:
    """Return whether the base may keep the map as it is (False), turned (True), or both."""
    shape = layer.shape
    out, width = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
    if formula is None:
        embedding = "lora_embedding_A" in layer.parts
        a, b = (layer.parts[part] for part in PAIRS[embedding])
        if len(shape) > 2 and shape[1:] != a[1:]:
            return ()
        made = b[0], math.prod(a[1:])
        found = (made == (out, width), made == (width, out))
    else:
        found = (
            fits(formula, layer, out, width),
            len(shape) == 2 and fits(formula, layer, width, out),
        )
    wanted = None if formula is None else formula.transposed
    return tuple(
        t for t, can in zip((False, True), found, strict=True) if can and wanted in (None, t)
    )


def _orientations(
    adapter: OpenAdapter,
    layers: Mapping[str, Layer],
    formulas: Mapping[str, Formula | None],
    straight: Collection[str],
) -> dict[str, bool]:
    """Tell for each layer whether the base stores [in, out] instead of [out, in].

    Shapes decide; for square matrices the configuration does, or else what the adapter's other
    tensors show: all of GPT-2's `Conv1D` are stored alike, and no output layer is one.
    """
    transposed: dict[str, bool] = {}
    fixed: dict[str, bool] = {}
    square: list[str] = []
    for name, layer in layers.items():
        if _ROWS in layer.parts:
            continue
        found = _feasible(layer, formulas[name])
        if not found:
            raise _another_base(adapter, name, layer)
        if name in straight:
            fixed[name] = False
        elif "lora_embedding_A" in layer.parts:
            fixed[name] = True
        elif len(found) == 2:
            fixed.update({name: False} if is_output_table(name) else {})
            square.append(name)
        else:
            transposed[name] = found[0]
    stated = bool(adapter.settings.common.fan_in_fan_out)
    as_the_others = stated or any(transposed.values())
    return {**transposed, **dict.fromkeys(square, as_the_others), **fixed}


def _another_base(adapter: OpenAdapter, name: str, layer: Layer) -> CheckpointError:
    a = next((layer.parts[a] for a, b in PAIRS if a in layer.parts and b in layer.parts), None)
    if a is not None and (b := layer.parts.get("lora_B", layer.parts.get("lora_embedding_B"))):
        made = f"the factors of '{name}' make a [{b[0]}, {math.prod(a[1:])}] matrix"
    else:
        shapes = ", ".join(f"{part} {list(shape)}" for part, shape in layer.parts.items())
        made = f"the parts of '{name}' ({shapes}) make no change of it"
    return CheckpointError(
        f"{adapter.label}: {made}, the base's tensor is {list(layer.shape)}.\n"
        "The adapter belongs to another base."
    )
