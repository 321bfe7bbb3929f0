"""What blocks of a page stand on besides the folders of `world`: what its prose says is there."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Before:
    """Folders of other names, files that the page writes itself, and work that came before."""

    copies: dict[str, str] = field(default_factory=dict[str, str])  # new name -> what it holds
    without: tuple[str, ...] = ()
    bash: str = ""
    python: str = ""


_MERGED = "eutectic merge recipe.yaml -o merged/\n"
_STATISTICS = """
eutectic collect ./sst2 --data sst2-proxy.jsonl -o sst2.stats.safetensors
eutectic collect ./mnli --data mnli-proxy.jsonl -o mnli.stats.safetensors
"""
_ROUTED = f"""{_MERGED}{_STATISTICS}
eutectic route merged/ sst2=./sst2 mnli=./mnli -s sst2=sst2.stats.safetensors \
    -s mnli=mnli.stats.safetensors --router-data sst2=sst2.jsonl --router-data mnli=mnli.jsonl \
    --rank 4 -o routed/
eutectic route routed/ --export adapters/
"""
# Experts without heads: their adapters may be mixed in a batch.
_MIXED = """
eutectic merge --base ./base -m iso_c -o bodies/ sst2=./sst2-body mnli=./mnli-body
eutectic collect ./sst2-body --data sst2.jsonl -o sst2.body.safetensors
eutectic collect ./mnli-body --data mnli.jsonl -o mnli.body.safetensors
eutectic route bodies/ sst2=./sst2-body mnli=./mnli-body -s sst2=sst2.body.safetensors \
    -s mnli=mnli.body.safetensors --rank 4 -o routed/ --export adapters/
"""
_CHAT = """
eutectic merge --base ./llm -m task_arithmetic --scale norm -o llm-merged/ math=./math code=./code
eutectic collect ./math --data data/math/proxy.jsonl -o math.stats.safetensors
eutectic collect ./code --data data/code/proxy.jsonl -o code.stats.safetensors
eutectic route llm-merged/ math=./math code=./code -s math=math.stats.safetensors \
    -s code=code.stats.safetensors --rank 4 -o chat/
"""
_BATCHES = """
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("base")
batch = dict(tokenizer(["w1 w2 w3", "w4 w5"], return_tensors="pt", padding=True))
batches = [batch]
"""
_TWO = {"a": "math", "b": "code", "c": "math"}

BEFORE: dict[str, Before] = {
    "README": Before(without=("recipe.yaml", "tasks.yaml", "sst2.jsonl", "mnli.jsonl")),
    "quickstart": Before(
        without=("recipe.yaml", "tasks.yaml"),
        copies={f"{n}.jsonl": f"data/{n}/test.jsonl" for n in ("sst2", "mnli")},
    ),
    "eight-fine-tunes": Before(
        copies={"experts/sst2": "sst2", "experts/mnli": "mnli"},
        without=("recipe.yaml", "tasks.yaml", "sst2.jsonl", "mnli.jsonl"),
    ),
    "adapters": Before(
        copies={
            **{"adapter": "sst2-lora", "lora-a": "sst2-lora", "lora-b": "mnli-lora"},
            **{"lora": "mnli-lora", "fine-tuned": "sst2"},
            **{"a.jsonl": "data/sst2/test.jsonl", "b.jsonl": "data/mnli/test.jsonl"},
        },
        bash=_MIXED + "eutectic merge --base ./base -m linear -o full/ one=./sst2-lora\n",
        python=_BATCHES + "base = AutoModel.from_pretrained('adapters/merged').eval()\n",
    ),
    "check": Before(copies={"adapter": "sst2-lora", "downloaded": "sst2", **_TWO}),
    "evaluation": Before(
        copies={
            "sst2/train.jsonl": "data/sst2/validation.jsonl",
            "sst2/test.jsonl": "data/sst2/test.jsonl",
            "topics.csv": "data/sst2/test.jsonl",
            "heads/topics.safetensors": "sst2-head.safetensors",
            "sts/train.jsonl": "data/sst2/validation.jsonl",
            "sts/test.csv": "data/sst2/test.jsonl",
            "search/queries.jsonl": "data/sst2/test.jsonl",
            "search/corpus.jsonl": "data/sst2/validation.jsonl",
            "pets/train": "data/cars/train",
            "pets/test": "data/cars/test",
            "lm-eval-tasks": "data/cars/train",
        },
        bash=_MERGED,
    ),
    "inspect": Before(
        bash=_MERGED + "eutectic merge recipe.yaml -m task_arithmetic -o ta/\n" + _STATISTICS,
        python="merged_delta, task_deltas = deltas.sum(0), deltas",
    ),
    "mergekit": Before(
        copies={"lora": "sst2-lora", "other": "math", **_TWO},
        python="""
from pathlib import Path
Path("mergekit.yml").write_text(
    "merge_method: ties\\nbase_model: ./llm\\nparameters: {density: 0.5}\\n"
    "models: [{model: ./math, parameters: {weight: 1}},"
    " {model: ./code, parameters: {weight: 1}}]\\n"
)
""",
    ),
    "report": Before(
        bash=_ROUTED
        + """
eutectic evaluate iso_c=merged/ --tasks tasks.yaml --base ./base -e sst2=./sst2 -e mnli=./mnli \\
    -o results.json
eutectic inspect recipe.yaml -m iso_c=merged/ -o inspection.json
eutectic compare recipe.yaml --tasks tasks.yaml --method iso_c --search default -o comparison/
""",
    ),
    "recipes": Before(copies=_TWO),
    "scale": Before(
        copies={},
        bash=_STATISTICS,
        python="my_loss = lambda alpha: (alpha - 0.7) ** 2",
    ),
    "statistics": Before(
        bash=_STATISTICS
        + """
eutectic collect ./sst2 --data data/sst2/proxy.jsonl -o monday.stats.safetensors
eutectic collect ./sst2 --data data/sst2/validation.jsonl -o tuesday.stats.safetensors
""",
        python=_BATCHES + "model = AutoModel.from_pretrained('sst2')\n",
    ),
    "vocabularies": Before(copies={"chat": "math", "tools": "code"}),
    "routing": Before(
        bash=_ROUTED.replace("eutectic route routed/ --export adapters/\n", "")
        + _MIXED.replace("-o routed/ ", "")
        + _CHAT,
        python=_BATCHES
        + """
import torch
import eutectic
merged = AutoModel.from_pretrained("merged").eval()
stats_sst2 = eutectic.load_statistics("sst2.stats.safetensors")
stats_mnli = eutectic.load_statistics("mnli.stats.safetensors")
labels = torch.tensor([0, 1])
on_merged = eutectic.collect(merged, batches)
on_merged_sst2 = on_merged_mnli = on_merged
""",
    ),
    "calibration": Before(bash=_MERGED, python=_BATCHES),
}
