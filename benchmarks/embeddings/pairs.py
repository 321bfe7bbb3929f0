"""Pairs of texts that mean the same, and graded ones, of Debian's packages: data of embeddings.

A term and its definition: the definition is what a search for the term should find. A term is on
one side of the split with all its definitions.
"""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "text"), str(ROOT / "examples" / "minilm")]
from readers import packages
from texts import fetch, hash_to_unit, read_member, shorten

OPERATIONS = ("admin", "net", "utils", "httpd", "database", "kernel", "mail")  # sections
TEST_FRACTION, VALIDATION_FRACTION = 0.2, 0.1


class Pair(NamedTuple):
    """What one asks, and what one should find."""

    query: str
    document: str


def _unpacked(cache: Path, package: str, member: str) -> bytes:
    archive = fetch(cache, f"{package}_*.deb", ["apt-get", "download", package])
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    content = subprocess.run(unpack, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        return read_member(opened, member)


def _dictionary(name: str, marks: str) -> Callable[[Path], Iterator[Pair]]:
    """Make a reader of a dictionary of dictd: headwords stand at the edge, senses are indented."""

    def read(cache: Path) -> Iterator[Pair]:
        packed = _unpacked(cache, f"dict-{name}", f"./usr/share/dictd/{name}.dict.dz")
        content = gzip.decompress(packed).decode("utf-8", "replace")
        headword = ""
        for paragraph in re.split(r"\n\s*\n", content):
            if not paragraph.startswith((" ", "\n")):
                headword, _, paragraph = paragraph.partition("\n")
                headword = headword.split("\\")[0].strip()
            text = re.sub(marks, " ", paragraph)
            text = " ".join(re.sub(r"[{}]", "", text).split())
            # A definition that holds the term is found by its letters alone.
            if len(text.split()) >= 6 and headword and headword.lower() not in text.lower():
                yield Pair(headword, shorten(text))

    return read


def _synopses(cache: Path) -> Iterator[Pair]:
    """Names of Debian's packages with what they are for, of those that run and watch machines."""
    for fields in packages(cache):
        name, synopsis = fields["Package"], fields["Description"]
        if fields.get("Section") in OPERATIONS:
            words = re.sub(r"[-_.]", " ", name)
            if len(synopsis.split()) >= 4 and name.lower() not in synopsis.lower():
                yield Pair(words, synopsis)


def _glosses(cache: Path) -> Iterator[Pair]:
    for part in ("noun", "verb"):
        content = _unpacked(cache, "wordnet-base", f"./usr/share/wordnet/data.{part}")
        for line in content.decode("latin-1").splitlines():
            if not line.startswith(" "):
                fields, _, gloss = line.partition(" | ")
                word = fields.split()[4].replace("_", " ")
                gloss = gloss.split('; "')[0].strip()
                if len(gloss.split()) >= 4 and word.lower() not in gloss.lower():
                    yield Pair(word, gloss)


READERS: dict[str, Callable[[Path], Iterable[Pair]]] = {
    "wordnet": _glosses,
    "computing": _dictionary("foldoc", r"<[^>]*>|\(\S*\)"),
    "english": _dictionary("gcide", r"\[[^\]]*\]|\([^)]*\)"),
    "operations": _synopses,
}


@dataclass(frozen=True)
class Sides:
    """Disjoint lists of pairs: no query is on two sides."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


def load(name: str, cache: Path) -> Sides:
    """Fetch and split a task's pairs, in an order that depends on the texts alone."""
    found = sorted(set(READERS[name](cache)), key=lambda p: hash_to_unit(f"{p.query} {p.document}"))
    once: dict[str, Pair] = {}
    for pair in found:
        once.setdefault(pair.query.lower(), pair)
    sides = Sides([], [], [])
    seen: set[str] = set()
    for pair in once.values():
        if pair.document in seen:
            continue
        seen.add(pair.document)
        place = hash_to_unit(f"side {pair.query.lower()}")
        held = place < TEST_FRACTION + VALIDATION_FRACTION
        side = sides.train if not held else sides.validation
        (sides.test if place < TEST_FRACTION else side).append(pair)
    return sides


def related(cache: Path, count: int) -> list[tuple[str, str, float]]:
    """Return pairs of glosses of nouns with how near their synsets are: 1 / (1 + path).

    The path goes through the hypernyms of both, as in WordNet::Similarity; a third each of near
    ones, of further ones and of any.
    """
    content = _unpacked(cache, "wordnet-base", "./usr/share/wordnet/data.noun").decode("latin-1")
    glosses: dict[str, str] = {}
    above: dict[str, str] = {}
    for line in content.splitlines():
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        offset = fields.split()[0]
        glosses[offset] = gloss.split('; "')[0].strip()
        found = re.search(r" @ (\d{8}) n", fields)
        if found:
            above[offset] = found[1]

    def line_of(offset: str) -> list[str]:
        path = [offset]
        while path[-1] in above:
            path.append(above[path[-1]])
        return path

    order = sorted(above, key=lambda offset: hash_to_unit(f"related {offset}"))
    below: dict[str, list[str]] = {}
    for offset in order:
        below.setdefault(above[offset], []).append(offset)
    pairs: list[tuple[str, str, float]] = []
    for place, first in enumerate(order[:count]):
        home = line_of(first)
        kin = below[home[min(1 + place % 3, len(home) - 1)]] if place % 3 < 2 else order
        second = kin[int(hash_to_unit(f"second {first}") * len(kin))]
        other = line_of(second)
        common = next((o for o in home if o in other), None)
        if common is None or second == first or glosses[first] == glosses[second]:
            continue
        path = home.index(common) + other.index(common)
        pairs.append((glosses[first], glosses[second], 1 / (1 + path)))
    return pairs
