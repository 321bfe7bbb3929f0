"""A recipe and a file of tasks from folders.

Guards: what is written is read again by those who read such files and plans as it stands; the base
is found by its name, by adapters, or as what all others are nearest to, and not guessed otherwise;
nothing that is there is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from eutectic.drafting import draft
from eutectic.drafting.data import columns_for, look
from eutectic.drafting.models import expert_names, find_models
from eutectic.errors import RequestError
from eutectic.evaluation.task_files import load_tasks
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import load_recipe
from helpers.cli import invoke
from helpers.folders import make_base, make_expert, save

BASE = make_base()
CLASSES: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "neg", "1": "pos"},
}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save(tmp_path / "base", BASE)
    for seed, name in enumerate(("sst2", "mnli"), 1):
        save(tmp_path / "runs" / name, make_expert(BASE, seed), CLASSES)
    return tmp_path


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_written_plans_as_it_stands(world: Path) -> None:
    jsonl(world / "data" / "sst2" / "test.jsonl", {"sentence": "a", "label": 1})
    jsonl(world / "data" / "sst2" / "dev.jsonl", {"sentence": "b", "label": 1})
    jsonl(world / "data" / "sst2" / "train.jsonl", {"sentence": "c", "label": 0})
    jsonl(world / "data" / "mnli.jsonl", {"premise": "a", "hypothesis": "b", "label": 0})
    data = [world / "data" / "mnli.jsonl", *sorted((world / "data" / "sst2").iterdir())]
    words = ["init", world / "base", world / "runs", "-o", world / "study"]
    told = invoke(*words, *(w for path in data for w in ("--data", path)))
    assert told.code == 0, told.err
    assert "base (by its name)" in told.out and "to fill in" not in told.out
    recipe, source = load_recipe(world / "study" / "recipe.yaml")
    assert list(recipe.experts) == ["mnli", "sst2"] and recipe.method == "iso_c"
    with open_inputs(recipe, source) as inputs:
        assert make_plan(recipe, inputs, source).merged
    text = (world / "study" / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["base"] == "../base"  # it may be moved with what it names
    tasks = load_tasks(world / "study" / "tasks.yaml")
    assert tasks["sst2"].kind == "text-classification"
    assert tasks["sst2"].columns.text == "sentence"
    assert {s: Path(p.path).name for s, p in tasks["sst2"].data.items()} == {
        "proxy": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl",
    }  # fmt: skip
    assert tasks["mnli"].kind == "pair-classification"  # by its columns
    assert (tasks["mnli"].columns.text, tasks["mnli"].columns.text_pair) == (
        "premise",
        "hypothesis",
    )
    assert {s: p.share for s, p in tasks["mnli"].data.items()} == {
        "proxy": 0.1, "validation": 0.3, "test": 0.6,
    }  # fmt: skip
    assert "# its classes: neg, pos" in (world / "study" / "tasks.yaml").read_text()


def test_every_commented_key_is_one(world: Path) -> None:
    """Comments that are uncommented read."""
    found = draft([world / "base", world / "runs"], world)
    lines = found.recipe.splitlines()
    keys = [line.removeprefix("# ") for line in lines if line.startswith("# ") and ":" in line]
    tried = [k for k in keys if k.split(":")[0] in ("method", "parameters", "dtype", "heads")]
    assert len(tried) >= 4
    kept = [line for line in lines if not line.startswith(("method", "#"))]
    (world / "r.yaml").write_text("\n".join([*kept, *tried]))
    recipe, _ = load_recipe(world / "r.yaml")
    assert recipe.method == "ties" and recipe.parameters == {"density": 0.2}
    scales = [k for k in keys if k.startswith("scale: {")]
    (world / "tasks.yaml").write_text("tasks: {}")
    for scale in scales:
        (world / "r.yaml").write_text("\n".join([*kept, *tried, scale]))
        assert load_recipe(world / "r.yaml")[0].scale is not None
    assert len(scales) == 2


def test_without_data_the_tasks_say_what_to_fill_in(world: Path) -> None:
    found = draft([world / "base", world / "runs"], world)
    assert [line for line in found.open if "data" in line] == [
        "tasks.yaml: mnli: data", "tasks.yaml: sst2: data",
    ]  # fmt: skip
    (world / "tasks.yaml").write_text(found.tasks)
    with pytest.raises(RequestError) as error:  # the line to edit is named
        load_tasks(world / "tasks.yaml")
    assert "sst2/test.jsonl" in str(error.value) and "line" in str(error.value)


def test_the_base_is_what_all_others_are_nearest_to(world: Path) -> None:
    save(world / "other-name", BASE)
    runs = [world / "runs" / "mnli", world / "other-name", world / "runs" / "sst2"]
    found = draft(runs, world)
    assert "base: ./other-name" in found.recipe or "base: other-name" in found.recipe
    assert "nearest to all others" in found.found[0]
    recipe = yaml.safe_load(found.recipe)
    assert list(recipe["experts"]) == ["mnli", "sst2"]


def test_the_base_is_not_guessed_of_two_or_of_strangers(world: Path) -> None:
    for names in (["sst2", "mnli"], ["sst2", "mnli", "third"]):
        save(world / "runs" / "third", make_expert(BASE, 9))
        found = draft([world / "runs" / name for name in names], world)
        assert "EDIT: the model that all experts started from" in found.recipe
        assert found.open[0].startswith("recipe.yaml: base")
        assert list(yaml.safe_load(found.recipe)["experts"]) == names


def test_adapters_name_their_base(world: Path) -> None:
    for name in ("a", "b"):
        folder = world / name / "checkpoint-500"
        folder.mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/m"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({"x.lora_A.weight": torch.ones(1, 2)}, folder / "adapter_model.safetensors")
    found = draft([world / "a", world / "b"], world)
    recipe = yaml.safe_load(found.recipe)
    assert recipe["base"] == "org/m" and list(recipe["experts"]) == ["a", "b"]
    assert "a: LoRA adapter" in found.found
    assert yaml.safe_load(found.tasks)["tasks"]["a"]["kind"] == "language-model"
    local = draft([world / "a", world / "b", world / "base"], world)
    assert yaml.safe_load(local.recipe)["base"] == "./base" or "base" in local.recipe


def test_names_of_experts() -> None:
    from eutectic.drafting.models import Found

    def named(*paths: str) -> list[str]:
        return expert_names([Found(path, Path(path), {}, None) for path in paths])

    assert named("/x/sst2/checkpoint-500", "/x/mnli/final") == ["sst2", "mnli"]
    assert named("/x/a/run 1", "/x/b/run 1") == ["run-1", "b-run-1"]
    assert named("/x/base") == ["base-2"]


def test_statistics_beside_an_expert_are_named(world: Path) -> None:
    from eutectic.statistics.statistics_file import StatisticsFile

    layer = {"count": 1, "sample_count": 1, "inputs": "l", "same_as": "l", "shape": [1, 2]}
    record = {
        "format": 1, "data": {"rows": 1}, "checkpoint": {"fingerprint": "x"}, "settings": {},
        "layers": {"l": {**layer, "parameter": [2, 2]}},
    }  # fmt: skip
    file = StatisticsFile(record, {"l/gram": torch.eye(2)})
    file.save(world / "runs" / "sst2.stats.safetensors")
    (world / "runs" / "mnli.stats.safetensors").write_text("not one")
    experts = yaml.safe_load(draft([world / "base", world / "runs"], world).recipe)["experts"]
    assert isinstance(experts["mnli"], str)
    assert experts["sst2"]["statistics"].endswith("runs/sst2.stats.safetensors")


def test_a_folder_of_images_with_splits(world: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = world / "pets" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (2, 2)).save(folder / "1.png")
    config = {"architectures": ["ViTForImageClassification"]}
    save(world / "runs" / "pets-vit", make_expert(BASE, 3), config)
    found = draft([world / "base", world / "runs" / "pets-vit", world / "pets"], world)
    task = yaml.safe_load(found.tasks)["tasks"]["pets-vit"]
    assert task["kind"] == "image-classification"
    assert task["data"]["test"]["subset"] == "test" and task["data"]["proxy"]["subset"] == "train"
    (world / "tasks.yaml").write_text(found.tasks)
    assert load_tasks(world / "tasks.yaml")["pets-vit"].data["test"].subset == "test"


def test_a_split_is_told_by_the_folder_too(tmp_path: Path) -> None:
    for path, split in {
        "proxy/sst2.jsonl": "proxy", "tasks/sst2.jsonl": None, "sst2.dev.jsonl": "validation",
        "test/sst2.train.jsonl": "proxy", "sst2/eval.jsonl": "test",
    }.items():  # fmt: skip
        assert look(jsonl(tmp_path / path, {"text": "a"})).split == split, path


@pytest.mark.parametrize(
    ("kind", "present", "renamed", "lacking"),
    [
        ("text-classification", ["text", "label"], {}, []),
        ("text-classification", ["review", "label", "id"], {"text": "review"}, []),
        ("text-classification", ["text"], {}, ["label"]),
        ("pair-classification", ["sentence1", "sentence2", "label"],
         {"text": "sentence1", "text_pair": "sentence2"}, []),
        ("pair-classification", ["text", "label"], {}, ["text_pair"]),
        ("sequence-to-sequence", ["input", "output"], {"source": "input", "target": "output"}, []),
        ("language-model", ["content"], {"text": "content"}, []),
    ],
)  # fmt: skip
def test_columns(kind: Any, present: list[str], renamed: Any, lacking: list[str]) -> None:
    assert columns_for(kind, present) == (renamed, lacking)


def test_nothing_is_replaced_and_what_is_no_model_is_told(world: Path) -> None:
    words = ["init", world / "base", world / "runs", "-o", world / "study"]
    assert invoke(*words).code == 0
    before = (world / "study" / "recipe.yaml").read_bytes()
    again = invoke(*words)
    assert again.code == 2 and "is not replaced" in again.err
    assert (world / "study" / "recipe.yaml").read_bytes() == before
    (world / "empty").mkdir()
    refused = invoke("init", world / "empty", world / "nowhere", "-o", world / "two")
    assert refused.code == 2 and "empty" in refused.err and "nowhere" in refused.err
    assert not (world / "two").exists()
    refused = invoke("init", world / "base", "-o", world / "two")
    assert refused.code == 2 and "no expert was found" in refused.err


def test_as_json(world: Path) -> None:
    told = invoke("init", world / "base", world / "runs", "-o", world / "study", "--json")
    record = json.loads(told.out)
    assert Path(record["written"]["recipe.yaml"]).is_file() and record["open"]


def test_a_folder_of_models_beside_files_of_heads(world: Path) -> None:
    for name in ("a", "b"):
        save_file({"weight": torch.ones(2, 2)}, world / "runs" / f"{name}.head.safetensors")
    assert [Path(one.typed).name for one in find_models([str(world / "runs")])] == ["mnli", "sst2"]


def of_splits(tasks: str) -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(tasks)["tasks"]
    return {
        name: {s: Path(p["path"] if isinstance(p, dict) else p).as_posix() for s, p in data.items()}
        for name, task in found.items()
        for data in [task["data"]]
    }


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
@pytest.mark.parametrize("how", ["found", "positional", "option"])
def test_a_folder_of_data_of_each_task(world: Path, how: str, ending: str) -> None:
    where = world / ("data" if how == "found" else "elsewhere/rows")
    for name in ("sst2", "mnli"):
        for split in ("proxy", "validation", "test"):
            file = jsonl(where / name / f"{split}.{ending}", {"text": "a", "label": 1})
            assert file.is_file()
        (where / name / "README.txt").write_text("no rows")
    words = ["init", world / "base", world / "runs", "-o", world / "study"]
    words += {"found": [], "positional": [where], "option": ["--data", where]}[how]
    told = invoke(*words)
    assert told.code == 0, told.err
    found = of_splits((world / "study" / "tasks.yaml").read_text())
    for name in ("sst2", "mnli"):
        for split in ("proxy", "validation", "test"):
            assert found[name][split].endswith(f"/{name}/{split}.{ending}")
    load_tasks(world / "study" / "tasks.yaml")


def test_a_folder_of_data_may_hold_other_tasks(world: Path) -> None:
    for name in ("sst2", "mnli", "cola", "rte"):
        jsonl(world / "rows" / name / "test.jsonl", {"text": "a", "label": 1})
    found = draft([world / "base", world / "runs" / "sst2", world / "rows"], world)
    assert of_splits(found.tasks)["sst2"]["test"].endswith("sst2/test.jsonl")
    with_two = draft([world / "base", world / "runs", world / "rows"], world)
    (stray,) = [line for line in with_two.open if "no expert" in line]
    assert "cola" in stray and "rte" in stray and "sst2" not in stray
    (world / "void").mkdir()
    nothing = draft([world / "base", world / "runs"], world, data=[world / "void"])
    assert any("void: holds no file of rows" in line for line in nothing.open)


def test_models_of_pictures_and_texts_are_zero_shot(world: Path) -> None:
    for task in ("cars", "dtd"):
        for split in ("validation", "test"):
            for label in ("red", "blue"):
                folder = world / "photos" / task / split / label
                folder.mkdir(parents=True)
                Image.new("RGB", (2, 2)).save(folder / "1.png")
    config = {"architectures": ["CLIPModel"], "text_config": {}, "vision_config": {}}
    for name in ("cars", "dtd"):
        save(world / "clips" / name, make_expert(BASE, 3), config)
    found = draft([world / "base", world / "clips", world / "photos"], world)
    tasks = yaml.safe_load(found.tasks)["tasks"]
    assert {task["kind"] for task in tasks.values()} == {"zero-shot-image-classification"}
    assert tasks["cars"]["data"]["test"] == {"path": "./photos/cars", "subset": "test"}
    assert not any("kind" in line for line in found.open)
    (world / "tasks.yaml").write_text(found.tasks)
    load_tasks(world / "tasks.yaml")
    tower = {"architectures": ["CLIPVisionModel"], "image_size": 8, "num_channels": 3}
    save(world / "towers" / "a", make_expert(BASE, 3), tower)
    save(world / "towers" / "b", make_expert(BASE, 4), tower)
    bare = draft([world / "base", world / "towers"], world)
    kinds = {task["kind"] for task in yaml.safe_load(bare.tasks)["tasks"].values()}
    assert kinds == {"image-classification"}
    assert "tasks.yaml: a: kind" in bare.open  # its head is to be named


def test_steps_beside_other_models_keep_their_names(world: Path) -> None:
    save(world / "runs" / "last", make_expert(BASE, 5), CLASSES)
    experts = yaml.safe_load(draft([world / "base", world / "runs"], world).recipe)["experts"]
    assert list(experts) == ["last", "mnli", "sst2"]
    for name in ("checkpoint-500", "checkpoint-900"):
        save(world / "steps" / name, make_expert(BASE, 6), CLASSES)
    steps = [world / "steps" / name for name in ("checkpoint-500", "checkpoint-900")]
    of_steps = yaml.safe_load(draft([world / "base", *steps], world).recipe)["experts"]
    assert list(of_steps) == ["checkpoint-500", "checkpoint-900"]


@pytest.mark.parametrize(
    ("present", "renamed", "lacking"),
    [
        (["messages"], {}, []),
        (["conversations", "id"], {"messages": "conversations"}, []),
        (["prompt", "completion"], {}, []),
        (["instruction", "output"], {"prompt": "instruction", "completion": "output"}, []),
        (["text", "messages"], {}, []),
    ],
)
def test_forms_of_language_models(present: list[str], renamed: Any, lacking: list[str]) -> None:
    assert columns_for("language-model", present) == (renamed, lacking)


def test_rows_that_one_word_of_an_experts_name_is_called_by(tmp_path: Path) -> None:
    """`cook.jsonl` is of `lora-cook`; a word that several experts share tells none of them."""
    save(tmp_path / "base", BASE)
    for seed, name in enumerate(("lora-cook", "lora-chess"), 1):
        save(tmp_path / name, make_expert(BASE, seed), CLASSES)
    row = {"text": "a", "label": 1}
    jsonl(tmp_path / "data" / "cook.jsonl", row)
    jsonl(tmp_path / "data" / "chess" / "test.jsonl", row)
    jsonl(tmp_path / "data" / "lora.jsonl", row)
    drawn = draft([tmp_path / n for n in ("base", "lora-cook", "lora-chess")], tmp_path)
    (tmp_path / "tasks.yaml").write_text(drawn.tasks)
    held = {n: task.data for n, task in load_tasks(tmp_path / "tasks.yaml").items()}
    assert {Path(split.path).name for split in held["lora-cook"].values()} == {"cook.jsonl"}
    assert Path(held["lora-chess"]["test"].path).parts[-2:] == ("chess", "test.jsonl")
    assert "data/lora.jsonl" not in drawn.tasks
