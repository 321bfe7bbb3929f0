"""What a merge says of itself: shares of the numbers, methods that nothing takes, named bases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import eutectic
from eutectic.planning.inputs import in_memory_inputs, open_inputs
from eutectic.planning.notes import named_bases
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import check_recipe
from helpers.cli import invoke
from helpers.folders import save
from helpers.merging import merge_files

Tensors = dict[str, Tensor]

BASE: Tensors = {
    "embed_tokens.weight": torch.zeros(10, 4),
    "layers.0.proj.weight": torch.zeros(5, 4),
    "layers.0.norm.weight": torch.zeros(4),
    "score.weight": torch.zeros(2, 4),
    "position_ids": torch.arange(7),
}
BODY = 10 * 4 + 5 * 4 + 4


def tuned(**more: Tensor) -> Tensors:
    own = {n: w + 1 if w.is_floating_point() else w for n, w in BASE.items()}
    return own | {name.replace("_weight", ".weight"): w for name, w in more.items()}


def planned(base: Tensors, *experts: Tensors, **keys: Any) -> Plan:
    named = {f"e{i}": tensors for i, tensors in enumerate(experts)}
    inputs = in_memory_inputs(base, named, {})
    values = {"base": "memory", "experts": dict.fromkeys(named, "memory"), "method": "average"}
    return make_plan(check_recipe({**values, **keys}), inputs)


def shares(*experts: Tensors, base: Tensors = BASE, **keys: Any) -> tuple[float, ...]:
    """Return merged, kept and left of all experts as counts."""
    record = planned(base, *experts, **keys).shares.record
    return tuple(round(record[part] * record["numbers"]) for part in ("merged", "kept", "left"))


HEAD = torch.ones(3, 4)
COPY_TABLE: dict[str, Any] = {"tensors": [{"match": "embed*", "treatment": "copy"}]}


def test_all_is_merged_where_all_meets() -> None:
    assert shares(tuned()) == (BODY + 8, 0, 0)
    assert planned(BASE, tuned()).shares.record["base_alone"] == 0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (2 * BODY, 8 + 12, 0)),
        ({"heads": "base"}, (2 * BODY, 0, 8 + 12)),
        ({"heads": "drop"}, (2 * BODY, 0, 8 + 12)),
        (COPY_TABLE, (2 * BODY - 80, 8 + 12, 80)),
    ],
)
def test_heads_are_kept_or_left_and_rules_leave(keys: Any, expected: tuple[int, ...]) -> None:
    assert shares(tuned(), tuned(score_weight=HEAD), **keys) == expected
    notes = planned(BASE, tuned(), tuned(score_weight=HEAD), **keys).notes
    left = {n.numbers["expert"]: n for n in notes if n.kind == "left_alone"}
    assert bool(left) == bool(expected[2])
    if keys == COPY_TABLE:
        assert left["e0"].subject == ("embed_tokens.weight",)
        assert left["e0"].numbers["share"] == pytest.approx(40 / (BODY + 8))
        assert "'e0': 56 % of its numbers are neither merged nor kept" in left["e0"].text


def test_copies_buffers_and_what_meets_nothing() -> None:
    table = {"lm_head.weight": torch.ones(10, 4)}
    buffers = {"rotary_emb.inv_freq": torch.ones(9)}
    assert shares(tuned() | table | buffers) == (BODY + 8, 0, 0)
    assert not planned(BASE, tuned() | table | buffers).heads
    own = {n.replace("proj", "map"): w for n, w in tuned().items()}
    # Kept beside the model, but not by a rule.
    keys = {"unmatched": "leave", "missing": "base"}
    assert shares(own, **keys) == (BODY + 8 - 20, 0, 20)


def test_a_tower_that_no_expert_has_is_told_with_its_share() -> None:
    base = BASE | {"visual.proj.weight": torch.zeros(8, 9)}
    made = planned(base, tuned(), tuned(), missing="base")
    record = made.shares.record
    assert record["left"] == 0 and record["base_alone"] == pytest.approx(72 / (BODY + 8 + 7 + 72))
    (note,) = (n for n in made.notes if n.kind == "copied")
    assert note.text.endswith("visual.proj.weight; 48 % of the base's numbers")
    lacking = {n: w for n, w in tuned().items() if n != "embed_tokens.weight"}
    (note,) = (
        n for n in planned(BASE, tuned(), lacking, missing="base").notes if n.kind == "expert_lacks"
    )
    assert note.text.endswith("embed_tokens.weight; 51 % of the base's numbers")


def adapter(folder: Path, base_name: str | None, **full: Tensor) -> Path:
    folder.mkdir(parents=True)
    at = "base_model.model.layers.0.proj"
    factors = {f"{at}.lora_A.weight": torch.ones(2, 4), f"{at}.lora_B.weight": torch.ones(5, 2)}
    saved = {f"base_model.model.{n.replace('_w', '.w')}": w for n, w in full.items()}
    save_file({**factors, **saved}, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": base_name}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def test_of_an_adapter_the_numbers_on_which_it_acts_count(tmp_path: Path) -> None:
    own = adapter(tmp_path / "a", None, score_weight=HEAD)
    values = {"base": save(tmp_path / "base", BASE), "experts": {"a": own}, "method": "average"}
    recipe = check_recipe(values)
    with open_inputs(recipe) as inputs:
        record = make_plan(recipe, inputs).shares.record
    assert record["experts"]["a"] == {
        "numbers": 32, "merged": 20 / 32, "kept": 12 / 32, "left": 0.0
    }  # fmt: skip


def test_shares_stand_in_report_card_provenance_and_answers(tmp_path: Path) -> None:
    experts = {"a": tuned(), "b": tuned(score_weight=HEAD)}
    _, report = merge_files(tmp_path, BASE, experts, method="average", **COPY_TABLE)
    merged, kept, left = 2 * BODY - 80, 20, 80
    whole = merged + kept + left
    assert report.shares["merged"] == pytest.approx(merged / whole)
    said = f"of the experts' {whole} numbers: 32 % merged, 14 % kept as heads, 54 % left"
    assert said in (tmp_path / "merged/README.md").read_text()
    provenance = json.loads((tmp_path / "merged/eutectic.json").read_text())
    assert provenance["shares"] == report.shares
    words = ["--base", tmp_path / "base", "-m", "average", "--set"]
    words += ["tensors=[{match: 'embed*', treatment: copy}]"]
    words += [f"{name}={tmp_path / name}" for name in experts]
    assert said in invoke("plan", *words).out
    assert json.loads(invoke("plan", *words, "--json").out)["shares"] == report.shares
    assert said in invoke("merge", "-o", tmp_path / "new", *words).out
    answer = invoke("merge", "-o", tmp_path / "json", *words, "--json")
    assert json.loads(answer.out)["shares"] == report.shares and not answer.err


def test_a_method_that_no_tensor_takes_is_a_warning_and_not_named_as_the_merge(
    tmp_path: Path,
) -> None:
    base = {"stem.weight": torch.zeros(4, 3, 2, 2), "stem.bias": torch.zeros(4)}
    experts = {"a": {n: w + 1 for n, w in base.items()}}
    _, report = merge_files(tmp_path, base, experts, method="iso_c")
    (note,) = (n for n in report.note_records if n.kind == "untaken")
    assert note.level == "warning" and report.merged_by == {"average": 2}
    card = (tmp_path / "merged/README.md").read_text()
    assert "by `average` (asked for: `iso_c`, which no tensor takes) with scale" in card
    words = ["--base", tmp_path / "base", "-m", "iso_c", f"a={tmp_path / 'a'}"]
    for verb in (["plan"], ["plan", "--json"], ["merge", "-o", tmp_path / "new"]):
        answer = invoke(*verb, *words)
        assert answer.code == 0
        assert "warning: no tensor takes iso_c" in answer.err and "by average (2)" in answer.err
    assert "iso_c (no tensor takes it)" in answer.out
    _, report = merge_files(tmp_path / "plain", base, experts, method="average")
    assert not [n for n in report.note_records if n.kind == "untaken"]


@pytest.mark.parametrize(
    ("stated", "config", "told"),
    [
        (None, {}, False),
        ("somewhere/else/base", {}, False),
        ("org/Base", {}, False),
        ("org/llama-3", {"_name_or_path": "other/Llama-3"}, False),
        ("org/llama-3", {}, True),
        ("org/llama-3", {"_name_or_path": "org/llama-2"}, True),
        ("C:\\models\\base", {}, False),
    ],
)
def test_an_adapter_of_another_base_by_name_is_told(
    stated: str | None, config: dict[str, str], told: bool, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", BASE, {"model_type": "toy", **config})
    values = {"base": base, "experts": {"a": adapter(tmp_path / "a", stated)}, "method": "average"}
    recipe = check_recipe(values)
    with open_inputs(recipe) as inputs:
        notes = named_bases(recipe, inputs)
    assert [note.level for note in notes] == (["warning"] if told else [])
    if told:
        report = eutectic.merge(**values, output=tmp_path / "out")
        assert any(f"adapter 'a' says that it was trained on '{stated}'" in n for n in report.notes)


def test_an_adapter_of_a_base_in_the_hubs_cache(tmp_path: Path) -> None:
    place = tmp_path / "models--org--llama-3" / "snapshots" / "0123"
    own = adapter(tmp_path / "a", "org/llama-3")
    recipe = check_recipe({"base": save(place, BASE), "experts": {"a": own}, "method": "average"})
    with open_inputs(recipe) as inputs:
        assert named_bases(recipe, inputs) == []
