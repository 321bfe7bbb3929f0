"""The contract of a method, and the table of all of them.

A method is a pure function from stacked task matrices to one merged matrix:

    @register("my_method", summary="…", paper="…", parameters=MyParameters)
    def my_method(deltas: Tensor, parameters: MyParameters, context: Context) -> Tensor: ...

`deltas` is `[T, *shape]`, float32 or float64, never modified; the result is `[*shape]`, before α.
A method that declares `Takes(factors=True)` may also get a `LowRankStack`, the same matrices as
products of thin factors. It reads no file, prints nothing, chooses no device and looks at no tensor
name (`context.tensor` seeds random numbers, nothing else).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, overload

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from eutectic.errors import Fault, MethodError, suggest
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.types import LayerStatistics, Merged

Precision = Literal["fast", "exact"]
Space = Literal["delta", "weight", "either"]
Chunks = Callable[[], Iterator[Tensor]]

LAWS = {
    "permutation": "experts in another order, with their weights, names and statistics: no change",
    "homogeneous": "f(cΔ) = c f(Δ) for every number c",
    "zero": "zero deltas give zero",
    "single": "one expert gives its own delta",
    "copies": "T copies of one expert give its delta",
    "absent": "an expert of weight 0 might as well not be there",
    "rotation": "f(PΔQ) = P f(Δ) Q for orthogonal P and Q, statistics turned alike",
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Base of every method's parameters: frozen, keyword-only, numbers finite, no unknown keys."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What a method may know besides the deltas.

    Attributes:
        weights: w_t, one per expert (default: all 1).
        experts: names of the experts; they seed per-expert random numbers.
        tensor: name of the tensor; it seeds random numbers and tags messages.
        base: W₀ in the shape of one delta, for methods that need it.
        statistics: one entry per expert; None where an expert has none for this tensor.
        initial: a merged delta to start from, for iterative methods.
        seed: the recipe's seed.
        precision: "fast" (Gram and iterative kernels, error-checked) or "exact" (full SVD).
        own: parameters of single experts, None where they are the tensor's; empty where all are.
        shape: the whole tensor's shape, also where an element-wise method sees one chunk: as the
            file lays it out there, so that its rows are those of the file.
        offset: flat index of the first entry, when an element-wise method sees one chunk.
        state: what the method's `prepare` returned for this tensor or this model.
    """

    weights: tuple[float, ...]
    experts: tuple[str, ...]
    tensor: str = ""
    base: Tensor | None = None
    statistics: tuple[LayerStatistics | None, ...] | None = None
    initial: Tensor | None = None
    seed: int = 0
    precision: Precision = "fast"
    own: tuple[Any, ...] = ()
    shape: tuple[int, ...] = ()
    offset: int = 0
    state: Any = None

    def each(self, parameters: Any, name: str) -> list[Any]:
        """Return the value of one parameter for every expert."""
        own = self.own or (None,) * len(self.experts)
        return [getattr(parameters if p is None else p, name) for p in own]

    @property
    def row_width(self) -> int:
        """Entries of one row of the tensor: of its last dimension, 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @overload
    def weigh(self, deltas: Tensor) -> Tensor: ...
    @overload
    def weigh(self, deltas: LowRankStack) -> LowRankStack: ...
    def weigh(self, deltas: Tensor | LowRankStack) -> Tensor | LowRankStack:
        """Return w_tΔ_t; the deltas themselves when every weight is 1."""
        if all(w == 1.0 for w in self.weights):
            return deltas
        if isinstance(deltas, LowRankStack):
            return deltas.weighted(self.weights)
        w = torch.tensor(self.weights, dtype=deltas.dtype, device=deltas.device)
        return deltas * w.view(-1, *[1] * (deltas.ndim - 1))

    def seed_for(self, *salt: str) -> int:
        """Return a 63-bit seed from (recipe seed, tensor name, salt), the same on any machine."""
        text = "\0".join([str(self.seed), self.tensor, *salt])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


MethodFunction = Callable[[Any, Any, Context], "Tensor | Merged"]
Value = TypeVar("Value")


def always(value: Value) -> Callable[[Any], Value]:
    """Return a function of one value for whatever it is asked."""
    return lambda _: value


@dataclass(frozen=True, kw_only=True)
class Takes:
    """What a method is given; `space`, `needs` and `fallback` may depend on the parameters.

    Attributes:
        elementwise: each output entry depends on the same entry of the deltas and on `prepare`'s
            state alone: it treats tensors of any shape, and the engine runs it in chunks. One that
            needs the base gets W₀ before the deltas or weights: chunks are `[1 + T, n]`.
        rows: each output entry of an element-wise method also depends on the rest of its row (the
            last dimension), so chunks are whole rows.
        vectors: it has a rule of its own for 1-D parameters (element-wise methods always do);
            all other methods see matrices only, and vectors are averaged.
        factors: its first argument may be a `LowRankStack` of deltas; methods without it, and
            those that work on weights, get such deltas expanded.
        core_grams: beside thin factors it takes Grams between rows that the experts share as
            `core_gram` and `core_rows`; methods without it get them as `gram_factor`.
        space: "delta": deltas in, delta out. "weight": the experts' weights in, the merged
            weight out. "either": the function commutes with adding the same matrix to every
            input, f(W_1 … W_T) = W₀ + f(Δ_1 … Δ_T), so the engine need not read the base.
        experts: fewest and most experts.
        per_expert: parameters of which each expert may have a value of its own; the function reads
            them by `Context.each`.
        needs: of "base", "gram", "output_gradient_gram", "fisher_diagonal", "block_fisher":
            what a tensor must come with. A tensor without it takes `fallback`.
        fallback: method for tensors that lack what is needed; its own name when the function
            handles the lack itself.
    """

    elementwise: bool = False
    rows: bool = False
    vectors: bool = False
    factors: bool = False
    core_grams: bool = False
    space: Callable[[Any], Space] = always("delta")
    experts: tuple[int, int | None] = (1, None)
    per_expert: Set[str] = frozenset()
    needs: Callable[[Any], Set[str]] = always(frozenset())
    fallback: Callable[[Any], str] = always("average")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs, for the plan's estimate; element-wise ones are estimated by bytes.

    Attributes:
        workspace: from the number of experts to scratch memory, in multiples of the stack of
            deltas, for square ones.
        squares: the share of that scratch memory which goes by the square of the shorter side, and
            so is less for long matrices.
        products: time, in matrix products `[out, in] @ [in, in]` per expert (smaller side).
        tall: as many products more for each min(out/in, T)² − 1 of a matrix with more outputs than
            inputs, where a method decomposes what T experts have in the outputs side by side.
        statistics_copies: from the parameters to how many float64 copies of each expert's Grams
            it may hold beside the stored ones.
        keeps_rows: whether, with these parameters, Grams that come in few rows and a diagonal stay
            so: no matrix of the inputs' width is formed.
    """

    workspace: Callable[[int], float] = always(3.0)
    squares: float = 0.0
    products: float = 10.0
    tall: float = 0.0
    statistics_copies: Callable[[Any], float] = always(0.0)
    keeps_rows: Callable[[Any], bool] = always(False)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a method does and says beside the merge of one tensor.

    Attributes:
        default_scale: from the number of experts to α when the user names none.
        check: from the parameters and the experts' weights to a fault in words, found before any
            work; None where they fit together.
        explain: from the stack's shape `[T, out, in]`, the parameters and the precision to one
            sentence saying which numerical route will be taken, for the plan.
        prepare: a reduction over all chunks before the merge; called with a function that starts
            a fresh iteration over `[T, n]` chunks. Its result becomes `context.state`.
        prepares: whether, with these parameters, `prepare` reads any chunk.
        model_scope: whether, with these parameters, `prepare` runs over the whole model at once.
        finish: from the Frobenius norms of the merged matrices of like layers and the parameters
            to a factor for each, for rules that compare layers. The engine knows which are alike.
        thin: from a `LowRankStack` of deltas to the merged delta as thin factors, for methods that
            keep it thin; None where it is not, with these parameters and weights.
        spans: whether each merged matrix lies in the span of the deltas' columns, so that it has no
            more directions than they have together; None: as those do that take thin factors.
        shares_rows: whether, with these parameters, the parts of a fused matrix, merged one by one,
            have their rows in one span, so that together they have no more directions than each.
        each_row: whether it merges the rows of a matrix each by itself, so that one row is merged
            as well as many: solutions of linear systems on the inputs. Others flatten a spectrum.
        flat_in: the metric in which all directions of the merged delta are alike: "plain" for Δ,
            "inputs" for ΔC̄^{1/2}. What cuts it there has to choose by something else.
    """

    default_scale: Callable[[int], float] = always(1.0)
    check: Callable[[Any, Sequence[float]], str | None] | None = None
    explain: Callable[[tuple[int, ...], Any, Precision], str] | None = None
    prepare: Callable[[Chunks, Any, Context], Any] | None = None
    prepares: Callable[[Any], bool] = always(True)
    model_scope: Callable[[Any], bool] = always(False)
    finish: Callable[[Sequence[float], Any], Sequence[float]] | None = None
    thin: Callable[[LowRankStack, Any, Context], LowRank | None] | None = None
    spans: bool | None = None
    shares_rows: Callable[[Any], bool] = always(True)
    each_row: bool = False
    flat_in: Literal["plain", "inputs"] | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What has a name and parameters that are checked: a row of a table."""

    kind: ClassVar[str]
    name: str
    summary: str
    paper: str
    parameters: type[Parameters]
    laws: frozenset[str]
    adapter: TypeAdapter[Any] = field(repr=False)

    def parse(self, values: Mapping[str, Any], *, beside: Iterable[str] = ()) -> Any:
        """Return checked parameters; `beside` names keywords that are allowed beside them.

        Raises:
            MethodError: naming every unknown key (with the nearest known one) and every value out
                of its range.
        """
        try:
            return self.adapter.validate_python(dict(values))
        except ValidationError as error:
            faults = "\n".join(f"  - {f}" for f in self.faults(error, beside))
            raise MethodError(
                f"{self.kind} '{self.name}' refuses its parameters:\n{faults}"
            ) from None

    def faults(self, error: ValidationError, beside: Iterable[str] = ()) -> list[Fault]:
        """Return one record for each fault that pydantic found in the parameters."""
        known = [f.name for f in dataclasses.fields(self.parameters)]
        faults: list[Fault] = []
        for item in error.errors():
            name = ".".join(str(part) for part in item["loc"])
            if item["type"] == "unexpected_keyword_argument":
                what = f"unknown parameter '{name}'.{suggest(name, [*known, *beside])}"
                if not known:
                    what += " It takes none."
                faults.append(Fault("unknown_parameter", what, allowed=", ".join(known)))
            else:
                got = repr(item.get("input"))
                faults.append(Fault(item["type"], f"{item['msg'].lower()}.", name, got=got))
        return faults


@dataclass(frozen=True, kw_only=True)
class Method(Entry, Takes, Cost, Rules):
    """One entry of the table: what `register` was told."""

    kind = "method"
    family: str
    function: MethodFunction

    @property
    def keeps_span(self) -> bool:
        """Whether a merged matrix has no more directions than the deltas have together."""
        return self.factors if self.spans is None else self.spans

    def in_entries(self, parameters: Any) -> bool:
        """Tell whether it merges each entry by itself, whatever shape the entries stand in."""
        return self.elementwise or self.needs(parameters) == {"fisher_diagonal"}

    def check_expert_count(self, count: int) -> None:
        """Raise MethodError when the method is not defined for `count` experts."""
        low, high = self.experts
        if count < low or (high is not None and count > high):
            allowed = f"exactly {low}" if low == high else f"at least {low}"
            if high is not None and low != high:
                allowed = f"{low} to {high}"
            raise MethodError(f"method '{self.name}' takes {allowed} experts, got {count}.")


_METHODS: dict[str, Method] = {}
_TAKES, _COST, _RULES = Takes(), Cost(), Rules()


def register(
    name: str,
    *,
    summary: str,
    paper: str = "",
    parameters: type[Parameters] = Parameters,
    laws: Set[str] = frozenset(),
    takes: Takes = _TAKES,
    cost: Cost = _COST,
    rules: Rules = _RULES,
) -> Callable[[MethodFunction], MethodFunction]:
    """Enter a method into the table; its family is the file it lives in.

    Args:
        name: published name in snake_case.
        summary: one line for tables.
        paper: "Title, arXiv NNNN.NNNNN".
        parameters: its frozen dataclass.
        laws: the names in `LAWS` that it keeps with its default parameters; tests/conformance
            holds it to them.
        takes: what it is given.
        cost: what it costs, for the plan's estimate.
        rules: what it does and says beside the merge of one tensor.
    """

    def enter(function: MethodFunction) -> MethodFunction:
        if name in _METHODS:
            raise ValueError(f"method '{name}' is registered twice")
        if unknown := sorted(set(laws) - LAWS.keys()):
            raise ValueError(f"method '{name}' claims laws that nobody checks: {unknown}")
        told = {**vars(takes), **vars(cost), **vars(rules)}
        told["vectors"] = takes.vectors or takes.elementwise
        _METHODS[name] = Method(
            name=name,
            family=function.__module__.rpartition(".")[2],
            summary=summary,
            paper=paper,
            function=function,
            parameters=parameters,
            laws=frozenset(laws),
            adapter=TypeAdapter(parameters),
            **told,
        )
        return function

    return enter


def get_method(name: str) -> Method:
    """Return a registered method.

    Raises:
        MethodError: when there is none of this name; the nearest name is suggested.
    """
    if name not in _METHODS:
        names = sorted(_METHODS)
        raise MethodError(
            f"unknown method '{name}'.{suggest(name, names)}\nKnown methods: {', '.join(names)}."
        )
    return _METHODS[name]


def all_methods() -> dict[str, Method]:
    """Return the table, sorted by name."""
    return dict(sorted(_METHODS.items()))
