"""SentencePiece models (`tokenizer.model`): their pieces, read and written without the library.

A model is a protocol buffer whose field 1, repeated, is a piece: its text (1), its score (2) and
its type (3); see `sentencepiece_model.proto` in google/sentencepiece. All other fields are kept as
they are.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL = 1
CONTROL, USER_DEFINED = 3, 4  # types of pieces that the text never yields, or always
_PIECE = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One piece of a vocabulary; its row is its position."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


def looks_like_model(content: bytes) -> bool:
    """Tell whether a file begins as a SentencePiece model does: with a piece."""
    return content[:1] == b"\x0a"


def pieces_of(content: bytes) -> list[Piece]:
    """Return the pieces of a model, in the order of their rows; ValueError for anything else."""
    return [_piece(content[a:b]) for field, a, b, _ in _fields(content) if field == _PIECE]


def with_pieces(content: bytes, pieces: list[Piece]) -> bytes:
    """Return a model with other pieces, and all else as it was."""
    rest = b"".join(
        content[start:stop] for (field, _, stop, start) in _fields(content) if field != _PIECE
    )
    return b"".join(map(_encoded, pieces)) + rest


def _fields(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, start of the value, its end, start of the field) of every field."""
    place = 0
    while place < len(content):
        start = place
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            first = place
            _, place = _varint(content, place)
        elif wire == _BYTES:
            length, place = _varint(content, place)
            first, place = place, place + length
        elif wire in (_FIXED32, _FIXED64):
            first, place = place, place + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"a field of wire type {wire} at byte {start:,}")
        if place > len(content) or not number:
            raise ValueError(f"the field at byte {start:,} is cut off")
        yield number, first, place, start


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            raise ValueError("a number is cut off")
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"a number of more than ten bytes at byte {place:,}")


def _piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, start, stop, _ in _fields(content):
        if number == 1:
            text = content[start:stop].decode("utf-8")
        elif number == 2 and stop - start == 4:
            (score,) = struct.unpack("<f", content[start:stop])
        elif number == 3:
            kind, _ = _varint(content, start)
    return Piece(text, score, kind)


def _encoded(piece: Piece) -> bytes:
    text = piece.text.encode()
    body = b"\x0a" + _as_varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
    if piece.kind != NORMAL:
        body += b"\x18" + _as_varint(piece.kind)
    return b"\x0a" + _as_varint(len(body)) + body


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
