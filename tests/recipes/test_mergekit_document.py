"""Guards mergekit configurations as files: every fault at once, each with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.errors import RecipeError
from eutectic.recipes.load import load_recipe
from eutectic.recipes.mergekit_document import is_mergekit
from eutectic.recipes.settings import Case, Gradient


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "a", "b", "lora"):
        (tmp_path / name).mkdir()
    return tmp_path


def read(folder: Path, text: str):
    path = folder / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)[0]


def faults_of(folder: Path, text: str) -> list[tuple[int, str]]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text)
    return [(fault.line, fault.kind) for fault in caught.value.faults]


GOOD = """\
models:
  - model: a
    parameters: {weight: 1.0, density: [1, 0.5]}
  - model: b
    parameters:
      weight:
        - filter: mlp
          value: 1e-1
        - value: 0.5
merge_method: ties
base_model: base
dtype: bfloat16
"""


def test_recognised_by_its_keys():
    assert is_mergekit({"merge_method": "ties"})
    assert is_mergekit({"slices": []})
    assert not is_mergekit({"base": "x", "experts": {}, "method": "ties"})
    assert not is_mergekit({"models": [], "experts": {}})


def test_a_configuration_is_a_recipe(folder):
    recipe = read(folder, GOOD)
    assert recipe.base == str(folder / "base")
    assert {n: e.path for n, e in recipe.experts.items()} == {
        "a": str(folder / "a"),
        "b": str(folder / "b"),
    }
    assert recipe.dtype == "bfloat16"
    assert recipe.script is not None
    assert recipe.script.stated["merge_method"] == "ties"


def test_every_fault_at_once(folder):
    found = faults_of(
        folder,
        """\
models:
  - model: a
    parametrs: {weight: 1}
  - model: ./nowhere
    parameters: {weight: [1, {value: 2}], wieght: 3}
merge_method: ties
base_model: base
dtype: float8
normalize: true
out_dtype: int64
""",
    )
    assert found == sorted(found, key=lambda fault: fault[0])
    assert sorted(found) == [
        (2, "missing_parameter"),
        (3, "unknown_key"),
        (4, "missing_parameter"),
        (4, "no_file"),
        (5, "setting"),
        (5, "unknown_parameter"),
        (8, "dtype"),
        (9, "unknown_key"),
        (10, "dtype"),
    ]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("models: [a]\nslices: []\nmerge_method: linear\n", "missing_parameter"),
        ("merge_method: linear\n", "models_slices_modules"),
        ("models: [{model: a}]\n", "missing_key"),
        ("models: [{model: a}]\nmerge_method: tise\nbase_model: base\n", "unknown_method"),
        ("models: [{parameters: {t: 1}}]\nmerge_method: slerp\nbase_model: base\n", "missing_key"),
        ("models: [a, b]\nmerge_method: slerp\nparameters: {t: 0.5}\n", "no_base"),
        ("models: [a, b]\nmerge_method: slerp\nbase_model: a\n", "missing_parameter"),
        (
            "models: [a, b]\nmerge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n",
            "expert_count",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [2, 2]}]}]\nmerge_method: passthrough\n",
            "layer_range",
        ),
        ("slices: [{sources: [{model: a}]}]\nmerge_method: passthrough\n", "missing_key"),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]"
            "}]\nmerge_method: linear\nparameters: {weight: 1}\n",
            "layer_range",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]"
            "}]\nmerge_method: linear\nparameters: {weight: 1}\n",
            "model_twice",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\nmerge_method: ties\n"
            "base_model: base\nparameters: {weight: 1}\n",
            "no_base",
        ),
        ("models: [a+b+c]\nmerge_method: passthrough\n", "model"),
        ("models: [{model: [a]}]\nmerge_method: passthrough\n", "model"),
        ("modules: {text: {}}\nmerge_method: passthrough\n", "models_slices_modules"),
        ("models: 5\nmerge_method: passthrough\n", "not_a_list"),
        ("models: [a]\nmerge_method: passthrough\nparameters: [1]\n", "not_a_mapping"),
    ],
)
def test_faults_by_kind(folder, text, kind):
    assert kind in {k for _, k in faults_of(folder, text)}


def test_an_unknown_key_is_refused_with_the_nearest_name(folder):
    with pytest.raises(RecipeError, match=r"unknown key 'merge_metod'.*'merge_method'"):
        read(folder, GOOD.replace("dtype: bfloat16", "merge_metod: ties"))


def test_what_mergekit_passes_over_is_told(folder):
    recipe = read(
        folder,
        GOOD.replace("{weight: 1.0,", "{weight: 1.0, epsilon: 2,").replace(
            "model: a\n", "model: a\n    layer_range: [0, 2]\n"
        ),
    )
    told = {note.kind: note.subject for note in recipe.script.notes}
    assert told == {
        "parameters_ignored": ("epsilon",),
        "recipe_key_ignored": ("models.0.layer_range",),
    }


def test_an_adapter_on_the_base_needs_no_model_of_its_own(folder):
    text = GOOD.replace("model: b\n", "model: base+lora\n").replace("model: a", "model: a+lora")
    experts = read(folder, text).experts
    assert [(e.path, e.adapter) for e in experts.values()] == [
        (str(folder / "a"), str(folder / "lora")),
        (str(folder / "lora"), None),
    ]
    assert list(experts) == ["a+lora", "base+lora"]


def test_paths_start_at_the_recipe_or_here(folder, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "models" / "c").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    recipe = read(folder, GOOD.replace("model: b\n", "model: models/c\n"))
    assert [e.path for e in recipe.experts.values()] == [str(folder / "a"), "models/c"]


def test_names_of_the_hub_stand_as_they_are(folder):
    recipe = read(folder, GOOD.replace("model: b\n", "model: org/name@main\n"))
    assert recipe.experts["name"].path == "org/name@main"


def test_numbers_that_yaml_takes_for_text_are_numbers(folder):
    from eutectic.recipes.document import Source
    from eutectic.recipes.mergekit_document import Reading, read_setting

    reading = Reading(Source(), [], [])
    assert read_setting(["1e-5", 1], ("t",), reading) == Gradient((1e-5, 1))
    assert read_setting({"filter": "a[b]", "value": "auto"}, ("t",), reading) == (
        Case("*a[[]b]*", "auto"),
    )
    assert not reading.faults


def test_options_of_a_command_that_say_what_is_merged_are_refused(folder):
    (folder / "recipe.yml").write_text(GOOD)
    with pytest.raises(RecipeError, match="'scale' does not fit a mergekit configuration"):
        load_recipe(folder / "recipe.yml", {"scale": 2})
    assert load_recipe(folder / "recipe.yml", {"seed": 3})[0].seed == 3


def test_tokenizers_are_the_policy_of_all_dialects(folder):
    text = """\
tokenizer:
  source: b
  pad_to_multiple_of: 8
  tokens:
    <a>: {source: a}
    <b>: {source: base, force: true}
    <c>: {source: {kind: zero}}
    <d>: {source: {kind: model_token, model: a, token: <e>}}
    <f>: {source: {kind: model_token, model: b, token_id: 3}}
    <g>: {}
chat_template: chatml
"""
    recipe = read(folder, GOOD.replace("filter: mlp", "filter: mlp") + text)
    assert recipe.chat_template == "chatml"
    policy = recipe.vocabulary
    assert (policy.source, policy.pad_to_multiple_of) == ("b", 8)
    told = {
        token: (s if isinstance(s := rule.source, str) else (s.model, s.token, s.row), rule.force)
        for token, rule in policy.tokens.items()
    }
    assert told == {
        "<a>": (("a", None, None), False),
        "<b>": (("base", None, None), True),
        "<c>": ("zero", False),
        "<d>": (("a", "<e>", None), False),
        "<f>": (("b", None, 3), False),
        "<g>": ("mean", False),
    }
    assert read(folder, GOOD + "tokenizer_source: union\n").vocabulary.source == "union"
    assert read(folder, GOOD + "tokenizer_source: base\n").vocabulary.source == "base"
    assert read(folder, GOOD + "tokenizer: {}\n").vocabulary.source == "union"
    assert read(folder, GOOD).vocabulary is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("tokenizer_source: union\ntokenizer: {source: base}\n", "tokenizer"),
        ("tokenizer_source: org/else\n", "unknown_model"),
        ("tokenizer: {sauce: union}\n", "unknown_key"),
        ("tokenizer: {tokens: {<a>: {source: c}}}\n", "unknown_model"),
        ("tokenizer: {tokens: {<a>: {source: {kind: model_token, model: a}}}}\n", "model_token"),
        ("tokenizer: {tokens: {<a>: {force: 3}}}\n", "force"),
        ("tokenizer: {pad_to_multiple_of: 0}\n", "pad_to_multiple_of"),
        ("tokenizer: [union]\n", "not_a_mapping"),
        ("chat_template: 3\n", "chat_template"),
    ],
)
def test_faults_of_tokenizers(folder, text, kind):
    found = faults_of(folder, GOOD + text)
    assert [k for _, k in found] == [kind]
    assert found[0][0] >= 12
