"""Guards which table of a training script's file counts as the model, and that no guess is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.checkpoint.index import open_index
from eutectic.errors import CheckpointError
from helpers.folders import load

WEIGHTS = {"layer.weight": torch.ones(3, 4), "layer.bias": torch.zeros(3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1}]}
EMA = {name: w + 1 for name, w in WEIGHTS.items()}


def put(folder: Path, content: Any, name: str = "ckpt.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / name)
    return folder / name


def nano_gpt(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What nanoGPT's train.py saves; its best loss is a tensor."""
    return {
        "model": weights,
        "optimizer": OPTIMIZER,
        "model_args": {"n_layer": 1},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"device": "cpu"},
    }


READ = {
    "nanoGPT": nano_gpt(WEIGHTS),
    "Lightning": {
        "epoch": 1, "state_dict": WEIGHTS, "optimizer_states": [OPTIMIZER], "lr_schedulers": [],
    },
    "two levels": {"module": {"state_dict": WEIGHTS}, "epoch": 3},
    "states of random numbers": {"net": WEIGHTS, "rng": {"cpu": torch.ones(9)}},
}  # fmt: skip

REFUSED = {
    "running average": ({"state_dict": WEIGHTS, "state_dict_ema": EMA}, "state_dict_ema"),
    "two networks": ({"net": WEIGHTS, "module": EMA}, "module, net"),
    "unknown names": ({"generator": WEIGHTS, "critic": EMA}, "generator, critic"),
    "both kinds": ({"scale": torch.ones(4), "model": WEIGHTS}, "'model'"),
    "an optimizer": (OPTIMIZER, "the state of an optimizer"),
}


@pytest.mark.parametrize("kind", READ)
def test_weights_are_found_beside_the_state_of_training(kind: str, tmp_path: Path) -> None:
    index = open_index(put(tmp_path, READ[kind]))
    assert set(index.entries) == set(WEIGHTS)
    (note,) = index.notes
    assert note.kind == "wrapped_weights" and note.numbers["others"] == len(index.skipped) > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_no_table_is_guessed(kind: str, tmp_path: Path) -> None:
    content, told = REFUSED[kind]
    with pytest.raises(CheckpointError) as refused:
        open_index(put(tmp_path, content))
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_merge_of_wrapped_weights(tmp_path: Path) -> None:
    """`torch.compile`'s prefix is in the names that nanoGPT saves."""
    tuned = {f"_orig_mod.{name}": w + 2 for name, w in WEIGHTS.items()}
    base, expert = put(tmp_path / "base", nano_gpt(WEIGHTS)), put(tmp_path / "a", nano_gpt(tuned))
    request = {"base": base, "experts": {"a": expert, "b": base}, "method": "average"}
    report = eutectic.merge(**request, output=tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], w + 1) for name, w in WEIGHTS.items())
    assert any("holds the weights under 'model'" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told_by_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        open_index(tmp_path / "model.pt")
