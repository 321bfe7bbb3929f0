"""What a merge changes in loaded models, and how an α is put into them.

Of full checkpoints and most adapters that is W₀ + αΔ, tensor by tensor. Merges of (IA)³ adapters
are vectors 1 + αΔ; what models hold are the base's weights multiplied with them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from eutectic.checkpoint.experts import applied_vectors, is_ia3, is_turned
from eutectic.checkpoint.opening import open_reader
from eutectic.execution.schedule import Unscaled
from eutectic.models.names import put_tensors
from eutectic.planning.inputs import Inputs
from eutectic.tuning.inplace import Lazily, set_scale
from eutectic.types import Treatment

Parts = Sequence[tuple[nn.Module, Mapping[str, str]]]  # models with the keys to put into each


def is_of_vectors(inputs: Inputs) -> bool:
    """Tell whether what is merged are (IA)³ adapters, which leave the weights alone."""
    paths = inputs.paths
    return paths is not None and bool(paths.experts) and all(map(is_ia3, paths.experts.values()))


def base_folder(inputs: Inputs) -> Path:
    """Return the folder of the base that models are loaded from."""
    assert inputs.index is not None and inputs.paths is not None  # only merges from files search
    if not is_of_vectors(inputs):
        return inputs.index.folder
    place = inputs.paths.base  # the index is an adapter's
    return place if place.is_dir() else place.parent


def common_shapes(unscaled: Unscaled) -> dict[str, tuple[int, ...]]:
    """Return checkpoint key -> shape of what is common to the models of all tasks."""
    plan = unscaled.plan
    if not is_of_vectors(unscaled.inputs):
        return {t.name: t.shape for t in plan.tensors if t.treatment is not Treatment.HEAD}
    vectors, saved = _at(unscaled, 0.0)
    with open_reader(base_folder(unscaled.inputs)) as reader:
        held = reader.entries
        return {n: held[n].shape for n in (*vectors, *saved) if n in held}


def putting(unscaled: Unscaled, parts: Parts) -> Callable[[float], None]:
    """Return what puts an α into loaded models; tensors whose α a rule names are put in now."""
    if is_of_vectors(unscaled.inputs):
        return lambda scale: _put_vectors(unscaled, parts, scale)
    merged = {t.name: t for t in unscaled.plan.merged}
    dtypes = {name: t.dtype for name, t in merged.items()}
    base = Lazily(merged, lambda name: unscaled.base(merged[name]))
    tunable = [name for name, t in merged.items() if t.tunable]
    deltas = Lazily(tunable, lambda name: unscaled.delta(merged[name]))
    for model, keys in parts:
        for name, fixed in merged.items():
            if not fixed.tunable:
                delta = {name: unscaled.delta(fixed)}
                set_scale(model, base, delta, fixed.scale, keys=keys, dtypes=dtypes)

    def put(scale: float) -> None:
        for model, keys in parts:
            set_scale(model, base, deltas, scale, keys=keys, dtypes=dtypes)

    return put


def _put_vectors(unscaled: Unscaled, parts: Parts, scale: float) -> None:
    vectors, saved = _at(unscaled, scale)
    with open_reader(base_folder(unscaled.inputs)) as reader:
        held = reader.entries

        def weight(name: str) -> Tensor:
            if name in saved:
                return saved[name]
            return reader.read(name).view(held[name].shape) * vectors[name]

        names = [name for name in (*vectors, *saved) if name in held]
        for model, keys in parts:
            put_tensors(model, Lazily([n for n in names if n in keys], weight), keys)


def _at(unscaled: Unscaled, scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the merged adapter at α, in the dtypes of its file, by what it does to the base."""
    tensors: dict[str, Tensor] = {}
    for planned in unscaled.plan.tensors:
        values = unscaled.base(planned)
        if planned.merged:
            alpha = scale if planned.tunable else planned.scale
            values = values.add(unscaled.delta(planned).to(values.dtype), alpha=alpha)
        tensors[planned.name] = values.to(planned.dtype)
    folder = next(iter(unscaled.inputs.experts.values())).folder
    assert folder is not None
    return applied_vectors(tensors, turned=is_turned(folder))
