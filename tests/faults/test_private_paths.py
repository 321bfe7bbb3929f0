"""What verbs write may be published: it names no folder of the machine it was written on.

Guards that no output holds the absolute path of an input, whatever verb wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.verbs import commands, make_inputs
from helpers.cli import invoke

VERBS = ("merge", "sweep", "collect and add", "tune", "evaluate", "route", "calibrate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-inputs")
    make_inputs(folder)
    return folder


def naming(folder: Path, text: str) -> list[str]:
    """Return the files below a folder that hold a text."""
    held = [path for path in folder.rglob("*") if path.is_file()]
    return [str(p.relative_to(folder)) for p in held if text.encode() in p.read_bytes()]


@pytest.mark.parametrize("verb", VERBS)
def test_outputs_name_no_folder_of_this_machine(verb: str, inputs: Path, tmp_path: Path) -> None:
    answer = invoke(*commands(inputs, tmp_path)[verb])
    assert answer.code == 0, answer.err
    found = naming(tmp_path, str(inputs))
    # PEFT finds an adapter's base by a whole path only, which is written for that.
    adapters = [f"adapters/{name}/adapter_config.json" for name in "ab"]
    assert set(found) <= set(adapters if verb == "route" else ()), found
    for adapter in found:
        config = json.loads((tmp_path / adapter).read_text())
        config.pop("base_model_name_or_path")
        assert str(inputs) not in json.dumps(config)


def test_an_inspection_names_no_folder_of_this_machine(inputs: Path, tmp_path: Path) -> None:
    words = ["inspect", "--base", inputs / "base", "-m", f"m={inputs / 'merged'}"]
    experts = [f"{name}={inputs / name}" for name in "ab"]
    more = [w for name in "ab" for w in ("-s", f"{name}={inputs / name}.stats")]
    answer = invoke(
        *words, *experts, *more, "-o", tmp_path / "i.json", "--plot", tmp_path / "plots"
    )
    assert answer.code == 0, answer.err
    assert (tmp_path / "i.json").is_file()
    assert naming(tmp_path, str(inputs)) == []
