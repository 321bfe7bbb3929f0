"""Every error that eutectic raises on purpose.

    EutecticError            exit code 1: the work failed
    ├── CheckpointError      a file cannot be read, or does not hold what it claims
    ├── StatisticsError      a statistics file is unusable, or belongs to something else
    ├── NumericalError       NaN, Inf, or a decomposition that did not converge
    ├── OutputError          the output cannot be written (full disk, permissions)
    ├── MissingExtraError    an optional dependency is not installed
    └── RequestError         exit code 2: the request itself is wrong
        ├── MethodError      an unknown method, or a parameter out of range
        ├── RecipeError      a recipe that cannot be carried out; lists every fault
        ├── TaskError        tasks that cannot be evaluated; lists every fault
        └── ResumeError      the unfinished output belongs to another request

A message is two or three lines: what happened and where; what was got and what is allowed;
what to do next. `Fault` and `Note` are the records that messages are made from.
"""

import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from eutectic.sentences import sentence
from eutectic.words import SYNONYMS, few, with_urls


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a request. Code looks at `kind` and `line`, never at the text.

    Attributes:
        kind: a stable word, such as "missing_tensor" or "unknown_key".
        what: what is wrong, for people.
        where: the tensor, key, expert or file.
        line: line of the document, 0 where there is none.
        got: the value that was refused.
        allowed: the values that are accepted.
        next: what to do.
    """

    kind: str
    what: str
    where: str = ""
    line: int = 0
    got: str = ""
    allowed: str = ""
    next: str = ""

    def __str__(self) -> str:
        line = f"line {self.line}: " if self.line else ""
        text = f"{line}{self.where}: {self.what}" if self.where else line + self.what
        if self.got:
            text = f"{text.removesuffix('.')}, got {self.got}."
        if self.allowed:
            text += f" Allowed: {self.allowed}."
        space = "" if self.next[:1].isspace() or not self.next else " "
        return text + space + self.next


@dataclass(frozen=True)
class Note:
    """What a user should know of a result, or why a tensor is treated as it is.

    Code looks at `kind` and `level`, never at the sentence, whose words stand in `sentences`.

    Attributes:
        kind: a key of `sentences.SENTENCES`.
        subject: names, of tensors or experts.
        numbers: further values of the sentence by name, such as JSON has.
        level: "warning" where the result may be wrong.
    """

    kind: str
    subject: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict, hash=False)
    level: Literal["note", "warning"] = "note"

    @property
    def text(self) -> str:
        """The sentence."""
        return sentence(self.kind, self.subject, self.numbers)

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.level == "warning" else self.text


class MergeWarning(UserWarning):
    """A merge whose result may be wrong, where there is no report to say so.

    Attributes:
        note: the record.
    """

    def __init__(self, note: Note) -> None:
        super().__init__(note.text)
        self.note = note


class EutecticError(Exception):
    """The root of all errors raised on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        return with_urls(super().__str__())


class CheckpointError(EutecticError):
    """A checkpoint file cannot be read, or does not hold what it claims."""


class StatisticsError(EutecticError):
    """A statistics file is unusable, or belongs to another checkpoint."""


class NumericalError(EutecticError):
    """NaN or Inf in the input, or a decomposition that did not converge."""


class OutputError(EutecticError):
    """The output cannot be written."""


class MissingExtraError(EutecticError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed.\n"
            f"Install it with: pip install 'eutectic[{extra}]'"
        )


class RequestError(EutecticError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class MethodError(RequestError):
    """An unknown method, an unknown parameter, or a value out of range."""


class RecipeError(RequestError):
    """A recipe that cannot be carried out, with all of its faults."""

    def __init__(self, faults: Sequence[Fault | str], where: str = "the recipe") -> None:
        self.faults = [f if isinstance(f, Fault) else Fault("other", f) for f in faults]
        self.where = where
        count = f"{len(self.faults)} fault{'s' if len(self.faults) != 1 else ''}"
        lines = "\n".join("  - " + text.replace("\n", "\n    ") for text in told(self.faults))
        super().__init__(f"{where} cannot be carried out ({count}):\n{lines}")


def told(faults: Sequence[Fault], limit: int = 30) -> list[str]:
    """Return the faults as texts, those that differ in their place only as one, with a count."""
    alike: dict[tuple[object, ...], list[Fault]] = {}
    for number, fault in enumerate(faults):
        own = None if fault.where else number
        key = (fault.kind, fault.what, fault.line, fault.allowed, fault.next, own)
        alike.setdefault(key, []).append(fault)
    texts = [str(group[0] if len(group) == 1 else _folded(group)) for group in alike.values()]
    more = len(texts) - limit
    return texts if more <= 0 else [*texts[:limit], f"and {more} more."]


def _folded(faults: Sequence[Fault]) -> Fault:
    """Return one fault in place of several that differ in their places, and what was got there."""
    same = len({fault.got for fault in faults}) == 1
    places = [f.where if same else f"{f.where} {f.got}" for f in faults]
    return replace(faults[0], where=few(places), got=faults[0].got if same else "")


def why_failed(error: Exception) -> str:
    """Return why the system refused to read or write a file, in words that say what helps.

    safetensors tells the system's number in the text of an error of its own.
    """
    said = getattr(error, "strerror", None) or str(error)
    told = re.search(r"\(os error (\d+)\)", str(error))
    code = getattr(error, "errno", None) or (int(told[1]) if told else None)
    if code == errno.ENOSPC:
        return f"the disk is full: {said}"
    if code == getattr(errno, "EDQUOT", -1):
        return f"the disk quota is used up: {said}"
    if code == errno.EFBIG:
        return f"{said}: {_largest_file()}; it is not that the disk is full"
    return said


def _largest_file() -> str:
    """Return in words what bounds the size of a file here."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    except (ImportError, OSError):
        limit = -1
    if limit < 0 or limit >= 1 << 60:
        return "the file system does not take files so large"
    return f"this process may write files of {limit:,} bytes at most (ulimit -f)"


class TaskError(RecipeError):
    """Tasks that cannot be evaluated, with all of their faults."""


class ResumeError(RequestError):
    """The unfinished output belongs to another request, or to changed inputs."""


def suggest(word: str, allowed: Sequence[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest allowed word, or an empty string."""
    near = nearest(word, allowed)
    return "" if near is None else f" Did you mean '{near}'?"


def nearest(word: str, allowed: Sequence[str]) -> str | None:
    """Return the allowed word that another one stands for: by a table of synonyms, or by spelling.

    >>> nearest("alpha", ["scale", "seed"]), nearest("scal", ["scale", "seed"]), nearest("x", ["a"])
    ('scale', 'scale', None)
    """
    plain = word.lower().replace("-", "_")
    spelled = {name.lower().replace("-", "_"): name for name in allowed}
    meant = next((spelled[n] for n in (plain, *SYNONYMS.get(plain, ())) if n in spelled), None)
    near = get_close_matches(plain, list(spelled), n=1, cutoff=0.6)
    return meant or (spelled[near[0]] if near else None)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
