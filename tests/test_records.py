"""Faults and notes: one text each, made from their parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eutectic import sentences
from eutectic.errors import Fault, Note, RecipeError

SOURCES = Path(sentences.__file__).parent


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("k", "no such file: ./a"), "no such file: ./a"),
        (Fault("k", "is missing.", "'base'", line=3), "line 3: 'base': is missing."),
        (Fault("k", "too large.", "x", got="7"), "x: too large, got 7."),
        (
            Fault("k", "too large", "x", got="7", allowed="1 to 3"),
            "x: too large, got 7. Allowed: 1 to 3.",
        ),
        (Fault("k", "unknown.", next=" Did you mean 'x'?"), "unknown. Did you mean 'x'?"),
    ],
)
def test_the_text_of_a_fault(fault, text):
    assert str(fault) == text


def test_plain_strings_become_faults():
    error = RecipeError(["a\nb", Fault("k", "c", line=2)], "recipe r")
    assert [f.kind for f in error.faults] == ["other", "k"]
    assert str(error) == ("recipe r cannot be carried out (2 faults):\n  - a\n    b\n  - line 2: c")


def test_the_text_of_a_note():
    names = tuple("abcdef")
    assert str(Note("copied", names)).endswith("no expert has them: a, b, c, d and 2 more")
    assert str(Note("tied", ("{x}",))) == "tied to {x}"
    assert len({Note("copied", names), Note("copied", names)}) == 1


def test_every_kind_has_a_sentence_and_every_sentence_a_use():
    others = [p for p in SOURCES.rglob("*.py") if p.name != "sentences.py"]
    text = "\n".join(p.read_text("utf-8") for p in others)
    used = set(re.findall(r'\bNote\(\s*"(\w+)"', text))
    assert used <= set(sentences.SENTENCES)
    assert all(f'"{kind}"' in text for kind in sentences.SENTENCES)
