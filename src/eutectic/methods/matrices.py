"""The in-memory entry: one stack of task matrices in, one merged delta out."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Literal, overload

import torch
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods.linear import finite
from eutectic.methods.post import Post, all_posts, as_post
from eutectic.methods.registry import Context, Entry, Method, all_methods, get_method
from eutectic.methods.sound_statistics import check_statistics
from eutectic.tables import InNotebooks, Shown, data_frame, table
from eutectic.types import LayerStatistics, Merged

Deltas = Tensor | LowRankStack | Sequence[Tensor | LowRank | tuple[Tensor, Tensor]]


# Keywords of one call of `merge_matrices` that stand among the method's parameters.
_DEFAULTS: dict[str, Any] = {
    "experts": None,
    "tensor": "",
    "seed": 0,
    "precision": "fast",
    "fallback": "error",
    "post": None,
}


@overload
def merge_matrices(
    method: str, deltas: Deltas, *, full_output: Literal[True], **kwargs: Any
) -> Merged: ...
@overload
def merge_matrices(
    method: str, deltas: Deltas, *, full_output: Literal[False] = ..., **kwargs: Any
) -> Tensor: ...
def merge_matrices(
    method: str,
    deltas: Deltas,
    *,
    weights: Sequence[float] | None = None,
    base: Tensor | None = None,
    statistics: Sequence[LayerStatistics | None] | None = None,
    initial: Tensor | None = None,
    full_output: bool = False,
    **options: Any,
) -> Tensor | Merged:
    """Merge T task matrices Δ_t = W_t − W₀ into one merged delta, before the scale α.

    Args:
        method: a name from `eutectic.methods()`.
        deltas: `[T, out, in]`, or a sequence of T matrices; vectors `[T, n]` for methods with a
            rule for them. Each matrix may be given as a pair of thin factors `[out, r_t]` and
            `[r_t, in]` (LoRA's scaling·B and A), all of them as a `LowRankStack`; methods that
            take factors then never form `[T, out, in]`. float16 and bfloat16 are computed in
            float32.
        weights: w_t, one per expert (default 1).
        base: W₀ `[out, in]`, for methods that need it.
        statistics: one `LayerStatistics` (or None) per expert, for methods that use data.
        initial: merged delta `[out, in]` from which an iterative method starts.
        full_output: return a `Merged` with the method's record instead of the bare delta.
        **options: the method's own parameters; and `experts`, names, which seed per-expert random
            numbers (default "0", "1", …), `tensor`, the tensor's name, and `seed` (default 0),
            which seed all of them, `precision`, "fast" or "exact" linear algebra, `post`, a
            post-processor of the merge ("svc", or {"method": "svc", "metric": "inputs"}), and
            `fallback`: "error" (default) refuses statistics that are missing, "allow" takes the
            method's fall-back, and the record tells `rest` and `reason`.

    Returns:
        The merged delta `[out, in]`, float32 (float64 for float64 input).

    Raises:
        MethodError: unknown method or parameter, value out of range, wrong number of experts,
            shapes that do not fit, or something that the method needs and was not given.
        NumericalError: NaN or Inf in a delta.

    Examples:
        >>> import torch
        >>> deltas = torch.stack([torch.eye(2), 3 * torch.eye(2)])
        >>> merge_matrices("average", deltas)
        tensor([[2., 0.],
                [0., 2.]])
    """
    entry = get_method(method)
    call = {name: options.pop(name, default) for name, default in _DEFAULTS.items()}
    fallback, post = call.pop("fallback"), as_post(call.pop("post"))
    if fallback not in ("error", "allow"):
        raise MethodError(f"fallback must be 'error' or 'allow', got {fallback!r}.")
    values = entry.parse(options, beside=_DEFAULTS)
    stack = _as_stack(entry, deltas)
    context = Context(
        weights=_as_weights(weights, len(stack)),
        experts=_as_names(call.pop("experts"), len(stack)),
        base=_like_one(base, stack, "base"),
        statistics=_as_statistics(statistics, len(stack)),
        initial=_like_one(initial, stack, "initial"),
        **call,
    )
    lacking = missing_needs(entry, values, context)
    rest = entry.fallback(values)
    if "base" in lacking and rest != method:
        raise MethodError(f"method '{method}' needs {' and '.join(lacking)}.")
    # Grams are of matrices: a rule for other tensors does without them.
    lacking = [n for n in lacking if n != "base" and (len(stack.shape) == 3 or "gram'" not in n)]
    if lacking and fallback == "error":
        instead = "its own rule for tensors without" if rest == method else f"'{rest}' instead"
        raise MethodError(
            f"method '{method}' needs {' and '.join(lacking)}.\n"
            f"Pass statistics, or choose fallback='allow', which takes {instead}."
        )
    if post is not None and len(stack.shape) == 3:
        short = _lacking(post.needs, context, lambda weight: weight != 0)
        if short and fallback == "error":
            raise MethodError(
                f"post-processor '{post.name}' needs {' and '.join(short)}.\n"
                "Pass statistics, or choose fallback='allow', which does without."
            )
    merged = _run_or_fall_back(entry, stack, values, context, lacking)
    if post is not None and len(stack.shape) == 3:
        merged = run_post(post, merged, stack, context)
    return merged if full_output else merged.delta


def _run_or_fall_back(
    entry: Method,
    deltas: Tensor | LowRankStack,
    values: Any,
    context: Context,
    lacking: Sequence[str],
) -> Merged:
    rest = entry.fallback(values)
    if not lacking or rest == entry.name:
        return run_method(entry, deltas, values, context)
    other = get_method(rest)
    merged = run_method(other, deltas, other.parameters(), context)
    reason = f"'{entry.name}' needs {' and '.join(lacking)}"
    return Merged(merged.delta, {**merged.record, "rest": rest, "reason": reason})


def run_method(
    entry: Method, deltas: Tensor | LowRankStack, values: Any, context: Context
) -> Merged:
    """Run a method on a whole tensor in memory, in whichever space it works.

    Thin factors are expanded unless the method takes them. The state is prepared here unless
    `context.state` holds one already (model scope).
    """
    check_statistics(entry.needs(values), tuple(deltas.shape[1:]), context)
    context = dataclasses.replace(context, shape=tuple(deltas.shape[1:]))
    in_weights = entry.space(values) == "weight"
    base = context.base if in_weights else None
    if in_weights and base is None:
        raise MethodError(f"method '{entry.name}' works on weights and needs base.")
    if isinstance(deltas, LowRankStack):
        if entry.factors and not in_weights:
            result = entry.function(deltas, values, context)
            return result if isinstance(result, Merged) else Merged(result)
        deltas = deltas.dense()
    inputs = deltas if base is None else deltas + base
    if entry.elementwise and "base" in entry.needs(values):
        assert context.base is not None
        inputs = torch.cat([context.base.unsqueeze(0), inputs])
    if entry.prepare is not None and context.state is None:
        state = entry.prepare(lambda: iter([inputs.flatten(1)]), values, context)
        context = dataclasses.replace(context, state=state)
    result = entry.function(inputs, values, context)
    merged = result if isinstance(result, Merged) else Merged(result)
    return merged if base is None else Merged(merged.delta - base, merged.record)


def run_post(post: Post, merged: Merged, deltas: Tensor | LowRankStack, context: Context) -> Merged:
    """Return what a post-processor makes of a merged matrix, with its record under its name.

    Raises:
        MethodError: weights that it cannot have.
    """
    delta, told = processed(post, merged.delta, deltas, context)
    assert isinstance(delta, Tensor)
    return Merged(delta, {**merged.record, post.name: told})


def processed(
    post: Post, merged: Tensor | LowRank, deltas: Tensor | LowRankStack, context: Context
) -> tuple[Tensor | LowRank, dict[str, Any]]:
    """Return what a post-processor makes of M, thin where M is, and its record."""
    entry = post.entry
    if entry.check is not None and (fault := entry.check(post.parameters, context.weights)):
        raise MethodError(fault)
    check_statistics(post.needs, tuple(deltas.shape[1:]), context)
    return entry.function(merged, deltas, post.parameters, context)


def missing_needs(entry: Method, values: Any, context: Context) -> list[str]:
    """Return what the method needs for this tensor and the context lacks."""
    needs = {*entry.needs(values), *needed(entry, values)}
    return _lacking(needs, context, lambda weight: takes_part(entry, weight))


def _lacking(needs: Set[str], context: Context, counts: Callable[[float], bool]) -> list[str]:
    """Return what is needed and the context lacks; `counts` tells experts by their weight."""
    lacking: list[str] = []
    for need in sorted(needs):
        if need == "base":
            if context.base is None:
                lacking.append("base")
        elif context.statistics is None or any(
            s is None or not s.has(need)
            for s, weight in zip(context.statistics, context.weights, strict=True)
            if counts(weight)
        ):
            lacking.append(f"statistics with '{need}' for every expert")
    return lacking


def takes_part(method: Method, weight: float) -> bool:
    """Tell whether an expert of this weight matters to a method, and so do its statistics."""
    return weight != 0 or "absent" not in method.laws


def needed(method: Method, parameters: Any) -> frozenset[str]:
    """Return the statistics that a method may ask for, its initial guess included."""
    needs = set(method.needs(parameters))
    init = getattr(parameters, "init", None)
    if init in all_methods():
        guess = get_method(init)
        needs |= guess.needs(guess.parameters())
    return frozenset(needs - {"base"})


class MethodsTable(InNotebooks, dict[str, dict[str, Any]]):
    """Name of a method -> what there is to know of it; shows the summaries."""

    def __repr__(self) -> str:
        """Show one line per method."""
        wide = max(map(len, self), default=0)
        return "\n".join(f"{name:<{wide}}  {entry['summary']}" for name, entry in self.items())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks."""
        rows = [[name, entry["family"], entry["summary"]] for name, entry in self.items()]
        return (table(["method", "family", "summary"], rows, len(rows)),)

    def to_pandas(self) -> Any:
        """Return a data frame, one row per method."""
        return data_frame(({"method": name, **entry} for name, entry in self.items()), "method")


def methods() -> MethodsTable:
    """Return every method: name -> summary, family, paper, parameters, needs, experts.

    Examples:
        >>> sorted(methods()["slerp"]["parameters"])
        ['t']
    """
    table = MethodsTable()
    for name, entry in all_methods().items():
        table[name] = {
            **_described(entry, entry.function),
            "family": entry.family,
            "needs": sorted(entry.needs(entry.parameters())),
            "experts": entry.experts,
            "default_scale": entry.default_scale(8),
        }
    return table


def post_processors() -> MethodsTable:
    """Return what can follow any method: name -> summary, family "post", paper, parameters, needs.

    Examples:
        >>> sorted(post_processors()["svc"]["parameters"])
        ['directions', 'metric']
    """
    table = MethodsTable()
    for name, entry in all_posts().items():
        table[name] = {
            **_described(entry, entry.function),
            "family": "post",
            "needs": sorted(entry.needs(entry.parameters())),
            "default_scale": entry.default_scale,
        }
    return table


def _described(entry: Entry, function: Callable[..., Any]) -> dict[str, Any]:
    defaults = entry.parameters()
    return {
        "summary": entry.summary,
        "paper": entry.paper,
        "parameters": {
            f.name: {"type": f.type, "default": getattr(defaults, f.name)}
            for f in dataclasses.fields(entry.parameters)
        },
        "description": (function.__doc__ or "").strip(),
    }


def _as_stack(entry: Method, deltas: Deltas) -> Tensor | LowRankStack:
    if isinstance(deltas, LowRankStack):
        return _checked_factors(entry, list(deltas))
    if not isinstance(deltas, Tensor):
        thin = [_as_factors(d) for d in deltas if not isinstance(d, Tensor)]
        if thin and len(thin) == len(deltas):
            return _checked_factors(entry, thin)
        whole = [d if isinstance(d, Tensor) else _as_factors(d).dense() for d in deltas]
        _check_one_shape(tuple(d.shape) for d in whole)
        deltas = torch.stack(whole)
    if deltas.ndim < 2 or (deltas.ndim != 3 and not entry.vectors):
        allowed = "[T, ...]" if entry.vectors else "[T, out, in]"
        raise MethodError(
            f"method '{entry.name}' takes deltas {allowed}, got shape {list(deltas.shape)}."
        )
    entry.check_expert_count(len(deltas))
    if not deltas.is_floating_point():
        raise MethodError(f"deltas must be floating-point, got {deltas.dtype}.")
    if deltas.dtype not in (torch.float32, torch.float64):
        deltas = deltas.float()
    if not finite(deltas):
        bad = [t for t, d in enumerate(deltas) if not finite(d)]
        raise NumericalError(f"NaN or Inf in the deltas of expert {bad}; nothing was merged.")
    return deltas


def _as_factors(pair: LowRank | Sequence[Tensor]) -> LowRank:
    factors = [pair.left, pair.right] if isinstance(pair, LowRank) else list(pair)
    shapes = [list(factor.shape) for factor in factors]
    if [len(s) for s in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
        raise MethodError(
            "a delta is a tensor, or a pair of thin factors [out, r] and [r, in]; "
            f"got a sequence of shapes {shapes}."
        )
    return LowRank(*factors)


def _checked_factors(entry: Method, pairs: Sequence[LowRank]) -> LowRankStack:
    """Return the deltas as factors in float32 or float64."""
    _check_one_shape(pair.shape for pair in pairs)
    entry.check_expert_count(len(pairs))
    dtype = functools.reduce(torch.promote_types, (pair.dtype for pair in pairs))
    if not dtype.is_floating_point:
        raise MethodError(f"deltas must be floating-point, got {dtype}.")
    bad = [t for t, p in enumerate(pairs) if not (finite(p.left) and finite(p.right))]
    if bad:
        raise NumericalError(f"NaN or Inf in the deltas of expert {bad}; nothing was merged.")
    wide = dtype if dtype == torch.float64 else torch.float32
    left, right = zip(*((p.left.to(wide), p.right.to(wide)) for p in pairs), strict=True)
    return LowRankStack(left, right)


def _check_one_shape(shapes: Iterable[tuple[int, ...]]) -> None:
    found = set(shapes)
    if len(found) != 1:
        raise MethodError(
            f"the deltas must all have one shape, got {sorted(found) or 'no delta at all'}."
        )


def _as_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    values = tuple(float(w) for w in weights)
    if len(values) != count or not all(abs(w) < float("inf") for w in values):
        raise MethodError(f"weights must be {count} finite numbers, got {list(weights)}.")
    return values


def _as_names(experts: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = tuple(experts) if experts is not None else tuple(str(t) for t in range(count))
    if len(names) != count or len(set(names)) != count:
        raise MethodError(f"experts must be {count} different names, got {list(names)}.")
    return names


def _as_statistics(
    statistics: Sequence[LayerStatistics | None] | None, count: int
) -> tuple[LayerStatistics | None, ...] | None:
    if statistics is None:
        return None
    if len(statistics) != count:
        raise MethodError(
            f"statistics must hold one entry per expert ({count}), got {len(statistics)}."
        )
    return tuple(statistics)


def _like_one(value: Tensor | None, stack: Tensor | LowRankStack, name: str) -> Tensor | None:
    if value is None:
        return None
    if tuple(value.shape) != tuple(stack.shape[1:]):
        raise MethodError(
            f"{name} must have the shape of one delta {list(stack.shape[1:])}, "
            f"got {list(value.shape)}."
        )
    return value.to(stack.device, stack.dtype)
