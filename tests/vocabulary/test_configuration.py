"""Guards which rows of tokens a configuration names: in its language parts too."""

from __future__ import annotations

from typing import Any

import pytest

from eutectic.vocabulary.configuration import rows_stated, stated_size


@pytest.mark.parametrize(
    ("config", "size", "rows"),
    [
        ({"vocab_size": 9, "text_config": {"eos_token_id": [3, -1]}}, 9, [3]),
        ({"text_config": {"vocab_size": 9, "eos_token_id": 3}, "eos_token_id": 4}, 9, [4, 3]),
        ({"vocab_size": 9, "text_config": {"vocab_size": 5, "eos_token_id": 3}}, 9, None),
        ({"text_config": {"decoder": {"vocab_size": 9, "eos_token_id": 3}}}, 9, [3]),
        ({"vision_config": {"vocab_size": 9, "eos_token_id": 3}}, None, None),
    ],
)
def test_rows_of_the_language_parts(
    config: dict[str, Any], size: int | None, rows: list[int] | None
) -> None:
    assert stated_size(config) == size
    assert rows_stated(config).get("eos_token_id") == rows
