"""Post-processors: pure functions from a merged matrix, and what it was merged from, to another.

    @post_processor("my_step", summary="…", paper="…", parameters=MyParameters)
    def my_step(merged, deltas, parameters, context): ...

They follow any method, see deltas, weights and statistics as methods do, and work on matrices.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from eutectic.errors import MethodError, suggest
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods.registry import Context, Entry, Parameters, always

# Takes M and the deltas, each whole or as thin factors, parameters and what a method may know;
# returns the new M, thin where it came thin, and a record.
PostFunction = Callable[
    [Tensor | LowRank, Tensor | LowRankStack, Any, Context],
    tuple[Tensor | LowRank, dict[str, Any]],
]


@dataclass(frozen=True, kw_only=True)
class PostRules:
    """What a post-processor asks for and costs.

    Attributes:
        needs: statistics that it reads, as those of a method.
        check: from the parameters and the experts' weights to a fault in words, as of a method.
        default_scale: α when the user names none: what it makes of a merge has another size.
        workspace: scratch memory, in multiples of the stack of deltas.
        products: time, in products `[out, in] @ [in, in]` per expert (smaller side).
    """

    needs: Callable[[Any], Set[str]] = always(frozenset())
    check: Callable[[Any, Sequence[float]], str | None] | None = None
    default_scale: float = 1.0
    workspace: float = 3.0
    products: float = 10.0


@dataclass(frozen=True, kw_only=True)
class PostProcessor(Entry, PostRules):
    """One entry of the table: what `post_processor` was told."""

    kind = "post-processor"
    function: PostFunction


@dataclass(frozen=True)
class Post:
    """A post-processor with its checked parameters. It can be pickled."""

    name: str
    parameters: Any

    @property
    def entry(self) -> PostProcessor:
        """What the table has of it."""
        return get_post(self.name)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that it reads."""
        return frozenset(self.entry.needs(self.parameters))


_TABLE: dict[str, PostProcessor] = {}
_RULES = PostRules()


def post_processor(
    name: str,
    *,
    summary: str,
    paper: str = "",
    parameters: type[Parameters] = Parameters,
    laws: Set[str] = frozenset(),
    rules: PostRules = _RULES,
) -> Callable[[PostFunction], PostFunction]:
    """Enter a post-processor into the table.

    Args:
        name: published name in snake_case.
        summary: one line for tables.
        paper: "Title, arXiv NNNN.NNNNN".
        parameters: its frozen dataclass.
        laws: the names in `LAWS` that "task arithmetic, then this" keeps.
        rules: what it asks for and costs.
    """

    def enter(function: PostFunction) -> PostFunction:
        if name in _TABLE:
            raise ValueError(f"post-processor '{name}' is registered twice")
        _TABLE[name] = PostProcessor(
            name=name,
            summary=summary,
            paper=paper,
            parameters=parameters,
            laws=frozenset(laws),
            adapter=TypeAdapter(parameters),
            function=function,
            **vars(rules),
        )
        return function

    return enter


def get_post(name: str) -> PostProcessor:
    """Return a registered post-processor.

    Raises:
        MethodError: when there is none of this name; the nearest name is suggested.
    """
    if name not in _TABLE:
        known = sorted(_TABLE)
        raise MethodError(
            f"unknown post-processor '{name}'.{suggest(name, known)}\n"
            f"Known post-processors: {', '.join(known)}."
        )
    return _TABLE[name]


def all_posts() -> dict[str, PostProcessor]:
    """Return the table, sorted by name."""
    return dict(sorted(_TABLE.items()))


def as_post(value: str | Mapping[str, Any] | Post | None) -> Post | None:
    """Return a post-processor of its name, or of `{method: NAME, PARAMETER: VALUE, …}`.

    Raises:
        MethodError: no such post-processor, or parameters that it refuses.
    """
    if value is None or isinstance(value, Post):
        return value
    stated: dict[str, Any] = {"method": value} if isinstance(value, str) else dict(value)
    name = stated.pop("method", None)
    if not isinstance(name, str):
        raise MethodError("a post-processor is a name, or {method: NAME, PARAMETER: VALUE, …}.")
    return Post(name, get_post(name).parse(stated))
