"""The command line: `eutectic <verb>`."""

import gc
from typing import Annotated

import typer

from eutectic.cli.calibrate import calibrate
from eutectic.cli.check import check
from eutectic.cli.collect import collect
from eutectic.cli.compare import compare
from eutectic.cli.console import escape_what_cannot_be_printed, settings, silence_libraries
from eutectic.cli.convert import convert
from eutectic.cli.corrections import Verb
from eutectic.cli.demo import demo
from eutectic.cli.evaluate import evaluate
from eutectic.cli.extract import extract
from eutectic.cli.init import init
from eutectic.cli.inspect import inspect
from eutectic.cli.merge import merge
from eutectic.cli.methods import methods
from eutectic.cli.plan import plan
from eutectic.cli.report import report
from eutectic.cli.route import route
from eutectic.cli.tune import tune

app = typer.Typer(
    name="eutectic",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="First steps: the examples of `eutectic merge --help`, or `eutectic demo` in a clone. "
    "Exit codes: 0 done, 1 the work failed, 2 the request is wrong. "
    "`eutectic --debug VERB …` shows tracebacks.",
)
for command in (
    init,
    merge,
    extract,
    tune,
    compare,
    plan,
    convert,
    check,
    inspect,
    collect,
    calibrate,
    route,
    evaluate,
    report,
    methods,
    demo,
):
    app.command(cls=Verb)(command)


def _version(value: bool) -> None:
    if value:
        from eutectic import __version__

        typer.echo(f"eutectic {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Merge checkpoints fine-tuned from one base into one multi-task model, without training."""
    settings["debug"] = debug
    if not debug:
        silence_libraries()


def main() -> None:
    """Run the command line.

    Python's collector of garbage is off until work begins: imports make no garbage, and looking
    for some takes a third of their time.
    """
    gc.disable()
    escape_what_cannot_be_printed()
    app()


if __name__ == "__main__":
    main()
