"""Guards what is told of adapters that are odd: scalings, ranks, bases, empty files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import eutectic
from eutectic.errors import RequestError

KEY = "base_model.model.layers.{}.q_proj.lora_{}.weight".format


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.q_proj.weight": torch.randn(8, 6) for i in range(2)}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def adapter(folder: Path, rank: int = 2, layers: int = 2, **config: Any) -> Path:
    folder.mkdir()
    tensors = {KEY(i, "A"): torch.randn(rank, 6) for i in range(layers)}
    tensors |= {KEY(i, "B"): torch.randn(8, rank) for i in range(layers)}
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def notes(base: Path, expert: Path, **more: Any) -> dict[str, Any]:
    made = eutectic.plan(base=base, experts={"a": str(expert)}, method="average", **more)
    return {note.kind: note for note in made.note_records}


def test_scaling_of_zero_is_a_warning(base: Path, tmp_path: Path) -> None:
    told = notes(base, adapter(tmp_path / "a", lora_alpha=0))
    assert told["scaled_by_zero"].level == "warning"
    assert "scaled_by_zero" not in notes(base, adapter(tmp_path / "b"))


def test_ranks_above_what_layers_have(base: Path, tmp_path: Path) -> None:
    expert = adapter(tmp_path / "a", rank=9)
    told = notes(base, expert, adapter={"rank": 7})
    assert told["rank_above_layer"].numbers == {"rank": 9, "side": 6, "count": 2}
    assert told["rank_above_layers"].numbers == {"rank": 7, "side": 6}
    report = eutectic.merge(
        base=base,
        experts={"a": str(expert)},
        method="average",
        adapter={"rank": 7},
        output=tmp_path / "out",
    )
    assert [own["adapter"]["rank"] for own in report.records.values()] == [6, 6]
    told = notes(base, adapter(tmp_path / "b", rank=6), adapter={"rank": 6})
    assert not {"rank_above_layer", "rank_above_layers"} & told.keys()


def test_another_base_by_name_is_a_warning(base: Path, tmp_path: Path) -> None:
    told = notes(base, adapter(tmp_path / "a", base_model_name_or_path="org/Other-7B"))
    assert told["other_base_named"].level == "warning"
    assert "org/Other-7B" in told["other_base_named"].text


def test_more_layers_than_the_base_has_are_of_another_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not have(.|\n)*adapter belongs to another base"):
        notes(base, adapter(tmp_path / "a", layers=3))


def test_a_file_without_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match=r"adapter_model.safetensors: holds no tensors"):
        notes(base, folder)


def test_a_core_of_which_nothing_is_kept_is_told(base: Path, tmp_path: Path) -> None:
    experts = {n: str(adapter(tmp_path / n, rank=1)) for n in ("a", "b")}
    asked: dict[str, Any] = {"base": base, "experts": experts, "method": "core_ties"}
    (note,) = (n for n in eutectic.plan(**asked).note_records if n.kind == "trimmed_away")
    told = {"method": "core_ties", "density": 0.2, "count": 2, "entries": 4, "least": 0.25}
    assert note.numbers == told and note.level == "warning"
    kept = eutectic.plan(**asked, parameters={"density": 0.25}).note_records
    assert "trimmed_away" not in {n.kind for n in kept}
    side_by_side = eutectic.plan(**{**asked, "method": "knots_ties"}).note_records  # 2 x 6 entries
    assert "trimmed_away" not in {n.kind for n in side_by_side}


@pytest.mark.filterwarnings("ignore::eutectic.errors.MergeWarning")
def test_a_merge_that_leaves_no_change_is_told(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", rank=1)
    # Twice the same: the core has one entry, and headers only say that it has at most four.
    asked: dict[str, Any] = {"base": base, "method": "core_ties", "parameters": {"density": 0.3}}
    twice = {"a": str(one), "b": str(one)}
    made = eutectic.merge(**asked, experts=twice, output=tmp_path / "out")
    (note,) = (n for n in made.note_records if n.kind == "vanished")
    assert note.numbers == {"count": 2}
    assert "trimmed_away" not in {n.kind for n in made.note_records}
    other = {"a": str(one), "b": str(adapter(tmp_path / "b", rank=1))}
    kinds = {
        n.kind
        for n in eutectic.merge(
            **{**asked, "parameters": {"density": 0.2}}, experts=other, output=tmp_path / "two"
        ).note_records
    }
    assert "trimmed_away" in kinds and "vanished" not in kinds  # told once
