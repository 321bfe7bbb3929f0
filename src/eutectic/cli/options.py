"""Options that `collect` and `route` share, and which of a verb's options were given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from eutectic.errors import RequestError

Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, feature-extraction, image-classification, causal-lm or "
        "seq2seq (default: by the checkpoint's architecture)."
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens per text (default: at most 512).")
]
Device = Annotated[str, typer.Option(help="Where the model runs, collecting.")]
Split = Annotated[str | None, typer.Option(help="Split of a `datasets` folder.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow data from module:function.")]
TextColumn = Annotated[str, typer.Option(help="Column of texts.")]
TextPairColumn = Annotated[str, typer.Option(help="Column of second texts.")]
SourceColumn = Annotated[str, typer.Option(help="Column of source texts.")]
TargetColumn = Annotated[str, typer.Option(help="Column of target texts.")]
ImageColumn = Annotated[str, typer.Option(help="Column of images.")]


def given_options(context: typer.Context) -> dict[str, str]:
    """Return parameter -> option (`max_length` -> `--max-length`) of those that were typed.

    An option typed with its default value is among them, one that was left out is not.
    """
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name and _typed(context, parameter.name)
    }


def refuse(options: Sequence[str], why: str, instead: str) -> None:
    """Raise RequestError where options were given that would be ignored."""
    if options:
        verb = "is" if len(options) == 1 else "are"
        raise RequestError(
            f"{', '.join(options)} {verb} {why}\n{instead} Otherwise leave "
            f"{'it' if len(options) == 1 else 'them'} out."
        )


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
