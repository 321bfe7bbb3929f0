"""Folders give experts their names, dtypes have their usual spellings, near misses are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eutectic
from eutectic.cli.named_words import named_paths, split_recipe
from eutectic.errors import RecipeError, RequestError, nearest
from eutectic.options import dtype_name
from eutectic.recipes.load import check_recipe
from eutectic.words import between, counted, percents
from helpers.cli import invoke
from helpers.folders import make_base, make_expert, save


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = make_base()
    save(tmp_path / "base", base)
    for seed, name in enumerate(("runs/sst2", "runs/mnli", "other/sst2", "alpha=0.3", "last"), 1):
        save(tmp_path / name, make_expert(base, seed))
    return tmp_path


def recipe_of(folder: str) -> dict[str, dict[str, str]]:
    return json.loads(Path(folder, "eutectic.json").read_text())["recipe"]["experts"]


def test_folders_give_experts_their_names(place: Path) -> None:
    common = ("merge", "--base", "base", "-m", "iso_c")
    done = invoke(*common, "runs/sst2", "runs/mnli/", "-w", "mnli=0.5", "-o", "alone")
    assert done.code == 0, done.err
    named = invoke(*common, "sst2=runs/sst2", "mnli=runs/mnli", "-w", "mnli=0.5", "-o", "named")
    assert named.code == 0, named.err
    assert list(recipe_of("alone")) == ["sst2", "mnli"]
    left, right = (load_file(place / name / "model.safetensors") for name in ("alone", "named"))
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
    mixed = invoke(*common, "a=runs/sst2", "last", "alpha=0.3", "-o", "mixed")
    assert mixed.code == 2 and "alpha=0.3" in mixed.err or mixed.code == 0
    assert invoke("plan", "--base", "base", "-m", "iso_c", "runs/sst2", "last").code == 0


def test_two_folders_of_one_name_are_refused(place: Path) -> None:
    refused = invoke("merge", "--base", "base", "-m", "iso_c", "runs/sst2", "other/sst2", "-o", "x")
    assert refused.code == 2
    assert "'sst2' is given twice: runs/sst2 and other/sst2" in refused.err
    assert "NAME=other/sst2" in refused.err
    words = ("runs/sst2", "second=other/sst2")
    assert invoke("merge", "--base", "base", "-m", "iso_c", *words, "-o", "x").code == 0


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a/sst2", "b/mnli/"], ["sst2", "mnli"]),
        (["x=a/sst2", "org/model@v1", "w/part.safetensors"], ["x", "model", "part"]),
        (["my runs/fine tuned"], ["fine-tuned"]),
        (["s3://b/run=3/sst2", "x=s3://b/run=3/mnli", "./lr=1/a"], ["sst2", "x", "a"]),
    ],
)
def test_names_of_paths(words: list[str], names: list[str]) -> None:
    assert list(named_paths(words, "expert")) == names


def test_the_folder_where_one_is_has_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / "runs" / "sst2")
    assert named_paths(["."], "expert") == {"sst2": "."}
    assert named_paths(["../mnli"], "expert") == {"mnli": "../mnli"}


def test_what_is_a_recipe_and_what_is_not(place: Path) -> None:
    (place / "study").write_text("base: x")
    for words in (["runs/sst2"], ["a=b"], ["org/model"], ["alpha=0.3"], ["m.safetensors"]):
        assert split_recipe(words) == (None, words)
    for words in (["recipe.yaml", "a=b"], ["study"], ["./nowhere"], ["dir/x.yml"]):
        assert split_recipe(words) == (Path(words[0]), words[1:])


@pytest.mark.parametrize(
    ("typed", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("float64", "float64"),
     ("BF16", "bfloat16"), ("half", "float16"), (torch.bfloat16, "bfloat16")],
)  # fmt: skip
def test_dtypes_have_their_usual_spellings(typed: object, dtype: str) -> None:
    assert dtype_name(typed) == dtype
    recipe = {"base": "org/b", "experts": {"a": "org/a"}, "method": "iso_c", "dtype": typed}
    assert check_recipe(recipe).dtype == dtype


def test_short_dtypes_give_the_bytes_of_long_ones(place: Path) -> None:
    for dtype in ("bf16", "bfloat16"):
        words = ("-m", "average", "runs/sst2", "last", "--set", f"dtype={dtype}", "-o", dtype)
        assert invoke("merge", "--base", "base", *words).code == 0
    short, long = (place / name / "model.safetensors" for name in ("bf16", "bfloat16"))
    assert short.read_bytes() == long.read_bytes()
    assert {t.dtype for t in load_file(short).values()} >= {torch.bfloat16}
    words = ("extract", "--base", "base", "runs/sst2", "--rank", 2, "--others", "drop")
    assert invoke(*words, "--dtype", "fp16", "-o", "adapter").code == 0
    adapter = load_file(place / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float16}
    with pytest.raises(RecipeError, match="dtype"):
        eutectic.merge(base="base", experts={"a": "last"}, method="average", dtype="int4",
                       output="never")  # fmt: skip
    mergekit = "merge_method: linear\ndtype: fp16\nmodels:\n  - {model: runs/sst2, parameters: "
    (place / "kit.yml").write_text(mergekit + "{weight: 1}}\n  - {model: last, parameters: "
                                   "{weight: 1}}\n")  # fmt: skip
    done = invoke("merge", "kit.yml", "-o", "kit")
    assert done.code == 0, done.err
    assert {t.dtype for t in load_file(place / "kit" / "model.safetensors").values()} >= {
        torch.float16
    }


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("merge", "--alpha", "1"), "Did you mean --scale?"),
        (("merge", "--alpha=1"), "Did you mean --scale?"),
        (("merge", "--methd", "x"), "Did you mean --method?"),
        (("merge", "--out", "x"), "Did you mean --output?"),
        (("merge", "--overwrite"), "Did you mean --restart?"),
        (("merge", "--base-model", "x"), "Did you mean --base?"),
        (("merge", "--density", "0.2"), "--param density=VALUE"),
        (("merge", "--dtype", "bf16"), "--set dtype=VALUE"),
        (("tune", "--workers", "2"), "Did you mean --threads?"),
        (("evaluate", "--batch_size", "2"), "Did you mean --batch-size?"),
        (("collect", "--max-samples", "3"), "Did you mean --max-examples?"),
        (("route", "--lora-rank", "3"), "Did you mean --rank?"),
        (("calibrate", "--dataset", "x"), "Did you mean --data?"),
        (("check", "--zzz"), "check --help lists all"),
    ],
)
def test_a_near_miss_of_an_option_is_named(words: tuple[str, ...], answer: str) -> None:
    refused = invoke(*words)
    assert refused.code == 2
    said = " ".join(refused.err.replace("│", " ").split())
    assert f"No such option: {words[1].partition('=')[0]}" in said
    assert answer in said


def test_synonyms_come_before_spelling() -> None:
    assert nearest("alpha", ["alphabet", "scale"]) == "scale"
    assert nearest("alpha", ["alphabet"]) == "alphabet"
    with pytest.raises(RecipeError, match="unknown key 'alpha'. Did you mean 'scale'"):
        check_recipe({"base": "org/b", "experts": {"a": "org/a"}, "method": "iso_c", "alpha": 1})


def test_faults_name_the_options_that_were_typed(place: Path) -> None:
    common = ("tune", "--base", "base", "-m", "iso_c", "runs/sst2", "last")
    refused = invoke(*common, "--search", "fo", "--points", 2)
    assert refused.code == 2 and "--search: should be" in refused.err
    assert "--points: should be greater" in refused.err and "scale." not in refused.err
    closed = invoke(*common, "--search", "gram", "--points", 5)
    assert "--search gram is a closed form and takes no --points" in closed.err
    closed = invoke(*common, "--search", "auto", "--tasks", "tasks.yaml")
    assert closed.code == 2 and "--search auto is a closed form and takes no --tasks" in closed.err
    lacking = invoke(*common, "--search", "validation")
    assert "--search validation needs --tasks" in lacking.err
    bare = invoke(*common, "--search", "auto")
    said = " ".join(bare.err.split())
    assert "--search auto needs statistics of every expert, and sst2, last have none." in said
    assert "--search divergence --tasks tasks.yaml, or --search validation with labels." in said
    bare = invoke("merge", *common[1:], "--scale", "auto", "-o", "x")
    assert bare.code == 2 and "--scale auto needs statistics" in bare.err
    wrong = invoke(
        "merge", "--base", "base", "-m", "ties", "-p", "density=3", "-w", "last=x",
        "--set", "dtype=int4", "last", "runs/sst2", "-o", "x",
    )  # fmt: skip
    assert "--param density" in wrong.err and "--weight last" in wrong.err
    assert "--set dtype" in wrong.err
    named = invoke("merge", "--base", "base", "-m", "iso_c", "last", "base", "-o", "x")
    assert "[NAME=]EXPERT: an expert cannot be called 'base'" in named.err
    assert "--set experts" not in named.err


def test_a_folder_to_evaluate_that_is_not_there_is_named_once(place: Path) -> None:
    (place / "tasks.yaml").write_text("tasks: {a: {kind: language-model, data: a.jsonl}}\n")
    (place / "a.jsonl").write_text('{"text": "w1"}\n')
    common = ("--tasks", "tasks.yaml", "--base", "base", "-e", "a=last")
    assert "error: nowhere: no such folder." in invoke("evaluate", "nowhere/", *common).err
    assert "error: nowhere: no such folder (m)." in invoke("evaluate", "m=nowhere", *common).err


def test_a_recipes_own_faults_keep_their_lines(place: Path) -> None:
    text = "base: ./base\nexperts: {a: ./last}\nmethod: iso_c\nscale: {search: fo}\n"
    (place / "recipe.yaml").write_text(text)
    refused = invoke("merge", "recipe.yaml", "-o", "x")
    assert "recipe recipe.yaml" in refused.err and "line 4: scale.search" in refused.err


def test_counts_have_their_nouns_and_shares_add_up() -> None:
    assert counted(1, "layer") == "1 layer" and counted(0, "layer") == "0 layers"
    assert between(8, 8) == "8" and between(4, 64) == "4 to 64"
    assert percents([0.996, 0.004, 0]) == ["99.6 %", "0.4 %", "0 %"]
    assert percents([1, 0, 0]) == ["100 %", "0 %", "0 %"]
    assert percents([0.9999, 0.0001]) == ["more than 99.9 %", "less than 0.1 %"]
    for parts in ([0.905, 0.05, 0.045], [1 / 3] * 3, [0.5, 0.495, 0.005]):
        shown = [float(text.removesuffix(" %")) for text in percents(parts)]
        assert sum(shown) == pytest.approx(100, abs=1e-9)
        assert all(abs(s - 100 * p) < 1 for s, p in zip(shown, parts, strict=True))


def test_an_expert_that_is_no_pair_and_no_path_is_refused() -> None:
    with pytest.raises(RequestError, match="form name=value"):
        named_paths(["=x"], "expert")


def test_a_folder_with_a_recipe_is_none(place: Path) -> None:
    (place / "study").mkdir()
    (place / "study" / "recipe.yaml").write_text("base: x")
    refused = invoke("merge", "study", "-o", "x")
    assert refused.code == 2 and "Name the file: study/recipe.yaml" in refused.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("evaluate", "last", "-t", "t.yaml", "--split", "all"), "--split is one of proxy"),
        (("evaluate", "last", "-t", "t.yaml", "--dtype", "int4"), "--dtype is one of float32"),
        (("calibrate", "base", "last", "-d", "last=d.jsonl", "-o", "x", "--sites", "x"),
         "--sites are matrices"),
    ],
)  # fmt: skip
def test_values_that_are_none_name_their_options(
    place: Path, words: tuple[str, ...], said: str
) -> None:
    (place / "d.jsonl").write_text('{"text": "a"}')
    (place / "t.yaml").write_text("tasks: {last: {kind: language-model, data: d.jsonl}}")
    refused = invoke(*words)
    assert refused.code == 2 and said in refused.err
