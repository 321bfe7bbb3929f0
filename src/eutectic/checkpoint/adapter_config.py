"""An adapter's configuration: its fields checked, and its patterns over modules matched in bounds.

PEFT's patterns are regular expressions, written by whoever made the adapter. Most are plain names
of modules, which are looked up; others are matched by an engine that stops after a time.
"""

import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import regex
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from eutectic.checkpoint.stated import checked
from eutectic.errors import CheckpointError, first_line
from eutectic.words import shown

MOST_NAMES = 200_000  # plain names of modules in one table
MOST_PATTERNS = 1_000  # patterns that are more than a name
LONGEST_PATTERN = 5_000
MOST_SECONDS = 1.0  # of computing, for all modules and all patterns of one table

Value = TypeVar("Value")
_PLAIN = re.compile(r"[\w\-.]*")  # a dot stands for any character, as in every pattern
_FLAGS = re.compile(r"\(\?[aiLmsux-]+\)")


def _at_least_one(rank: int) -> int:
    if not 1 <= rank <= _LARGEST_RANK:
        raise ValueError(f"is a rank: ranks are at least 1 and at most {_LARGEST_RANK:,}")
    return rank


_LARGEST_RANK = 1_000_000
_Rank = Annotated[int, AfterValidator(_at_least_one)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]
_OrNothing = BeforeValidator(lambda value: {} if value is None else value)
_Switch = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]


class LoraFields(BaseModel):
    """The fields of a LoRA configuration that decide the weights; names as in PEFT."""

    model_config = ConfigDict(extra="ignore")

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: Annotated[dict[str, _Rank], _OrNothing] = {}
    alpha_pattern: Annotated[dict[str, _Alpha], _OrNothing] = {}
    use_rslora: _Switch = False
    fan_in_fan_out: _Switch = False


def lora_fields(raw: Mapping[str, Any], where: object) -> LoraFields:
    """Return the checked fields; CheckpointError names the first that is wrong."""
    return checked(LoraFields, raw, where, CheckpointError)


@dataclass
class PatternTable(Generic[Value]):
    """Values by patterns over modules: PEFT takes the first that matches the end of a path.

    From a dot, or from its start.
    """

    where: object
    names: Mapping[tuple[int, tuple[int, ...]], Mapping[str, int]]  # length, dots -> name -> place
    patterns: Mapping[int, Any]  # place -> compiled
    values: tuple[Value, ...]
    left: float = MOST_SECONDS

    def value(self, module: str, default: Value) -> Value:
        """Return the value of a module's path."""
        found = min(self._named(module), default=len(self.values))
        for place, pattern in self.patterns.items():
            if place > found:
                break
            if self._matches(pattern, module):
                return self.values[place]
        return self.values[found] if found < len(self.values) else default

    def _named(self, module: str) -> Iterable[int]:
        ends = [0, *(i + 1 for i, c in enumerate(module) if c == ".")]
        for (length, dots), table in self.names.items():
            if len(module) - length in ends:
                letters = list(module[len(module) - length :])
                for dot in dots:
                    letters[dot] = "."
                if (place := table.get("".join(letters))) is not None:
                    yield place

    def _matches(self, pattern: Any, module: str) -> bool:
        started = time.process_time()
        try:
            return pattern.match(module, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise CheckpointError(
                f"{self.where}: the pattern {shown(pattern.pattern)} takes more than "
                f"{MOST_SECONDS:g} s to match '{module}'.\nWrite the names of the modules instead."
            ) from None
        finally:
            self.left -= time.process_time() - started


def pattern_table(patterns: Mapping[str, Value], where: object) -> PatternTable[Value]:
    """Return a table of PEFT's patterns; CheckpointError where one is none, or there are too many.

    `where` names the file and the field.
    """
    names: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
    others: dict[int, Any] = {}
    for place, pattern in enumerate(patterns):
        if _PLAIN.fullmatch(pattern):
            dots = tuple(i for i, c in enumerate(pattern) if c == ".")
            names.setdefault((len(pattern), dots), {}).setdefault(pattern, place)
            continue
        others[place] = pattern
    for kind, count, most in (
        ("names", len(patterns), MOST_NAMES),
        ("patterns", len(others), MOST_PATTERNS),
        ("kinds of names", len(names), MOST_PATTERNS),
    ):
        if count > most:
            raise CheckpointError(f"{where}: {count:,} {kind}, the limit is {most:,}.")
    compiled = {p: compile_pattern(t, where, r"(.*\.)?({})$".format) for p, t in others.items()}
    return PatternTable(where, names, compiled, tuple(patterns.values()))


def compile_pattern(pattern: str, where: object, form: Callable[[str], str]) -> Any:
    """Return a pattern as PEFT would wrap it, for the engine that can be stopped."""
    why = ""
    if len(pattern) > LONGEST_PATTERN:
        why = f"it has {len(pattern):,} characters, the limit is {LONGEST_PATTERN:,}"
    elif _FLAGS.search(pattern):
        why = "it sets flags, which must stand at the start of what PEFT makes of it"
    if not why:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)  # what Python's engine refuses, PEFT would stop at
                return regex.compile(form(pattern))
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            why = first_line(error)
    raise CheckpointError(f"{where}: {shown(pattern)} is no pattern over modules ({why}).")


def named_modules(stated: Mapping[str, Any], paths: Sequence[str], where: object) -> dict[str, Any]:
    """Return the fields of an adapter's configuration that hold patterns, with names instead.

    Whoever matches them with Python's engine, as PEFT does, then meets no pattern of strangers.
    `paths` are those of the model's modules; fields of plain names are left as they are.
    """
    named: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules"):
        value = stated.get(field)
        if isinstance(value, str) and value not in _WORDS and not _PLAIN.fullmatch(value):
            table = _whole_paths(value, f"{where}: '{field}'")
            named[field] = {path for path in paths if table.value(path, False)}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = stated.get(field)
        if isinstance(patterns, dict) and not all(map(_PLAIN.fullmatch, patterns)):
            table = pattern_table(patterns, f"{where}: '{field}'")
            found = ((path, table.value(path, None)) for path in paths)
            # PEFT takes the first that ends a path, so that the longest must come first.
            ordered = sorted(((p, v) for p, v in found if v is not None), key=lambda i: -len(i[0]))
            named[field] = {re.escape(path): value for path, value in ordered}
    return named


_WORDS = ("all-linear",)  # of PEFT, which mean something else than modules of that name


def _whole_paths(pattern: str, where: object) -> PatternTable[bool]:
    compiled = compile_pattern(pattern, where, "({})$".format)
    return PatternTable(where, {}, {0: compiled}, (True,))
