"""The Gemma suite's answers and the embedding suite's pairs, on a few lines of a dictionary."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# A dog and a cat are carnivores, these and a stone are things; fields as WordNet has them.
NOUNS = """\
  1 This line is of the licence.
00000001 03 n 01 thing 0 000 | whatever there is to be seen
00000002 05 n 01 carnivore 0 001 @ 00000001 n 0000 | a flesh eating mammal of some kind
00000003 05 n 01 dog 0 001 @ 00000002 n 0000 | it barks at whoever passes by; "the dog barked"
00000004 05 n 01 cat 0 001 @ 00000002 n 0000 | it purrs where it is warm
00000005 17 n 01 stone 0 001 @ 00000001 n 0000 | a hard lump that does not move
"""


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded: ModuleType = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)  # records look their module up
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec.loader.exec_module(loaded)
    return loaded


class Letters:
    """A tokenizer of pieces of three letters at most."""

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        one = isinstance(texts, str)
        ids = [self.pieces(text) for text in ([texts] if one else texts)]
        if options.get("truncation"):
            ids = [own[: options["max_length"]] for own in ids]
        return {"input_ids": ids[0] if one else ids}

    def pieces(self, text: str) -> list[int]:
        words = text.split()
        parts = [w[i : i + 3] for w in words for i in range(0, len(w), 3)]
        return [int.from_bytes(part.encode(), "big") for part in parts]


def test_answers_are_tokens_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = module("gemma/tasks", monkeypatch)
    found = tasks.label_tokens("debsec", ["net", "network", "devel"], Letters())
    named = [token.to_bytes(3, "big").strip(b"\0").decode() for token in found]
    assert named == ["net", "A", "dev"]
    (ids,) = tasks.prompts("debsec", ["word " * 200], Letters())
    assert len(ids) == tasks.TEXT_TOKENS + 3  # Sec tio n:
    assert tasks.label_tokens("movie", ["negative", "positive"], Letters()) != found


def test_pairs_are_entailed_or_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tasks = module("gemma/tasks", monkeypatch)
    lines = {"data.noun": NOUNS, "verb.exc": "went go\nran run\nsat_in sit_in\n"}
    monkeypatch.setattr(tasks, "_wordnet", lambda cache, member: lines.get(member, "").splitlines())
    true = {("dog", "carnivore"), ("cat", "carnivore"), ("carnivore", "thing"), ("stone", "thing")}
    rows = list(tasks.kinds(tmp_path))
    assert rows
    for row in rows:
        word, above = row.text.removeprefix("A ").removesuffix(".").split(" is a kind of ")
        assert (row.label == "yes") == ((word, above) in true)
        assert row.group == word
    assert all(row.label in ("yes", "no") for row in tasks.defines(tmp_path))
    forms = {row.text: row.label for row in tasks.base_forms(tmp_path)}
    assert sorted(forms.values()) == ["go", "run"] and any('"went"' in text for text in forms)


def test_terms_stay_on_one_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs = module("embeddings/pairs", monkeypatch)
    given = [pairs.Pair(f"term {i % 40}", f"definition {i} of it") for i in range(400)]
    given.append(pairs.Pair("another term", "definition 3 of it"))
    monkeypatch.setitem(pairs.READERS, "wordnet", lambda cache: given)
    sides = pairs.load("wordnet", tmp_path)
    lists = (sides.train, sides.validation, sides.test)
    asked = [{pair.query for pair in side} for side in lists]
    assert sum(map(len, asked)) == len(set().union(*asked)) == sum(map(len, lists)) >= 40
    documents = [pair.document for side in lists for pair in side]
    assert len(documents) == len(set(documents))


def test_related_glosses_are_scored_by_their_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pairs = module("embeddings/pairs", monkeypatch)
    monkeypatch.setattr(pairs, "_unpacked", lambda *names: NOUNS.encode("latin-1"))
    found = pairs.related(tmp_path, 4)
    word = {"a flesh": "carnivore", "it barks": "dog", "it purrs": "cat", "a hard": "stone"}
    paths = {
        frozenset(("dog", "cat")): 2,
        frozenset(("dog", "carnivore")): 1,
        frozenset(("cat", "carnivore")): 1,
        frozenset(("carnivore", "stone")): 2,
        frozenset(("dog", "stone")): 3,
        frozenset(("cat", "stone")): 3,
    }
    assert found
    for first, second, score in found:
        names = frozenset(
            next(w for k, w in word.items() if t.startswith(k)) for t in (first, second)
        )
        assert score == pytest.approx(1 / (1 + paths[names]))
