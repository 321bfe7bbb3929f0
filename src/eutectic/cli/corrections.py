"""Errors of a command line in its own words: options that are not there, keys of recipes."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import Any

import typer
from typer.core import TyperCommand

from eutectic.cli.options import given_options
from eutectic.errors import Fault, RecipeError, nearest

# typer has click's classes, or later its own copies of them.
_NO_SUCH_OPTION: type[Exception] = vars(sys.modules[typer.BadParameter.__module__])["NoSuchOption"]


_TYPED: ContextVar[Mapping[str, str]] = ContextVar("eutectic_typed_options", default={})  # noqa: B039
# How sentences about keyword arguments begin: their names, and what is allowed.
_OF_ARGUMENT = re.compile(
    r"^((?:  - )?)([a-z_]+)(?= (?:(?:is|are) one of|must be|are [a-z]|'[^'\n]*' is none of))", re.M
)
# How sentences about the choice of α spell it: as the key of a recipe.
_OF_SCALE = re.compile(
    r"(?<![-\w])(?:scale: (auto)\b|(?:scale: \{)?search: (\w+)(?:, tasks: ([^\s{}]+)\})?)"
)


def with_options(text: str) -> str:
    """Return an error's text with options, as they were typed, for the arguments behind them."""
    typed = _TYPED.get()
    text = _OF_ARGUMENT.sub(lambda m: m[1] + typed.get(m[2], m[2]), text)
    if "search" in typed:
        return _OF_SCALE.sub(_as_search, text)
    return text.replace("scale: auto", f"{typed['scale']} auto") if "scale" in typed else text


def _as_search(found: re.Match[str]) -> str:
    way, tasks = found[1] or found[2], found[3]
    return f"--search {way}" + (f" --tasks {tasks}" if tasks else "")


class Verb(TyperCommand):
    """A command that names the nearest of its options where one is typed that it has not."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help at the terminal's width, not at the source's."""
        self.help = _flowing(self.help or "", shutil.get_terminal_size().columns)
        stripped: Any = _Stripped(sys.stdout)
        with redirect_stdout(stripped):
            super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line, as click does."""
        try:
            return super().parse_args(ctx, args)
        except _NO_SUCH_OPTION as error:
            given = str(getattr(error, "option_name", ""))
            fault: Any = error
            fault.message = f"No such option: {given}.{self._meant(given)}"
            fault.possibilities = None
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and know meanwhile which options were typed."""
        token = _TYPED.set(given_options(ctx))
        try:
            return super().invoke(ctx)
        finally:
            _TYPED.reset(token)

    def _meant(self, given: str) -> str:
        """Return which option, key of a recipe or parameter was meant, as far as one can tell."""
        options = {
            name.removeprefix("--"): name
            for parameter in self.params
            for name in (*parameter.opts, *parameter.secondary_opts)
            if name.startswith("--")
        }
        word = given.lstrip("-")
        if (near := nearest(word, [*options, "help"])) is not None:
            return f" Did you mean {options.get(near, '--help')}?"
        plain = word.replace("-", "_")
        if "param" in options and plain in _parameters():
            return f" It is a parameter of a method: --param {plain}=VALUE"
        if "set" in options and (key := nearest(word, _keys())) is not None:
            return f" It is a key of recipes: --set {key}=VALUE"
        return f" {self.name} --help lists all." if self.name else ""


class _Stripped:
    """A stream without spaces at the ends of lines, which break a command behind a backslash."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream; the help comes in whole lines."""
        self._stream.write(re.sub(r" +((?:\x1b\[[0-9;]*m)*)$", r"\1", text, flags=re.M))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has: its encoding, whether it is a terminal."""
        return getattr(self._stream, name)


def _flowing(text: str, width: int) -> str:
    """Return a text of one line a paragraph, and of commands that can be copied at this width."""
    parts = inspect.cleandoc(text).split("\n\n")
    commands = [p.startswith("  eutectic ") for p in parts]
    flowing = [p if re.search(r"^\s", p, re.M) else " ".join(p.split("\n")) for p in parts]
    return "\n\n".join(
        _command(part, width) if is_one else part
        for part, is_one in zip(flowing, commands, strict=True)
    )


def _command(lines: str, width: int) -> str:
    """Return a command on lines that fit, with a backslash where it goes on."""
    # An option and its value stay together.
    whole = re.sub(r"( --?[a-z-]+) (?=[^-])", "\\1\0", " ".join(lines.split()))
    room = max(width - 4, 40)  # beside the margins and ` \`
    parts = textwrap.wrap(
        whole, room, initial_indent="  ", subsequent_indent="      ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return " \\\n".join(parts).replace("\0", " ")


def _parameters() -> set[str]:
    from eutectic.methods import all_methods

    return {f.name for method in all_methods().values() for f in fields(method.parameters)}


def _keys() -> list[str]:
    from eutectic.recipes.schema import Recipe

    return list(Recipe.model_fields)


# Key of a recipe -> the option that says it.
_OPTIONS: Mapping[str, str] = {
    "experts": "[NAME=]EXPERT",
    "base": "--base",
    "method": "--method",
    "scale": "--scale",
    "post": "--post",
    "convolutions": "--convolutions",
    "fallback": "--fallback",
    "shard_size": "--shard-size",
    "vocabulary": "--vocabulary",
    "chat_template": "--chat-template",
    "adapter": "--adapter",
    "adapter.rank": "--rank",
    "adapter.energy": "--energy",
    "adapter.others": "--others",
    "adapter.tables": "--tables",
    "adapter.compress": "--compress",
    "adapter.balance": "--balance",
    "adapter.cut": "--cut",
    "adapter.dtype": "--dtype",
    "scale.search": "--search",
    "scale.tasks": "--tasks",
    "scale.range": "--range",
    "scale.points": "--points",
    "scale.tolerance": "--tolerance",
}
_OF_EXPERT = {"weight": "--weight", "statistics": "--statistics"}


_SEARCH_KEYS = re.compile(r"\b(search: |tasks|range|points|tolerance)\b")


_OF_ADAPTER = re.compile(
    r"\b(others|tables|compress|balance|cut): "
    r"(drop|save|low_rank|after|before|plain|inputs|[01](?:\.\d+)?)"
)


def _as_option(found: re.Match[str]) -> str:
    return f"--{found[1].replace(':', '')}"


@contextmanager
def options_in_faults(stated: Mapping[str, Any], further: Mapping[str, str] = {}) -> Iterator[None]:
    """Name options, not keys of recipes, in the faults of what a command line says.

    Args:
        stated: the keys that options gave, as a recipe would have them; faults of a recipe's own
            lines stay as they are.
        further: key -> option, besides or instead of the usual ones.
    """
    try:
        yield
    except RecipeError as error:
        known = {**_OPTIONS, **further}
        faults = [_of_options(fault, stated, known) for fault in error.faults]
        if faults == error.faults:
            raise
        raise type(error)(faults, error.where) from None


def _of_options(fault: Fault, stated: Mapping[str, Any], known: Mapping[str, str]) -> Fault:
    if "adapter" in stated:
        fault = replace(fault, next=_OF_ADAPTER.sub(r"--\1 \2", fault.next))
    if fault.line:
        return fault
    if fault.where == "adapter" and _OF_ADAPTER.match(fault.what):  # of several options together
        return replace(fault, what=_OF_ADAPTER.sub(r"--\1 \2", fault.what), where="")
    head, _, rest = fault.where.partition(": ")
    if head.startswith("method '") and rest.split(".")[0] in (stated.get("parameters") or {}):
        return replace(fault, where=f"--param {rest}")
    parts = fault.where.split(".")
    if parts[0] == "experts" and len(parts) > 2 and parts[1] in (stated.get("experts") or {}):
        name, key = ".".join(parts[1:-1]), parts[-1]
        where = f"{_OF_EXPERT[key]} {name}" if key in _OF_EXPERT else fault.where
        return replace(fault, where=where)
    if fault.kind == "unknown_key" or parts[0] not in stated:
        return fault
    if parts[0] == "scale" and known is not _OPTIONS and "scale" in known:
        what = _SEARCH_KEYS.sub(_as_option, fault.what)
        if what.startswith("--"):
            return replace(fault, what=what, where="")
        fault = replace(fault, what=what)
    whole = re.sub(r"\.\d+$", "", fault.where)  # an entry of a list, such as a range's end
    if whole in known:
        return replace(fault, where=known[whole])
    return replace(fault, where=f"--set {fault.where}") if fault.where else fault
