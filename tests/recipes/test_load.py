"""Guards recipes as files: every fault at once, each with its line, and never another exception."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eutectic.errors import RecipeError
from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.schema import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(folder: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    return [str(fault) for fault in caught.value.faults]


GOOD = """\
base: ./base
experts:
  a: ./a
  b: {path: ./b, weight: 0.5}
method: ties
parameters: {density: 0.1}
"""


def test_a_good_recipe(folder):
    recipe, source = load_recipe(write(folder, GOOD))
    assert recipe.method == "ties" and recipe.parameters == {"density": 0.1}
    assert recipe.experts["b"].weight == 0.5
    assert source.folder == folder


def test_relative_paths_start_at_the_recipe(folder, monkeypatch):
    monkeypatch.chdir("/")
    recipe, _ = load_recipe(write(folder, GOOD))
    assert recipe.base == str(folder / "base")
    assert recipe.experts["a"].path == str(folder / "a")


def test_absolute_paths_and_hub_ids_stay(folder):
    text = f"base: org/model\nexperts: {{a: {folder / 'a'}, b: name}}\nmethod: average\n"
    recipe, _ = load_recipe(write(folder, text))
    assert recipe.base == "org/model"
    assert recipe.experts["a"].path == str(folder / "a")
    assert recipe.experts["b"].path == "name"


def test_a_folder_beside_the_recipe_wins_over_a_hub_id(folder):
    recipe, _ = load_recipe(write(folder, "base: base\nexperts: {a: a}\nmethod: average\n"))
    assert recipe.base == str(folder / "base")
    assert recipe.experts["a"].path == str(folder / "a")


def test_home_folders_are_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe, _ = load_recipe(write(folder, "base: ~/base\nexperts: {a: ~/a}\nmethod: average\n"))
    assert recipe.base == str(folder / "base")


ALL_AT_ONCE = """\
bse: ./base
experts:
  a: {path: ./a, wieght: 2, weight: .nan}
  b: ./missing
method: tie
scale: lots
scale: 1.0
tensors:
  - {match: "*x*", treatment: copi}
  - {match: "*y*", split: 1}
  - match: "*z*"
    treatmnt: copy
heads: keep
"""


def test_every_fault_at_once_in_the_order_of_lines(folder):
    faults = faults_of(folder, ALL_AT_ONCE)
    starts = [
        "'base' is missing",
        "line 1: unknown key 'bse'. Did you mean 'base'?",
        "line 3: experts.a.weight: should be a finite number, got nan",
        "line 3: unknown key 'experts.a.wieght'. Did you mean 'weight'?",
        "line 4: experts.b: no such file: ./missing",
        "line 5: unknown method 'tie'. Did you mean 'ties'?",
        "line 7: key 'scale' stands twice.",
        "line 9: tensors.0.treatment: should be 'matrix', 'vector'",
        "line 10: tensors.1.split.parts: should be greater than or equal to 2, got 1",
        "line 12: unknown key 'tensors.2.treatmnt'. Did you mean 'treatment'?",
        "line 13: heads: should be 'per_expert', 'base' or 'drop', got 'keep'",
    ]
    assert len(faults) == len(starts)
    for start in starts:
        assert any(fault.startswith(start) for fault in faults), (start, faults)
    lines = [int(fault.split(":")[0].removeprefix("line ")) for fault in faults[1:]]
    assert faults[0].startswith(starts[0]) and lines == sorted(lines)


def test_the_message_counts_and_lists_the_faults(folder):
    path = write(folder, GOOD.replace("base: ./base", "base: ./nowhere"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"recipe {path} cannot be carried out (1 fault):",
        "  - line 1: base: no such file: ./nowhere",
    ]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("{densty: 0.1}", "method 'ties': unknown parameter 'densty'. Did you mean 'density'?"),
        ("{density: 2}", "method 'ties': density: input should be less than or equal to 1, got 2."),
        ("{scope: all}", "method 'ties': scope: input should be 'tensor' or 'model', got 'all'."),
        ("[density]", "parameters: should be a valid dictionary."),
    ],
)
def test_parameters_are_checked_by_the_method(folder, parameters, words):
    faults = faults_of(folder, GOOD.replace("{density: 0.1}", parameters))
    assert len(faults) == 1
    assert faults[0].startswith(f"line 6: {words}")


def test_a_method_may_ask_for_a_number_of_experts(folder):
    text = GOOD.replace("ties", "slerp").replace("{density: 0.1}", "{}")
    text = text.replace("  a: ./a\n", "  a: ./a\n  c: ./a\n")
    assert faults_of(folder, text) == ["line 2: method 'slerp' takes exactly 2 experts, got 3."]


def test_an_expert_may_have_parameters_of_its_own(folder):
    text = """
base: ./base
method: {method}
experts:
  a: ./a
  b:
    path: ./b
    parameters: {{{own}}}
"""

    def load(method, own):
        (folder / "own.yaml").write_text(text.format(method=method, own=own))
        return load_recipe(folder / "own.yaml")[0].experts

    assert load("ties", "density: 0.7")["b"].parameters == {"density": 0.7}
    assert load("ties", "density: 0.7")["a"].parameters == {}
    with pytest.raises(RecipeError, match="line 8: method 'ties': density: .* got 7"):
        load("ties", "density: 7")
    with pytest.raises(RecipeError, match="line 8: expert 'b': .*aggregate.*Allowed: density"):
        load("ties", "aggregate: sum")
    with pytest.raises(RecipeError, match="no density of each expert's own. Allowed: none"):
        load("average", "density: 0.7")


def test_side_files_come_from_someone_known(folder):
    assert faults_of(folder, GOOD + "side_files: c\n") == [
        "line 7: side_files: 'c' is neither 'base' nor an expert."
    ]


def test_lines_of_merge_keys_and_anchors(folder):
    text = GOOD.replace("  a: ./a\n", "  a: &x {path: ./nowhere}\n").replace(
        "  b: {path: ./b, weight: 0.5}\n", "  b:\n    <<: *x\n    weight: 2\n"
    )
    faults = faults_of(folder, text)
    assert faults[0] == "line 3: experts.a.path: no such file: ./nowhere"
    assert faults[1].endswith("experts.b.path: no such file: ./nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just words",
        "base: [unclosed",
        "base: \tx: y",
        "a: &x [*x]",
        "&x {base: *x}",
        "base: 2020-13-45",
        "base: !!int x",
        "base: !!timestamp x",
        "base: !!bool x",
        "base: !!python/object:os.system {}",
        "? [a, b]\n: c",
        "{" * 3000,
        "[" * 3000 + "]" * 3000,
        "base: a\x00b",
        "base: ~nosuchuser/x\nexperts: {a: ./a}\nmethod: average",
        "base: ./" + "x" * 5000 + "\nexperts: {a: ./a}\nmethod: average",
        "base: '\\0'\n1: 2\nnull: 3\n",
        "experts: {1: 2, true: false, x: [y]}\nmethod: [average]",
        "seed: " + "9" * 5000,
        "method: ties\nparameters: {1: 2}",
    ],
)
def test_hostile_texts_are_refused_in_words(folder, text):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    assert caught.value.exit_code == 2
    assert all(map(str, caught.value.faults))


def test_a_file_that_is_no_text(folder):
    path = folder / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00base")
    with pytest.raises(RecipeError, match="not a UTF-8 text file"):
        load_recipe(path)


def test_a_file_that_is_not_there(folder):
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(folder / "nothing.yaml")
    with pytest.raises(RecipeError, match="is a folder, not a YAML file"):
        load_recipe(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(folder):
    path = write(folder, GOOD)
    path.chmod(0)
    with pytest.raises(RecipeError, match="Permission denied"):
        load_recipe(path)


def test_recipes_from_python_need_no_lines():
    with pytest.raises(RecipeError) as caught:
        check_recipe({"base": "x/y", "experts": {"a": Path("/nowhere")}, "metod": "average"})
    assert sorted(map(str, caught.value.faults)) == [
        "'method' is missing.",
        "experts.a: no such file: /nowhere",
        "unknown key 'metod'. Did you mean 'method'?",
    ]


def test_a_list_of_experts_is_told_the_form():
    with pytest.raises(RecipeError, match=r"experts: is a list; .*\{sst2: \./sst2, mnli: "):
        check_recipe({"base": "x/y", "experts": ["a", "b"], "method": "average"})


def test_a_location_falls_back_to_its_deepest_known_part():
    source = Source(lines={("experts",): 3, ("experts", "a"): 4})
    assert source.line("experts", "a", "path") == 4
    assert source.line("experts", "b") == 3
    assert source.line("method") == 0


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["average", "ties", "slerp", "./x", "~", "/", "copy", "base"])
    | st.dates()
)
words = st.sampled_from(
    [*Recipe.model_fields, "path", "weight", "statistics", "match", "treatment", "split", "density"]
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(words | st.text(max_size=4) | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


def load_or_refuse(path: Path) -> None:
    try:
        recipe, _ = load_recipe(path)
    except RecipeError as error:
        assert error.faults and str(error)
    else:
        assert recipe.experts


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(document=st.dictionaries(words, values, min_size=1, max_size=8))
def test_any_document_is_a_recipe_or_refused(tmp_path, document: dict[str, Any]):
    load_or_refuse(write(tmp_path, yaml.safe_dump(document, allow_unicode=True)))


@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_text_is_a_recipe_or_refused(tmp_path, data):
    lines = data.draw(st.lists(st.sampled_from(ALL_AT_ONCE.splitlines() + GOOD.splitlines())))
    noise = data.draw(st.text(max_size=12))
    at = data.draw(st.integers(0, 200))
    text = "\n".join(lines)
    path = tmp_path / "recipe.yaml"
    path.write_bytes((text[:at] + noise + text[at:]).encode("utf-8", "surrogatepass"))
    load_or_refuse(path)
