"""Rows of tokens from every kind of tokenizer file, against what the files say by hand."""

import json
import struct

import pytest
from tests.helpers.vocabularies import tokenizer_json

from eutectic.errors import CheckpointError
from eutectic.vocabulary.sentencepiece_model import Piece, pieces_of, with_pieces
from eutectic.vocabulary.tokens import read_tokens

WORDS = ["<s>", "</s>", "the", "fox"]


def sentencepiece(pieces):
    """Return a model file: pieces, and a field of another kind behind them."""
    encoded = b""
    for text, score, kind in pieces:
        raw = text.encode()
        body = b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score)
        body += bytes([0x18, kind]) if kind != 1 else b""
        encoded += b"\x0a" + bytes([len(body)]) + body
    return encoded + b"\x12\x03\x08\x90\x4e"


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁the", -1.5, 1), ("é", -2.0, 1)]


def put(folder, **files):
    for name, value in files.items():
        name = name.replace("__", ".")
        path = folder / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_tokenizer_json(tmp_path, kind):
    value = tokenizer_json(WORDS, ["<a>", "<b>"])
    value["model"]["type"] = kind
    if kind == "Unigram":
        value["model"]["vocab"] = [[word, -1.0] for word in WORDS]
    found = read_tokens(put(tmp_path, tokenizer__json=value))
    assert dict(found.rows) == {"<s>": 0, "</s>": 1, "the": 2, "fox": 3, "<a>": 4, "<b>": 5}
    assert found.kind == kind and found.count == 6
    assert set(found.added) == {"<a>", "<b>"} and found.added["<a>"]["special"] is True


def test_an_added_token_in_the_row_of_a_word(tmp_path):
    value = tokenizer_json(WORDS)
    value["added_tokens"] = [{"id": 3, "content": "<fox>", "special": True}]
    found = read_tokens(put(tmp_path, tokenizer__json=value))
    assert found.rows["fox"] == found.rows["<fox>"] == 3
    assert found.by_row()[3] == "<fox>"


def test_vocabularies_in_files_of_their_own(tmp_path):
    (tmp_path / "w").mkdir()
    found = read_tokens(put(tmp_path / "w", vocab__txt="[PAD]\r\n[UNK]\r\n##s\r\n"))
    assert dict(found.rows) == {"[PAD]": 0, "[UNK]": 1, "##s": 2} and found.kind == "vocab.txt"
    (tmp_path / "b").mkdir()
    rows = {"a": 0, "b": 1, "ab": 2}
    files = {"vocab__json": rows, "merges__txt": "#version: 0.2\na b\n"}
    found = read_tokens(put(tmp_path / "b", added_tokens__json={"<x>": 3}, **files))
    assert dict(found.rows) == {**rows, "<x>": 3} and list(found.added) == ["<x>"]
    (tmp_path / "s").mkdir()
    stated = {
        "added_tokens_decoder": {"5": {"content": "<x>", "special": True}},
        "pad_token": {"content": "<pad>", "special": True},
        "eos_token": "</s>",
    }
    files = {"tokenizer__model": sentencepiece(PIECES), "tokenizer_config__json": stated}
    found = read_tokens(put(tmp_path / "s", **files))
    # transformers gives a special token that stands nowhere the next row.
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "é": 4, "<x>": 5, "<pad>": 6}
    assert dict(found.rows) == expected and found.beyond == ("<pad>",)
    assert found.special == {"pad_token": "<pad>", "eos_token": "</s>"}


def test_rows_of_fairseq_are_shifted(tmp_path):
    config = {"tokenizer_class": "XLMRobertaTokenizer"}
    put(tmp_path, tokenizer_config__json=config)
    put(tmp_path, **{"sentencepiece__bpe__model": sentencepiece(PIECES)})
    expected = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "▁the": 4, "é": 5}
    assert dict(read_tokens(tmp_path).rows) == expected


def test_nothing_and_what_is_broken(tmp_path):
    assert read_tokens(tmp_path) is None
    put(tmp_path, tokenizer_config__json={"model_max_length": 512})
    assert read_tokens(tmp_path) is None
    for content in ("{", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}'):
        put(tmp_path, tokenizer__json=content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            read_tokens(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    put(tmp_path, tokenizer__model=sentencepiece(PIECES)[:-8])
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        read_tokens(tmp_path)


def test_sentencepiece_models_are_written_as_they_were(tmp_path):
    content = sentencepiece(PIECES)
    found = pieces_of(content)
    assert [(p.text, p.score, p.kind) for p in found] == PIECES
    assert with_pieces(content, found) == content
    more = with_pieces(content, [*found, Piece("x" * 300, -3.0)])
    assert pieces_of(more)[-1].text == "x" * 300 and more.endswith(b"\x12\x03\x08\x90\x4e")
    for cut in range(1, len(content)):
        try:
            assert len(pieces_of(content[:cut])) <= len(PIECES)
        except ValueError:
            pass
