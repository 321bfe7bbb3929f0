"""`eutectic extract`, and adapters of `eutectic merge`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.cli import invoke


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, a fine-tune whose norm changes, and two adapters, all by hand."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"h.{i}.q_proj.weight": randn(16, 12) for i in range(2)} | {"norm.weight": randn(12)}
    tuned = {n: t + 0.1 * randn(*t.shape) for n, t in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for name in "ab":
        (tmp_path / name).mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        factors = {
            f"base_model.model.h.{i}.q_proj.lora_{side}.weight": 0.1 * randn(*shape)
            for i in range(2)
            for side, shape in (("A", (2, 12)), ("B", (16, 2)))
        }
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
    return tmp_path


def test_extract_says_what_was_lost_and_goes_on_after_a_refusal(place: Path) -> None:
    words = ["extract", "--base", place / "base", place / "tuned", "--rank", 3, "-o", place / "out"]
    refused = invoke(*words)
    assert refused.code == 2
    assert "norm.weight" in refused.err
    assert "--others drop" in refused.err
    done = invoke(*words, "--others", "drop")
    assert done.code == 0, done.err
    assert "2 layers of rank 3, 1 other tensor changed" in done.out
    assert "lost energy" in done.out
    assert "norm.weight" in done.err
    report = invoke(*words[:-1], place / "json", "--others", "drop", "--json")
    records = json.loads(report.out)["records"]
    assert records["h.0.q_proj.weight"]["adapter"]["rank"] == 3


@pytest.mark.parametrize("words", [["--adapter"], ["--rank", 4], ["--rank", "auto"]])
def test_merge_writes_an_adapter(place: Path, words: list[object]) -> None:
    experts = [f"{name}={place / name}" for name in "ab"]
    base = ["--base", place / "base", "-m", "task_arithmetic", "--scale", 1]
    done = invoke("merge", *base, *words, "-o", place / "out", *experts)
    assert done.code == 0, done.err
    stored = load_file(place / "out" / "adapter_model.safetensors")
    own = [load_file(place / name / "adapter_model.safetensors") for name in "ab"]
    key = "base_model.model.h.1.q_proj.lora_{}.weight".format
    wanted = sum(t[key("B")] @ t[key("A")] for t in own)
    rtol = 0.2 if words == ["--rank", "auto"] else 1e-4
    found = stored[key("B")] @ stored[key("A")]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-2 if rtol > 0.1 else 1e-5)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rank", "many"], "must be a number of directions, or auto"),
        (["--rank", "500000"], "from 1 to 100,000"),
        (["--others", "keep"], "others"),
        (["--tables", "x"], "tables"),
    ],
)
def test_what_is_asked_wrongly(place: Path, words: list[str], part: str) -> None:
    command = ["extract", "--base", place / "base", place / "tuned", "-o", place / "out", *words]
    answer = invoke(*command)
    assert answer.code == 2
    assert part in answer.err


def test_a_merge_that_adapters_cannot_hold_names_the_option(place: Path) -> None:
    words = ["merge", "--base", place / "base", "-m", "ties", "--adapter", "-o", place / "out"]
    answer = invoke(*words, *(f"{n}={place / n}" for n in "ab"))
    assert answer.code == 2
    assert "- --adapter: what ties makes of adapters has more directions" in answer.err


def test_merge_at_a_rank_tells_what_the_experts_lose(place: Path) -> None:
    words = ["merge", "--base", place / "base", "-m", "task_arithmetic", "--scale", 1]
    experts = [f"{n}={place / n}" for n in "ab"]
    out = place / "out"
    done = invoke(*words, "--rank", 1, "--compress", "before", "-o", out, *experts)
    assert done.code == 0
    assert "of the experts' changes" in " ".join(done.out.split())
    stored = load_file(out / "adapter_model.safetensors")
    assert all(len(t) == 1 for n, t in stored.items() if "lora_A" in n)
    bad = invoke(*words, "--compress", "before", "-o", place / "bad", *experts)
    assert bad.code == 2
    assert "--compress before needs a rank (--rank N)" in bad.err
    for more, part in (
        (["--compress", "before", "--rank", "auto"], "--compress before takes a rank that is a"),
        (["--compress", "first", "--rank", 2], "--compress: should be 'before' or 'after'"),
        (["--rank", 2, "--set", "output=model"], "--set output"),
        (["--rank", 2, "--balance", 1], "--balance 1 says how experts are brought to shared"),
    ):
        bad = invoke(*words, *more, "-o", place / "bad", *experts)
        assert bad.code == 2
        assert part in " ".join(bad.err.split())
