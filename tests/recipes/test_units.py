"""Guards sizes: as people write them, as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eutectic.errors import RequestError
from eutectic.recipes.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4_000_000, 4_000_000),
        ("4000000", 4_000_000),
        ("0", 0),
        ("4GB", 4_000_000_000),
        ("4gb", 4_000_000_000),
        ("4g", 4_000_000_000),
        ("500 M", 500_000_000),
        (" 1.5GiB ", 1_610_612_736),
        ("512MiB", 536_870_912),
        ("2 kB", 2_000),
        ("2KiB", 2_048),
        ("1T", 10**12),
        ("1TiB", 2**40),
        ("7b", 7),
        ("9007199254740993", 9_007_199_254_740_993),
    ],
)
def test_sizes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", " ", "GB", "-4GB", "4PB", "4 G B", "1,5GB", "1.GB", "4GB!", "1e9", "inf", "nan"]
)
def test_no_sizes(text):
    with pytest.raises(RequestError, match="Write it like 4GB, 512MiB or 800000"):
        parse_bytes(text)


@given(st.text())
def test_any_text_is_a_size_or_refused(text):
    try:
        assert parse_bytes(text) >= 0
    except RequestError:
        pass


def test_a_number_of_any_length():
    assert parse_bytes("9" * 400 + "kB") > 10**402


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (512_000_000, "512 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (999_999_999, "1 GB"),
        (1.25e9, "1.25 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_three_digits(count, text):
    assert format_bytes(count) == text
