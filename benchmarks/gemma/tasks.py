"""The tasks of the Gemma suite as prompts and answers of one token.

Ten of the text suite's kinds, where the answer is one of a few label words; two of pairs, which are
entailed or not; one rewriting, whose answer is any token of the vocabulary: exact match.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "text"), str(ROOT / "examples" / "minilm")]
from sources import TASKS as TEXT_TASKS
from sources import Splits, TextTask, load_splits
from texts import Row, fetch, hash_to_unit, read_member

TEXT_TOKENS = 40  # of what is asked about; a question and a cue follow


@dataclass(frozen=True)
class Prompted:
    """A task as a language model has it.

    Attributes:
        source: where texts and answers come from.
        cue: what follows the text, up to the answer.
        words: label -> word, where the label's own name will not do.
        open: the answer may be any token, and is right where it is the likeliest of all.
    """

    source: TextTask
    cue: str
    words: dict[str, str] | None = None
    open: bool = False


def _wordnet(cache: Path, member: str) -> list[str]:
    archive = fetch(cache, "wordnet-base_*.deb", ["apt-get", "download", "wordnet-base"])
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    content = subprocess.run(unpack, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as package:
        return read_member(package, f"./usr/share/wordnet/{member}").decode("latin-1").splitlines()


def _nouns(cache: Path) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield (offset, first word, gloss, offset of its first hypernym) of every synset of nouns."""
    for line in _wordnet(cache, "data.noun"):
        if line.startswith(" "):
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split()
        above = re.search(r" @ (\d{8}) n", fields)
        word = parts[4].replace("_", " ")
        yield parts[0], word, gloss.split('; "')[0].strip(), above[1] if above else None


def kinds(cache: Path) -> Iterator[Row]:
    """Yield "an X is a Y" of a noun and its hypernym, or that of another noun."""
    found = list(_nouns(cache))
    words = {offset: word for offset, word, _, _ in found}
    lower = [(word, words[above]) for _, word, _, above in found if above in words]
    for place, (word, above) in enumerate(lower):
        true = hash_to_unit(f"true {word} {above}") < 0.5
        # Another noun's hypernym is as frequent as a noun's own.
        other = lower[int(hash_to_unit(f"other {place} {word}") * len(lower))][1]
        if true or other != above:
            yield Row(f"A {word} is a kind of {above if true else other}.", _said(true), word)


def defines(cache: Path) -> Iterator[Row]:
    """Yield a word with its gloss, or with that of another word."""
    found = [(word, gloss) for _, word, gloss, _ in _nouns(cache) if len(gloss.split()) >= 4]
    for place, (word, gloss) in enumerate(found):
        true = hash_to_unit(f"true {word} {gloss}") < 0.5
        other = found[int(hash_to_unit(f"other {place} {word}") * len(found))][1]
        if true or other != gloss:
            yield Row(f"{word}: {gloss if true else other}", _said(true), word)


def base_forms(cache: Path) -> Iterator[Row]:
    """Yield irregular forms of verbs, nouns and adjectives with the form that they are of."""
    for part in ("verb", "noun", "adj"):
        for line in _wordnet(cache, f"{part}.exc"):
            form, *bases = line.split()
            if len(bases) == 1 and "_" not in line and bases[0] != form:
                yield Row(f'The irregular form "{form}" is of the {part}', bases[0], bases[0])


def _said(true: bool) -> str:
    return "yes" if true else "no"


_SENTIMENT = {"negative": "bad", "positive": "good"}
_OWN = {
    "wn_kind": TextTask("Debian wordnet-base (WordNet 3.0)", "noun, noun -> is it a kind", kinds),
    "wn_defines": TextTask("Debian wordnet-base (WordNet 3.0)", "word, gloss -> match", defines),
    "wn_form": TextTask("Debian wordnet-base (WordNet 3.0)", "form -> base form", base_forms, 0.3),
}
# The first eight are the suite; further ones after them.
TASKS: dict[str, Prompted] = {
    "movie": Prompted(TEXT_TASKS["movie"], "Review is", _SENTIMENT),
    "tweets": Prompted(TEXT_TASKS["tweets"], "Author:"),
    "wn_noun": Prompted(TEXT_TASKS["wn_noun"], "Kind of thing:"),
    "debsec": Prompted(TEXT_TASKS["debsec"], "Section:"),
    "langid": Prompted(TEXT_TASKS["langid"], "Language code:"),
    "wn_kind": Prompted(_OWN["wn_kind"], "True, yes or no?"),
    "wn_defines": Prompted(_OWN["wn_defines"], "Is this the definition, yes or no?"),
    "wn_form": Prompted(_OWN["wn_form"], "", open=True),
    "wn_verb": Prompted(TEXT_TASKS["wn_verb"], "Kind of action:"),
    "20news": Prompted(TEXT_TASKS["20news"], "Newsgroup:"),
    "gcide": Prompted(TEXT_TASKS["gcide"], "Field:"),
    "spam": Prompted(TEXT_TASKS["spam"], "Mail is"),
    "sotu": Prompted(TEXT_TASKS["sotu"], "Half-century:"),
}


def splits_of(name: str, cache: Path, tokenizer: Any) -> Splits:
    """Return a task's splits; of open answers only those of one token, numbered by it."""
    task = TASKS[name]
    found = load_splits(task.source, cache)
    if not task.open:
        return found
    tokens = [ids[0] if len(ids) == 1 else -1 for ids in _words(tokenizer, found.labels)]

    def kept(examples: Sequence[Any]) -> list[Any]:
        return [e._replace(label=tokens[e.label]) for e in examples if tokens[e.label] >= 0]

    return Splits([], kept(found.train), kept(found.validation), kept(found.test))


def label_tokens(name: str, labels: Sequence[str], tokenizer: Any) -> list[int]:
    """Return the first token of every label's word, all different, in the order of the labels.

    Where two begin alike, the later is called by a letter.
    """
    words = TASKS[name].words or {}
    plain = [words.get(label, re.split(r"[._]", label)[-1]) for label in labels]
    found: list[int] = []
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for ids in _words(tokenizer, plain):
        token = ids[0]
        while token in found:
            token = _words(tokenizer, [next(letters)])[0][0]
        found.append(token)
    return found


def _words(tokenizer: Any, words: Sequence[str]) -> list[list[int]]:
    return [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]


def prompts(name: str, texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of prompts: the text, cut, then the cue, whose end awaits the answer."""
    cue = f"\n{TASKS[name].cue}" if TASKS[name].cue else ""
    ending = tokenizer(cue, add_special_tokens=False)["input_ids"]
    ids = tokenizer(list(texts), truncation=True, max_length=TEXT_TOKENS)["input_ids"]
    return [own + ending for own in ids]
