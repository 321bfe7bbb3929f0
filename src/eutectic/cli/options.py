"""Options as records: a command takes frozen dataclasses, typer sees one parameter per field.

What several verbs share is declared here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from eutectic.errors import RequestError

if TYPE_CHECKING:
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
        given[name] = call_with_records(kind, values) if _is_record(kind) else values[name]
    return owner(**given)


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


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What a merge may use of the machine."""

    threads: int | None = option(
        None, "Tensors merged side by side (default: one per core).", min=1
    )
    memory: str | None = option(None, "Limit, such as 4GB (default: 60 % of what is available).")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a model and its proxy data are read."""

    batch_size: int = option(16, "Examples per batch.", min=1)
    max_length: int | None = option(None, "Tokens per text (default: at most 512).", min=1)
    task: str | None = option(
        None,
        "What the model does: text-classification, feature-extraction, "
        "image-classification, language-model, sequence-to-sequence, … (default: by the "
        "checkpoint's architecture).",
    )
    device: str = option("cpu", "Where the model runs, collecting.")
    split: str | None = option(None, "Split of a `datasets` folder.")
    trust_code: bool = option(False, "Allow data from module:function.", "--trust-code")
    text_column: str = option("text", "Column of texts.")
    text_pair_column: str = option("text_pair", "Column of second texts.")
    label_column: str = option("label", "Column of labels.")
    source_column: str = option("source", "Column of source texts.")
    target_column: str = option("target", "Column of target texts.")
    image_column: str = option("image", "Column of images.")

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
        from eutectic.data.columns import Columns
        from eutectic.data.encoded_rows import BatchOptions, open_batches

        named = {
            name.removesuffix("_column"): value
            for name, value in vars(self).items()
            if name.endswith("_column")
        }
        read = ("batch_size", "max_length", "split", "trust_code")
        options: dict[str, Any] = {key: getattr(self, key) for key in read}
        how = BatchOptions(columns=Columns(**named), **options | further)
        return open_batches(source, loaded, how, needs_labels=needs_labels, classes=classes)


@dataclass(frozen=True, kw_only=True)
class RouterDataOptions(DataOptions):
    """The same for the data of a router, which takes no labels."""

    batch_size: int = option(16, "Examples per batch, collecting.", min=1)
    label_column: str = field(default="label", init=False)
