"""Guards how keys of an expert are matched to the base's: the best prefix, never a guess."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.checkpoint.names import align
from eutectic.errors import CheckpointError

BODY = [f"encoder.layer.{i}.{part}.weight" for i in range(3) for part in ("query", "value")]


def with_prefix(prefix: str, names: list[str]) -> list[str]:
    return [prefix + name for name in names]


def test_equal_keys_map_to_themselves() -> None:
    mapping, alignment = align(BODY, [*BODY, "classifier.weight"])
    assert mapping == {name: name for name in BODY}
    assert (alignment.strip, alignment.add) == ("", "")
    assert alignment.to_base("classifier.weight", BODY) == "classifier.weight"


@pytest.mark.parametrize("prefix", ["bert.", "roberta.", "model.", "base_model.model.", "a.b.c."])
def test_prefix_on_either_side(prefix: str) -> None:
    longer = with_prefix(prefix, BODY)
    mapping, alignment = align(BODY, [*longer, "classifier.weight"])
    assert mapping == dict(zip(longer, BODY, strict=True))
    assert f"'{prefix}'" in str(alignment)
    assert alignment.to_base("classifier.weight", set(BODY)) == "classifier.weight"
    assert alignment.to_base(f"{prefix}pooler.bias", set(BODY)) == "pooler.bias"
    mapping, alignment = align([*longer, "classifier.weight"], BODY)
    assert mapping == dict(zip(BODY, longer, strict=True))
    assert f"'{prefix}'" in str(alignment)
    assert alignment.to_base("pooler.bias", set(longer)) == f"{prefix}pooler.bias"


def test_head_outside_the_prefix_still_meets() -> None:
    base = [*BODY, "lm_head.weight"]
    mapping, _ = align(base, [*with_prefix("model.", BODY), "lm_head.weight"])
    assert mapping["lm_head.weight"] == "lm_head.weight"
    assert len(mapping) == len(base)


def test_larger_overlap_wins_over_a_coincidence() -> None:
    base = ["head.weight", *with_prefix("bert.", BODY)]
    mapping, alignment = align(base, ["head.weight", *BODY])
    assert alignment.add == "bert."
    assert len(mapping) == len(base)


def test_no_common_key() -> None:
    mapping, _ = align(BODY, ["conv.weight"])
    assert mapping == {}


def test_two_fits_are_ambiguous() -> None:
    with pytest.raises(CheckpointError, match="more than one way"):
        align(["a.weight", "b.weight"], ["weight"], expert="expert 'x'")


def test_two_keys_with_one_meaning() -> None:
    with pytest.raises(CheckpointError, match="both mean"):
        align(BODY, [*with_prefix("bert.", BODY), BODY[0]])


@settings(deadline=None, max_examples=60)
@given(
    names=st.sets(st.from_regex(r"[ab](\.[cd]){2,4}\.w", fullmatch=True), min_size=1),
    prefix=st.sampled_from(["", "x.", "x.y."]),
    strip=st.booleans(),
)
def test_mapping_is_one_to_one(names: set[str], prefix: str, strip: bool) -> None:
    plain, longer = sorted(names), with_prefix(prefix, sorted(names))
    base, expert = (plain, longer) if strip else (longer, plain)
    mapping, _ = align(base, expert)
    assert mapping == dict(zip(expert, base, strict=True))
