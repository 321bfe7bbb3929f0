"""The bridge to lm-evaluation-harness, against likelihoods computed here; what it refuses."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import eutectic
from eutectic.errors import MissingExtraError, RequestError, TaskError
from eutectic.evaluation import load_tasks
from evaluation import world
from helpers.cli import invoke

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not INSTALLED, reason="pip install 'eutectic[lm-eval]': forty packages that little else needs"
)
# The harness and its packages, not this project, still use what their own libraries deprecate.
lenient = pytest.mark.filterwarnings("default")


def _tokenizer():
    """Return the tokenizer without the end mark after every text, as language models' are."""
    return world.tokenizer(end="")


def _model(folder: Path, seed: int) -> Path:
    world.make("gpt2", seed=seed).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path: Path) -> dict:
    """A multiple-choice task of 30 rows as a file of the harness's, in `tmp_path/theirs`."""
    draw = random.Random(0)
    rows = [
        {"question": q, "choices": draw.sample(world.WORDS[3:], 3), "answer": i % 3}
        for i, q in enumerate(world.sentences(30))
    ]
    data = world.jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "theirs").mkdir()
    means = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc",)]
    worse = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    told = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [*means, worse],
    }
    (tmp_path / "theirs" / "colours.yaml").write_text(yaml.safe_dump(told))
    return {"kind": "lm-eval", "harness": {"tasks": ["colours"], "include_path": "theirs"}}


def _right(folder: Path, rows: Path) -> list[float]:
    """Return which rows' most likely choice is the right one."""
    model, tokenizer = world.hf.AutoModelForCausalLM.from_pretrained(folder), _tokenizer()
    found = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        likely = []
        for choice in row["choices"]:
            start, end = (tokenizer(t)["input_ids"] for t in (row["question"], choice))
            with torch.no_grad():
                scores = model(torch.tensor([start + end])).logits[0].log_softmax(-1)
            likely.append(scores[len(start) - 1, end[0]].item())
        found.append(float(np.argmax(likely) == row["answer"]))
    return found


@needs_harness
@lenient
def test_rows_value_and_error_are_the_harnesss(tmp_path: Path, spec: dict):
    base, expert = _model(tmp_path / "base", 0), _model(tmp_path / "expert", 1)
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    torch.manual_seed(5)
    results = eutectic.evaluate(
        path, base=base, experts={"a": expert}, output=tmp_path / "r.json", trust_code=True
    )
    state = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(state, torch.rand(1))  # the harness seeds the process; that is put back
    lines = (tmp_path / "r.json.outcomes.jsonl").read_text().splitlines()
    for folder, line, result in zip((base, expert), lines, results.results, strict=True):
        right = _right(folder, tmp_path / "rows.jsonl")
        assert 0 < sum(right) < 30
        assert json.loads(line)["predictions"] == right
        assert result.value == pytest.approx(np.mean(right))
        # The harness's acc_stderr is σ/√n of the rows.
        expected = np.std(right, ddof=1) / np.sqrt(30)
        assert result.standard_error == pytest.approx(expected, rel=0.1)
    assert results.tasks[0].metric == "acc" and results.tasks[0].n == 30
    assert "lm-eval" in results.versions


@needs_harness
@lenient
def test_limits_few_shot_and_resuming(tmp_path: Path, spec: dict):
    folder = _model(tmp_path / "m", 0)
    theirs = tmp_path / "theirs" / "colours.yaml"
    told = yaml.safe_load(theirs.read_text())
    theirs.write_text(yaml.safe_dump({**told, "fewshot_split": "test"}))
    spec["harness"] |= {"limit": 8, "num_fewshot": 1}
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    output = tmp_path / "r.json"
    journal = output.with_name("r.json.outcomes.jsonl")

    def evaluate(**more) -> int:
        found = eutectic.evaluate(path, models=[folder], output=output, trust_code=True, **more)
        assert len(journal.read_text().splitlines()) == lines
        return found.results[0].n

    lines = 1
    assert evaluate() == 8
    assert evaluate() == 8  # from the journal
    lines = 2
    assert evaluate(limit=5) == 5
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[::-1]) + "\n")
    lines = 3
    assert evaluate() == 8  # other rows


@needs_harness
@lenient
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "acuracy"}, r"no metric 'acuracy'; it has acc, brier_score"),
        ({"metric": "brier_score"}, "is no mean over rows"),
        ({"harness": {"filter": "strict"}}, "has the filters none"),
        ({"harness": {"tasks": ["colors"]}}, "lm-eval knows no task 'colors'"),
    ],
)
def test_what_the_harness_cannot_give_is_refused(
    tmp_path: Path, spec: dict, change: dict, message: str
):
    changed = {**spec, **change, "harness": {**spec["harness"], **change.get("harness", {})}}
    path = world.tasks(tmp_path / "t.yaml", a=changed)
    with pytest.raises(RequestError, match=message):
        eutectic.evaluate(path, models=[_model(tmp_path / "m", 0)], trust_code=True)


@needs_harness
@lenient
def test_command_line(tmp_path: Path, spec: dict):
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    answer = invoke("evaluate", _model(tmp_path / "m", 0), "-t", path, "--trust-code")
    assert answer.code == 0, answer.err
    assert "acc; split test, n = 30" in answer.out
    assert "it/s" not in answer.err


def test_requests_that_need_no_harness_to_be_refused(tmp_path: Path, spec: dict):
    folder = _model(tmp_path / "m", 0)
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    with pytest.raises(RequestError, match="--trust-code"):
        eutectic.evaluate(path, models=[folder])
    with pytest.raises(RequestError, match="no split 'validation'; it has test"):
        eutectic.evaluate(path, models=[folder], split="validation", trust_code=True)
    with pytest.raises(RequestError, match="cannot be compared with p.jsonl"):
        eutectic.evaluate(path, models=[folder], proxy={"a": ["p.jsonl"]}, trust_code=True)
    for change in ({"data": "rows.jsonl"}, {"harness": {"tasks": ["x"], "shots": 1}}):
        with pytest.raises(TaskError):
            load_tasks(world.tasks(tmp_path / "t.yaml", a={**spec, **change}))


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, spec: dict):
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    with pytest.raises(MissingExtraError, match=r"pip install 'eutectic\[lm-eval\]'"):
        eutectic.evaluate(path, models=[_model(tmp_path / "m", 0)], trust_code=True)
