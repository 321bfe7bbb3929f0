"""Options as records: a command takes frozen dataclasses, typer sees one parameter per field.

What several verbs share is declared here, once, and what words of a command line mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from eutectic.errors import RequestError

ExecutorName = Literal["threads", "ray"]

if TYPE_CHECKING:
    from eutectic.data.encoded_rows import BatchOptions
    from eutectic.models.batches import Batch
    from eutectic.models.loading import LoadedModel


_is_record: Callable[[Any], bool] = is_dataclass


def option(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """Declare a field or parameter as an option, see `typer.Option`; `...` has no default."""
    return _declared(default, typer.Option(*names, help=help, **settings))


def argument(default: Any, help: str, **settings: Any) -> Any:
    """Declare a field or parameter as an argument, see `typer.Argument`; `...` has no default."""
    return _declared(default, typer.Argument(help=help, **settings))


def _declared(default: Any, kind: Any) -> Any:
    return field(default=MISSING if default is ... else default, metadata={"parameter": kind})


def parameters_of(owner: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the parameters of a command or a record, with the fields of records in their places.

    A field with `init=False` is no parameter.
    """
    declared: dict[str, Any] = getattr(owner, "__dataclass_fields__", {})
    for name, parameter in signature(owner).parameters.items():
        kind, default = _hints(owner)[name], parameter.default
        if _is_record(kind):
            yield from parameters_of(kind)
            continue
        found: Any = default if isinstance(default, Field) else declared.get(name)
        if found is not None and "parameter" in found.metadata:
            kind = Annotated[kind, found.metadata["parameter"]]
            default = Parameter.empty if found.default is MISSING else found.default
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def call_with_records(owner: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a command, or make a record, with the records that its parameters are annotated with."""
    given: dict[str, Any] = {}
    for name in signature(owner).parameters:
        kind = _hints(owner)[name]
        given[name] = (
            call_with_records(kind, values) if _is_record(kind) else _place(name, values[name])
        )
    return owner(**given)


_WRITTEN = frozenset({"output", "best", "export", "plot", "work"})


def _place(name: str, value: Any) -> Any:
    """Return a path that was typed; of a URL where what lies there is shown (`storage.view`)."""
    if isinstance(value, list):
        return [_place(name, item) for item in value]
    if not isinstance(value, Path) or ":" not in str(value):
        return value
    from eutectic.storage import local_path, view

    return local_path(value) if name in _WRITTEN else view(value)


@cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def given_options(context: typer.Context, record: type[Any] | None = None) -> dict[str, str]:
    """Return parameter -> option (`max_length` -> `--max-length`) of those that were typed.
    One typed with its default value is among them; with a `record` only that record's are.
    """
    wanted = None if record is None else {parameter.name for parameter in parameters_of(record)}
    return {
        name: parameter.opts[0]
        for parameter in context.command.params
        if (name := parameter.name) and (wanted is None or name in wanted)
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def refuse(options: Sequence[str], why: str, instead: str) -> None:
    """Raise RequestError where options were given that would be ignored."""
    if options:
        verb, them = ("is", "it") if len(options) == 1 else ("are", "them")
        raise RequestError(
            f"{', '.join(options)} {verb} {why}\n{instead} Otherwise leave {them} out."
        )


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
StatisticsFiles = Annotated[
    list[str] | None,
    typer.Option("--statistics", "-s", metavar="NAME=FILE", help="Statistics of an expert."),
]


What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | [NAME=]EXPERT…",
        help="A recipe (YAML), or the experts: folders, files, adapters or hub ids, each called "
        "like its last part or as NAME says.",
        show_default=False,
    ),
]
Base = Annotated[str | None, typer.Option(help="The model that all experts started from.")]


@dataclass(frozen=True, kw_only=True)
class WhereOptions:
    """Where work is carried out."""

    executor: ExecutorName = option(
        "threads",
        "Who works: threads of this process, or the workers of a Ray cluster.",
        metavar="threads | ray",
    )
    ray_address: str | None = option(
        None,
        "The cluster's head node (default: RAY_ADDRESS, or a cluster is started here).",
        metavar="HOST:PORT | auto",
    )


@dataclass(frozen=True, kw_only=True)
class LimitOptions(WhereOptions):
    """What a merge may use of the machine."""

    threads: int | None = option(
        None, "Tensors merged side by side (default: one per core).", min=1
    )
    memory: str | None = option(None, "Limit, such as 4GB (default: 60 % of what is available).")
    device: str = option(
        "cpu",
        "Where matrices are merged and models of a search run; auto: on an accelerator where there "
        "is one; mps: for models alone.",
        metavar="cpu | cuda | cuda:N | mps | auto",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a model and its proxy data are read."""

    batch_size: int = option(16, "Examples per batch.", min=1)
    max_length: int | None = option(None, "Tokens per text (default: at most 512).", min=1)
    task: str | None = option(
        None,
        "What the model does: text-classification, feature-extraction, "
        "image-classification, zero-shot-image-classification, language-model, "
        "sequence-to-sequence, … (default: by the checkpoint's architecture).",
    )
    device: str = option(
        "cpu", "Where the model runs, collecting.", metavar="cpu | cuda | cuda:N | mps | auto"
    )
    split: str | None = option(None, "Split of a `datasets` folder, or of images.")
    trust_code: bool = option(False, "Allow data from module:function.", "--trust-code")
    text_column: str = option("text", "Column of texts.")
    text_pair_column: str = option("text_pair", "Column of second texts.")
    label_column: str = option("label", "Column of labels.")
    source_column: str = option("source", "Column of source texts.")
    target_column: str = option("target", "Column of target texts.")
    image_column: str = option("image", "Column of images.")
    prompt_column: str = option("prompt", "Column of prompts.")
    completion_column: str = option("completion", "Column of their completions.")
    messages_column: str = option("messages", "Column of chats: lists of {role, content}.")
    chat_template: str | None = option(
        None,
        "Of messages: chatml, llama3, …, Jinja, or a model's folder (default: the checkpoint's).",
        metavar="TEMPLATE",
    )

    def how(self, **further: Any) -> BatchOptions:
        """Return how rows become batches."""
        from eutectic.data.columns import Columns
        from eutectic.data.encoded_rows import BatchOptions

        named = {
            name.removesuffix("_column"): value
            for name, value in vars(self).items()
            if name.endswith("_column")
        }
        read = ("batch_size", "max_length", "split", "trust_code", "chat_template")
        options: dict[str, Any] = {key: getattr(self, key) for key in read}
        return BatchOptions(columns=Columns(**named), **options | further)

    def batches(
        self,
        source: str,
        loaded: LoadedModel,
        *,
        needs_labels: bool = False,
        classes: int | None = None,
        **further: Any,
    ) -> Iterable[Batch]:
        """Return the batches of a data set for a loaded model; see `open_batches`."""
        from eutectic.data.encoded_rows import open_batches

        how = self.how(**further)
        return open_batches(source, loaded, how, needs_labels=needs_labels, classes=classes)


@dataclass(frozen=True, kw_only=True)
class RouterDataOptions(DataOptions):
    """The same for the data of a router, which takes no labels."""

    batch_size: int = option(16, "Examples per batch, collecting.", min=1)
    label_column: str = field(default="label", init=False)


@dataclass(frozen=True, kw_only=True)
class CalibrationDataOptions(RouterDataOptions):
    """The same where the processor decides nothing: it is the CPU."""

    batch_size: int = option(16, "Examples per forward pass.", min=1)
    device: str = field(default="cpu", init=False)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe, or what one would say."""

    what: What = None
    base: Base = None
    method: str | None = option(None, "Method; see `eutectic methods`.", "--method", "-m")
    scale: str | None = option(
        None,
        "α: how much of the merged delta is added; auto: in closed form from statistics; norm: as "
        "large as the experts' own changes.",
        metavar="NUMBER | auto | norm",
    )
    param: list[str] | None = option(
        None, "A parameter of the method.", "--param", "-p", metavar="NAME=VALUE"
    )
    post: str | None = option(
        None,
        "What follows the merge of every matrix, such as svc; see `eutectic methods`.",
        metavar="NAME[:KEY=VALUE,…]",
    )
    convolutions: str | None = option(
        None,
        "matrix: kernels as matrices over the patches that they see (default: averaged).",
        metavar="average | matrix",
    )
    weight: list[str] | None = option(
        None, "Weight of an expert (default 1).", "--weight", "-w", metavar="NAME=W"
    )
    statistics: StatisticsFiles = None
    fallback: str | None = option(
        None,
        "allow: a method without the statistics that it needs merges by another.",
        metavar="error | allow",
    )
    shard_size: str | None = option(
        None,
        "Most bytes of tensors in one file, such as 5GB (default: files like the base's).",
        metavar="SIZE",
    )
    vocabulary: str | None = option(
        None,
        "Which tokens the output has where the models' differ (default: rows by their number).",
        metavar="union | base | intersection | NAME | error",
    )
    chat_template: str | None = option(
        None, "Of the output: auto, a known name (chatml, …) or Jinja.", metavar="TEMPLATE"
    )
    adapter: bool = option(False, "Write a PEFT adapter instead of a model.", "--adapter")
    rank: str | None = option(
        None,
        "Directions of the adapter in each layer (default: all that the experts' adapters have).",
        metavar="N | auto",
    )
    energy: float | None = option(
        None, "Share of the change that each layer keeps, with --rank auto (0.99).", min=0, max=1
    )
    others: str | None = option(
        None,
        "Norms and biases that change, which thin factors do not hold.",
        metavar="error | drop | save",
    )
    compress: str | None = option(
        None,
        "With --rank N: cut what is merged to its rank, or bring the experts to it before.",
        metavar="after | before",
    )
    balance: float | None = option(
        None,
        "With --compress before: how far the experts' changes are brought to one norm where "
        "their shared directions are looked for (0: as they are, 1: all alike).",
        min=0,
        max=1,
    )
    cut: str | None = option(
        None,
        "What a cut to --rank or --energy keeps: the most of the change, or of the outputs' "
        "(needs statistics).",
        metavar="plain | inputs",
    )
    set_: list[str] | None = option(
        None,
        "Any other key of a recipe: dtype, heads, missing, unmatched, seed, precision …",
        "--set",
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How an adapter holds the change of one checkpoint."""

    rank: str | None = option(None, "Directions in each layer.", metavar="N | auto")
    energy: float | None = option(
        None, "Share of the change that each layer keeps (with --rank auto: 0.99).", min=0, max=1
    )
    tables: str | None = option(
        None, "Tables of tokens: whole, or as thin factors.", metavar="save | low_rank"
    )
    others: str | None = option(
        None,
        "Norms and biases that change, which thin factors do not hold.",
        metavar="error | drop | save",
    )
    dtype: str | None = option(None, "Of what is written: float16, bfloat16 or float32.")
    statistics: str | None = option(
        None,
        "Statistics of the model (eutectic collect): keep the most of what layers put out.",
        metavar="FILE",
    )


@dataclass(frozen=True, kw_only=True)
class SearchedRecipeOptions(RecipeOptions):
    """The same where the scale is searched."""

    scale: None = field(default=None, init=False)
    shard_size: None = field(default=None, init=False)
    adapter: bool = field(default=False, init=False)
    rank: None = field(default=None, init=False)
    energy: None = field(default=None, init=False)
    others: None = field(default=None, init=False)
    compress: None = field(default=None, init=False)
    balance: None = field(default=None, init=False)
    cut: None = field(default=None, init=False)


@dataclass(frozen=True, kw_only=True)
class SharedRecipeOptions(SearchedRecipeOptions):
    """The same for several methods, which are named apart with their parameters."""

    method: None = field(default=None, init=False)
    param: None = field(default=None, init=False)
    fallback: None = field(default=None, init=False)
