"""Four further tasks of the text suite that took no part in any choice.

They ask new questions, some of texts that other tasks have too. They are measured once, with what
every row does fixed before. `--tasks 0` of the suite's commands means them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from readers import ADDRESSES, facet, frequent, paragraphs, spoken
from sources import TextTask, first_tasks

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "minilm")]
from texts import Row


def kinds(cache: Path) -> Iterator[Row]:
    """Yield whether one noun is a kind of another; the language models' task."""
    from gemma.tasks import kinds as read

    return read(cache)


_SENSE = re.compile(r"(?s)([^\\]+)\\[^\\]*\\,\s+(n|a|v\. t|v\. i|adv)\.\s(.*)")
_MARKS = re.compile(r"(?s)\[[^\]]*\]|\([A-Z][a-z]+\.\)|--\s?[A-Z]\w+\.?.*|[{}]|\b1[89]\d\d\b")


def parts_of_speech(cache: Path) -> Iterator[Row]:
    """Yield a dictionary's first definitions with the part of speech that it gives."""
    for paragraph in paragraphs(cache):
        found = _SENSE.fullmatch(paragraph)
        if found:
            text = re.split(r"\s2\. ", _MARKS.sub(" ", found[3]))[0]
            text = re.sub(r"^\W*(1\.)?\W*", "", " ".join(text.split()))
            yield Row(text, found[2], found[1].strip())


def parties(cache: Path) -> Iterator[Row]:
    """Yield passages of State of the Union addresses with the party; an address is one group."""
    for address, passage in spoken(cache):
        yield Row(passage, address["party"], f"{address['year']} {address['name']}")


_WORDNET = "Debian wordnet-base (WordNet 3.0)"
_DEBIAN = "apt-cache dumpavail (Debian 12)"
CONFIRMATION: dict[str, TextTask] = {
    "wn_kind": TextTask(_WORDNET, "two nouns -> is one a kind of the other", kinds),
    "gcide_pos": TextTask("Debian dict-gcide", "definition -> part of speech", parts_of_speech),
    "debkit": TextTask(
        _DEBIAN, "synopsis of a package -> its toolkit of widgets",
        lambda cache: frequent(facet("uitoolkit")(cache), 150), 0.25,
    ),
    "party": TextTask(
        f"npm {ADDRESSES}", "passage of an address -> party",
        lambda cache: frequent(parties(cache), 1000),
    ),
}  # fmt: skip


def named_tasks(count: int) -> tuple[str, ...]:
    """Return the names of the first tasks of the suite, or of these for 0."""
    return first_tasks(count) if count else tuple(CONFIRMATION)
