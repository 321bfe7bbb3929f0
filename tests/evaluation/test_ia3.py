"""(IA)³ adapters, merges of them and sweeps are evaluated as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.evaluation import load_model, load_tasks
from eutectic.execution.run import sweep
from evaluation import world

pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft")


def test_merges_and_sweeps_of_vectors_are_evaluated(tmp_path: Path):
    base = world.save(world.make("t5"), tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = peft.IA3Config(
            task_type="SEQ_2_SEQ_LM", target_modules=["k", "wo"], feedforward_modules=["wo"]
        )
        adapted = peft.get_peft_model(world.make("t5"), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "ia3_l" in key:
                    parameter.add_(0.4 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name)
    experts = {name: tmp_path / name for name in "ab"}
    texts = world.sentences(6)
    rows = [{"source": t, "target": u} for t, u in zip(texts, reversed(texts), strict=True)]
    world.jsonl(tmp_path / "d.jsonl", rows)
    spec = {"kind": "sequence-to-sequence", "data": "d.jsonl"}
    tasks = world.tasks(tmp_path / "t.yaml", a=spec)

    # What runs is what peft runs.
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    for folder in (tmp_path / "a", _merged(tmp_path, base, experts)):
        expected = peft.PeftModel.from_pretrained(world.make("t5"), str(folder)).eval()
        model = load_model(folder, load_tasks(tasks)["a"], base=base)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
            assert not torch.allclose(model(**inputs).logits, world.make("t5")(**inputs).logits)

    options = {"base": base, "experts": experts, "method": "task_arithmetic"}
    sweep(output=tmp_path / "mixed", mixtures=[0.0, 0.5, 1.0], **options)
    models = {"merged": tmp_path / "merged", "mixed": tmp_path / "mixed"}
    results = eutectic.evaluate(
        tasks, base=base, experts={"a": tmp_path / "a"}, models=models, resamples=10
    )
    named = [c.name for c in results.checkpoints]
    assert named == ["base", "a", "merged", "mixed/0", "mixed/0.5", "mixed/1"]


def _merged(tmp_path: Path, base: Path, experts: dict[str, Path]) -> Path:
    options = {"base": base, "experts": experts, "method": "task_arithmetic"}
    eutectic.merge(output=tmp_path / "merged", **options)
    return tmp_path / "merged"
