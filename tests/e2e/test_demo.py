"""The demo end to end: real adapters, the real command line, the ordering of the methods.

Guards that real experts become one model which transformers loads, and that the methods differ as
published where the gap is far beyond the error of the measurement.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eutectic.cli import console
from eutectic.cli.demo import _examples as demo_examples
from eutectic.cli.demo import _show
from eutectic.cli.demo_story import Told
from helpers.cli import invoke
from helpers.processes import run_cli

EXAMPLES = Path(__file__).parents[2] / "examples" / "minilm"
WORDS = 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_merges_real_experts(tmp_path: Path) -> None:
    # Every fourth text, and of each the first words: models that read take most of the time.
    examples = tmp_path / "examples"
    shutil.copytree(EXAMPLES, examples)
    for split in ("tasks", "proxy"):
        for file in (examples / split).iterdir():
            rows = [json.loads(row) for row in file.read_text("utf-8").splitlines()[::4]]
            short = [row | {"text": " ".join(row["text"].split()[:WORDS])} for row in rows]
            file.write_text("".join(json.dumps(row) + "\n" for row in short), "utf-8")
    done = run_cli("demo", "--json", "--examples", examples, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    mean = {name: 100 * row["mean"] for name, row in result["rows"].items()}
    # Measured: experts 90.3, base 80.3, Iso-C 84.7; average 81.0 and task arithmetic 81.3 are too
    # close to each other to be ordered.
    assert mean["experts"] - mean["base"] > 8
    assert mean["experts"] - mean["average"] > 8
    assert mean["iso_c"] - mean["average"] > 1.5
    assert mean["iso_c"] - mean["task_arithmetic"] > 1.5

    # What texts without labels give: statistics, an α, a routed model.
    assert {"regmean", "mats", "iso_a", "iso_c_by_kl", "routed"} <= mean.keys()
    assert mean["iso_c_by_kl"] > mean["average"]
    assert 0.2 <= result["scales"]["iso_c_by_kl"] <= 2
    rows = result["rows"].values()
    assert all(0 < row["standard_error"] < 0.05 for row in rows)
    share = sum(r["share_of_experts"] for n, r in result["rows"].items() if n == "experts")
    assert share == pytest.approx(1)
    results = json.loads(Path(result["results"]).read_text("utf-8"))
    assert {m["checkpoint"] for m in results["means"]} == result["rows"].keys()
    assert "<html" in Path(result["page"]).read_text("utf-8")[:200].lower()

    from eutectic import load_routed

    experts = load_routed(result["routed"]).routing.experts
    assert list(experts) == sorted(p.name for p in (examples / "experts").iterdir())

    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        result["merged"], local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(
    "held",
    [
        "",
        "{}",
        "[]",
        '{"recipe": {"method": "iso_c", "scale": 0.8, "experts": {"a": "a"}}}',
    ],
)
def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path, held: str) -> None:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "eutectic.json").write_text(held)
    (folder / "mine.safetensors").write_text("keep")
    answer = invoke("demo", "-o", tmp_path, "--base", tmp_path)
    assert answer.code == 2
    assert f"{folder} is there already and is not an earlier demo's" in answer.err
    assert (folder / "mine.safetensors").read_text() == "keep"


@pytest.mark.parametrize("name", ["tasks.yaml", "recipe.yaml"])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine: 1\n")
    answer = invoke("demo", "-o", tmp_path, "--base", tmp_path)
    assert answer.code == 2
    assert f"{tmp_path / name} is there already and is not an earlier demo's" in answer.err
    assert (tmp_path / name).read_text() == "mine: 1\n"


def test_the_demo_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    figures = {"standard_error": 0.011, "nai": None, "nai_interval": None}
    names = ["base", "experts", "task_arithmetic", "iso_c_by_kl", "routed"]
    tasks = ["amazon", "movie", "spam", "wn_noun", "wn_order", "wn_pos"]

    def found(name: str, **more: Any) -> Any:
        values = {"value": 0.805, "interval": (0.78, 0.82), "normalized": 1.0}
        ends = {"normalized_interval": (0.883, 1.02)}
        return SimpleNamespace(checkpoint=name, **values, **ends, **figures, **more)

    roles = {"base": "base"}
    results: Any = SimpleNamespace(
        checkpoints=[SimpleNamespace(name=n, role=roles.get(n, "model")) for n in names],
        means=[found(name) for name in names],
        results=[found(name, task=task) for name in names for task in tasks],
        tasks=[SimpleNamespace(name=task) for task in tasks],
        differences=[
            SimpleNamespace(checkpoint=n, other=m, normalized_interval=(-0.1, 0.1))
            for n in names
            for m in names
        ],
    )
    told = Told(results, {"iso_c_by_kl": 0.91}, frozenset({"routed"}), Path("m"), Path("r"), None)
    monkeypatch.setattr(console.out, "_width", 80)
    _show(told)
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 80 and not any("…" in line for line in shown)
    whole = re.compile(r"80\.5 ± 1\.1 +100\.0 \[88\.3, 102\.0\]")
    assert sum(whole.search(line) is not None for line in shown) == len(names)
    assert all(any(task in line for line in shown) for task in tasks)


def test_a_clone_holds_the_experts() -> None:
    assert demo_examples() == EXAMPLES
    assert len(list((EXAMPLES / "experts").glob("*/adapter_config.json"))) == 6
