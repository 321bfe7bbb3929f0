"""Patterns over modules: PEFT's rule, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.checkpoint.adapter_config import named_modules, pattern_table
from eutectic.errors import CheckpointError

PARTS = ("q_proj", "v_proj", "layers", "0", "1", "10", "self_attn", "q", "model")
modules = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
names = st.one_of(modules, st.sampled_from(["layers.1.q_proj", "layers_1.q_proj", "proj", ""]))
expressions = st.sampled_from(
    [r".*q_proj", r"layers\.[01]\.q.*", r"^model.*", "(q|v)_proj", r"\d+", "q_proj$", "", r"[a-z]+"]
)


def by_the_rule(patterns: dict[str, int], module: str) -> int:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return -1


@settings(max_examples=500)
@given(st.lists(st.one_of(names, expressions), max_size=8, unique=True), modules)
def test_the_first_pattern_that_matches_the_end_decides(stated: list[str], module: str) -> None:
    patterns = {pattern: place for place, pattern in enumerate(stated)}
    table = pattern_table(patterns, "here")
    assert table.value(module, -1) == by_the_rule(patterns, module)
    resolved = named_modules({"rank_pattern": patterns}, [module, "layers.1.q_proj"], "here")
    if resolved:
        assert by_the_rule(resolved["rank_pattern"], module) == by_the_rule(patterns, module)


def test_many_names_take_no_time() -> None:
    paths = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(250)]
    table = pattern_table({path: i for i, path in enumerate(paths)}, "here")
    started = time.process_time()
    assert [table.value(path, -1) for path in paths] == list(range(len(paths)))
    assert time.process_time() - started < 5


def test_a_pattern_that_never_ends_is_stopped() -> None:
    table = pattern_table({"(x+x+)+y|(x|x)*z|.*.*.*.*.*.*.*w.*": 1}, "here: 'rank_pattern'")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"takes more than 1 s to match 'xxx"):
        table.value("x" * 200 + "w" + "v" * 3000 + "\n\n", 0)
    assert time.process_time() - started < 5


def test_patterns_of_whole_paths_become_names() -> None:
    stated = {"target_modules": r"model\..*(q|v)_proj", "exclude_modules": None}
    paths = ["model.a.q_proj", "model.a.k_proj", "q_proj", "lm_head"]
    assert named_modules(stated, paths, "here") == {"target_modules": {"model.a.q_proj"}}
    assert named_modules({"target_modules": "all-linear"}, paths, "here") == {}
