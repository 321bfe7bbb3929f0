"""Every kind of tokenizer, written with tokens added and left out, reads as what was agreed on."""

import json
import random
from pathlib import Path

import pytest
from tests.helpers.vocabularies import tokenizer_json

from eutectic.vocabulary.agreement import Vocabulary, agree
from eutectic.vocabulary.policy import VocabularyPolicy
from eutectic.vocabulary.sentencepiece_model import Piece, pieces_of, with_pieces
from eutectic.vocabulary.tokenizer_files import _give_rows, unwritable, write_tokenizer
from eutectic.vocabulary.tokens import read_tokens

WORDS = ["<s>", "</s>", "a", "b", "ab", "é", "▁the", "语", "x", "y"]
OTHER = ["<s>", "</s>", "b", "a", "ba", "é", "ü", "x"]
KINDS = ("tokenizer.json", "unigram", "vocab.txt", "vocab.json", "pieces", "all of them")


def write(folder: Path, kind: str, words, added):
    """Write a tokenizer of a kind."""
    folder.mkdir(parents=True)
    decoder = {
        str(len(words) + n): {"content": t, "special": True, "normalized": False}
        for n, t in enumerate(added)
    }
    stated = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    value = tokenizer_json(words, added)
    value["model"]["merges"] = [
        [left, right] for left, right in (("a", "b"), ("b", "a")) if left + right in words
    ]
    begin = {"<s>": {"id": "<s>", "ids": [words.index("<s>")], "tokens": ["<s>"]}}
    value["post_processor"] = {"type": "TemplateProcessing", "special_tokens": begin}
    if kind == "unigram":
        value["model"] = {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [[w, -float(n)] for n, w in enumerate(words)],
        }
    whole = kind in ("tokenizer.json", "unigram", "all of them")
    if whole:
        (folder / "tokenizer.json").write_text(json.dumps(value))
    if kind in ("vocab.txt",):
        (folder / "vocab.txt").write_text("".join(f"{w}\n" for w in words))
    if kind in ("vocab.json", "all of them"):
        (folder / "vocab.json").write_text(json.dumps({w: n for n, w in enumerate(words)}))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in value["model"]["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    if kind == "pieces":
        pieces = [Piece(w, -float(n)) for n, w in enumerate(words)]
        (folder / "tokenizer.model").write_bytes(with_pieces(b"", pieces))
    if not whole:
        rows = {t: len(words) + n for n, t in enumerate(added)}
        (folder / "added_tokens.json").write_text(json.dumps(rows))
    stated["added_tokens_decoder"] = decoder
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))


def agreed(root: Path, policy, kinds=("tokenizer.json",) * 2, models=None) -> tuple:
    """Return the vocabulary of a base and an expert, and their folders."""
    models = models or {"base": (WORDS, ["<x>"]), "other": (OTHER, ["<y>", "<x>"])}
    folders = {name: root / name for name in models}
    for (name, (words, added)), kind in zip(models.items(), kinds, strict=True):
        write(folders[name], kind, words, added)
    tokens = {name: read_tokens(folder) for name, folder in folders.items()}
    heights = {name: found.count for name, found in tokens.items()}
    (root / "out").mkdir()
    found = agree(VocabularyPolicy.model_validate(policy), tokens, heights)
    assert isinstance(found, Vocabulary), found
    return found, folders


@pytest.mark.parametrize("policy", ["base", "other", "union", "intersection"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_as_agreed(tmp_path, kind, policy):
    rule = {"<new>": {"source": "zero", "add": True}}
    found, folders = agreed(tmp_path, {"source": policy, "tokens": rule}, (kind, kind))
    assert unwritable(found, folders[found.donor]) is None
    (tmp_path / "out" / "tokenizer_stale.txt").write_text("of another model")
    for _ in range(2):  # a run that is taken up again writes the same
        write_tokenizer(found, folders, tmp_path / "out")
        held = read_tokens(tmp_path / "out")
        assert dict(held.rows) == dict(found.rows)
    assert not (tmp_path / "out" / "tokenizer_stale.txt").exists()
    assert "<new>" in held.added and held.special["eos_token"] == "</s>"
    path = tmp_path / "out" / "tokenizer.json"
    if path.exists():
        value = json.loads(path.read_text())
        begin = value["post_processor"]["special_tokens"]["<s>"]
        assert begin["ids"] == [found.rows["<s>"]]
        for left, right in value["model"].get("merges", []):
            assert left + right in found.rows
        if kind == "unigram":
            unknown = (WORDS if found.donor == "base" else OTHER)[2]
            assert value["model"]["unk_id"] == found.rows[unknown]


def test_the_files_of_fast_and_slow_tokenizers_agree(tmp_path):
    found, folders = agreed(tmp_path, "union", ("all of them",) * 2)
    write_tokenizer(found, folders, tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    words = json.loads((tmp_path / "out" / "vocab.json").read_text())
    assert words == {t: r for t, r in whole["model"]["vocab"].items() if t in words}
    assert words.keys() >= {*WORDS, "ba", "ü"}
    lines = (tmp_path / "out" / "merges.txt").read_text().splitlines()
    assert lines == ["#version: 0.2", "a b", "b a"]
    assert whole["model"]["merges"] == [["a", "b"], ["b", "a"]]
    stated = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    decoder = {int(row): e["content"] for row, e in stated["added_tokens_decoder"].items()}
    assert decoder == {found.rows[t]: t for t in ("<x>", "<y>")}
    assert stated["added_tokens_decoder"][str(found.rows["<y>"])]["special"] is True


def test_pieces_keep_their_scores_and_rows(tmp_path):
    found, folders = agreed(tmp_path, "union", ("pieces", "pieces"))
    write_tokenizer(found, folders, tmp_path / "out")
    pieces = pieces_of((tmp_path / "out" / "tokenizer.model").read_bytes())
    placed = {piece.text: (row, piece.score) for row, piece in enumerate(pieces)}
    assert placed["ü"] == (found.rows["ü"], -float(OTHER.index("ü")))
    assert placed["语"] == (WORDS.index("语"), -float(WORDS.index("语")))


def test_shifted_rows_are_not_rewritten(tmp_path):
    models = {"base": (WORDS, []), "other": ([*WORDS, "new"], [])}
    found, folders = agreed(tmp_path, "base", ("pieces", "pieces"), models)
    config = folders["base"] / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "XLMRobertaTokenizer"}))
    tokens = {name: read_tokens(folder) for name, folder in folders.items()}
    heights = {name: own.count for name, own in tokens.items()}
    found = agree(VocabularyPolicy(source="union"), tokens, heights)
    assert isinstance(found, Vocabulary)
    assert "not the positions" in (unwritable(found, folders["base"]) or "")


@pytest.mark.parametrize("seed", range(20))
def test_vocabularies_at_random(tmp_path, seed):
    draw = random.Random(seed)
    pool = [f"t{n}" for n in range(30)]
    models = {}
    for name in ("base", "other"):
        words = ["<s>", "</s>", *draw.sample(pool, draw.randrange(3, 20))]
        rest = [t for t in pool if t not in words]
        models[name] = (words, draw.sample(rest, draw.randrange(0, 4)))
    policy = draw.choice(["union", "intersection", "base", "other"])
    kind = draw.choice(KINDS)
    found, folders = agreed(tmp_path, policy, (kind, kind), models)
    write_tokenizer(found, folders, tmp_path / "out")
    assert dict(read_tokens(tmp_path / "out").rows) == dict(found.rows)
    assert len(set(found.rows.values())) == len(found.rows)
    assert found.size >= found.count


@pytest.mark.parametrize("added", [1, 2, 3, 5])
@pytest.mark.parametrize("new", [1, 2])
def test_the_library_reads_the_rows_that_are_written(added: int, new: int, tmp_path: Path) -> None:
    """Added tokens below a new word: each that is put into the vocabulary moves the others."""
    library = pytest.importorskip("tokenizers")
    names = [f"<|{n}|>" for n in range(added)]
    value = tokenizer_json(WORDS, names)
    first = len(WORDS) + added
    value["model"]["vocab"] |= {f"new{n}": first + n for n in range(new)}
    _give_rows(value["model"], value["added_tokens"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    read = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = {token: row for row, token in enumerate([*WORDS, *names])}
    expected |= {f"new{n}": first + n for n in range(new)}
    assert {token: read.token_to_id(token) for token in expected} == expected
