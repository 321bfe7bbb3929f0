"""W₀ + αΔ put into a loaded model, tensor by tensor."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from eutectic.models.names import file_keys, put_tensors


class Lazily(Mapping[str, Tensor]):
    """Tensors by name that are read or computed whenever they are asked for, and not kept."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def set_scale(
    module: nn.Module,
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    alpha: float,
    *,
    keys: Mapping[str, str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Set every tensor that `deltas` names to W₀ + αΔ, in place; others keep their values.

    Args:
        module: any model, such as that of `eutectic.evaluation.load_model`.
        base: checkpoint key -> W₀; `Lazily` reads from files.
        deltas: checkpoint key -> Δ of the same shape.
        alpha: α.
        keys: checkpoint key -> name in `module.state_dict()`, of `file_keys`; keys that the module
            has no use for are passed over (default: found out, which may load a model).
        dtypes: key -> dtype that the written checkpoint has; values are rounded to it.

    Cost: one pass over the tensors; one of them is in memory at a time besides the model.
    """
    if keys is None:
        keys = file_keys(module, {name: tuple(deltas[name].shape) for name in deltas})

    def value(name: str) -> Tensor:
        result = torch.add(base[name], deltas[name].to(base[name].dtype), alpha=alpha)
        return result if dtypes is None else result.to(dtypes[name])

    put_tensors(module, Lazily([n for n in deltas if n in keys], value), keys)


@torch.no_grad()
def round_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Round what a checkpoint holds to the dtype it is written in; tensors keep their own."""
    for values in module.state_dict().values():
        if values.is_floating_point():
            values.copy_(values.to(dtype))


def share_bodies(
    models: Sequence[nn.Module], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> list[tuple[nn.Module, dict[str, str]]]:
    """Let models of one architecture hold the tensors of their body once.

    Args:
        models: one per task, possibly the same object several times.
        shapes: for each, checkpoint key -> shape of the tensors that belong to the common body.

    Returns:
        Each different model with the keys to put into it. A tensor that models share is listed for
        the first of them only.
    """
    shared: dict[str, Tensor] = {}
    parts: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    for model, own_shapes in zip(models, shapes, strict=True):
        if id(model) in parts:
            continue
        parameters = dict(model.named_parameters(remove_duplicate=False))
        own: dict[str, str] = {}
        for key, name in file_keys(model, own_shapes).items():
            held = parameters.get(name)
            if held is not None and key in shared and shared[key].shape == held.shape:
                held.data = shared[key]
                continue
            own[key] = name
            if held is not None:
                shared[key] = held.data
        parts[id(model)] = (model, own)
    return list(parts.values())
