"""Documents like valid ones, with something wrong, for tests that know two outcomes only."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from eutectic.errors import EutecticError

WORDS = [
    "",
    "x",
    "\x1b[31m",
    "\0",
    "a\nb",
    "é\u202e",
    "nan",
    "1e400",
    "../..",
    "/dev/zero",
    "~nobody",
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**12, 2**63, -(2**70), 10**320, 1e308, float("nan"), float("inf"), 0.5]),
    st.sampled_from(WORDS),
    st.sampled_from(["\ud800", "x" * 3000]),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=6,
)


def _places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [above]
    if isinstance(value, dict):
        places += [p for key, inner in value.items() for p in _places(inner, (*above, key))]
    elif isinstance(value, list):
        places += [p for i, inner in enumerate(value) for p in _places(inner, (*above, i))]
    return places


@st.composite
def mutated(draw: Callable[[Any], Any], valid: Any) -> Any:
    """Draw a document in which one to three values are others, missing, or added."""
    document = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document)
        place = draw(st.sampled_from(places))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(values)
            continue
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "delete", "rename", "wrap"]))
        if how == "replace":
            holder[place[-1]] = draw(values)
        elif how == "delete":
            del holder[place[-1]]
        elif how == "wrap":
            holder[place[-1]] = [holder[place[-1]]]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([*WORDS, "base"]))] = holder.pop(place[-1])
    return document


def as_json(value: Any) -> bytes:
    """Write JSON as a hostile program would: NaN, halves of pairs and long numbers included."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: Callable[[Any], Any], text: bytes) -> bytes:
    """Draw a text in which some bytes are others, missing or added."""
    raw = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        new = draw(st.one_of(st.binary(max_size=4), st.sampled_from(BITS)))
        raw[at : at + draw(st.sampled_from([0, 1, 3, 40]))] = new
    return bytes(raw)


BITS = [
    b"\0" * 8,
    b"[" * 2000,
    b'{"a":' * 300,
    b"9" * 5000,
    b"\\ud800",
    b"\xff\xfe",
    b"&a *a",
    b"!!x ",
]


@st.composite
def documents(draw: Callable[[Any], Any], valid: Any) -> bytes:
    """Draw the JSON text of a document that is wrong in its values or in its bytes."""
    if draw(st.booleans()):
        return as_json(draw(mutated(valid)))
    return draw(damaged(as_json(valid)))


def outcome(call: Callable[[], Any]) -> str:
    """Return "accepted" or "refused"; anything else that is raised fails the test."""
    try:
        call()
    except EutecticError as error:
        assert str(error).strip()
        str(error).encode("utf-8", "backslashreplace")
        return "refused"
    return "accepted"
