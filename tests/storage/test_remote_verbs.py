"""Collecting, merging with statistics, evaluating and inspecting: from a store, to a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eutectic.storage import MANIFEST, local_path
from helpers.cli import invoke
from helpers.object_store import BUCKET, SECRET, Proxy, names, upload

pytest.importorskip("transformers")

AT = f"s3://{BUCKET}/verbs"


def _world(folder: Path) -> None:
    """Save a base, two experts with a tokenizer, rows, and a file of tasks."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(28))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    )
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**size, intermediate_size=32, vocab_size=30, max_position_embeddings=24)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02 * seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": f"w{i} w{i + 1} w{i % 5}", "label": i % 2} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"kind": "text-classification", "data": {"test": "rows.jsonl"}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"a": task}}))


def _run(cache: Path, *words: object) -> str:
    told = invoke(*words)
    assert told.code == 0, told.err
    assert SECRET not in told.out + told.err
    assert str(cache) not in told.out + told.err
    return told.out


def test_verbs_from_a_store_to_a_store(tmp_path: Path, store: Any, s3: Proxy) -> None:
    _world(tmp_path)
    for name in ("base", "a", "b", "rows.jsonl", "tasks.yaml"):
        upload(store, tmp_path / name, f"verbs/{name}")
    cache = tmp_path / "cache"
    figures: dict[str, Any] = {}
    for at in (AT, str(tmp_path)):
        for name in ("a", "b"):
            statistics = f"{at}/{name}.stats.safetensors"
            _run(cache, "collect", f"{at}/{name}", "--data", f"{at}/rows.jsonl", "-o", statistics)
        given = [f"--statistics={n}={at}/{n}.stats.safetensors" for n in ("a", "b")]
        experts = [f"a={at}/a", f"b={at}/b"]
        made = ["--base", f"{at}/base", "-m", "regmean", *given, *experts]
        _run(cache, "merge", *made, "-o", f"{at}/merged")
        models = ["--base", f"{at}/base", "-e", f"a={at}/a", f"merged={at}/merged"]
        _run(cache, "evaluate", *models, "-t", f"{at}/tasks.yaml", "-o", f"{at}/results.json")
        file = local_path(f"{at}/results.json")
        found = json.loads(file.read_bytes())
        figures[at] = [(r["checkpoint"], r["value"]) for r in found["results"]]
        assert str(cache) not in file.read_text()
    again = f"{AT}/a.stats.safetensors"
    words = [f"{AT}/a", "--data", f"{AT}/rows.jsonl", "-o", again, "--json"]
    told = json.loads(_run(cache, "collect", *words))
    local = (tmp_path / "a.stats.safetensors").stat().st_size
    # Its record names the checkpoint by its place.
    assert told["output"] == again and abs(told["bytes"] - local) < 0.1 * local
    held = json.loads(_run(cache, "inspect", again, "--json"))["statistics"]
    assert [own["file"] for own in held.values()] == [again]
    assert figures[AT] == figures[str(tmp_path)]
    assert len(figures[AT]) == 3
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        sent = store.get_object(Bucket=BUCKET, Key=f"verbs/merged/{name}")["Body"].read()
        if name != "model.safetensors":
            assert sent == (tmp_path / "merged" / name).read_bytes()
    assert "verbs/results.json" in names(store, "verbs/")


MERGEKIT = """merge_method: task_arithmetic
base_model: {base}
models:
  - model: {a}
    parameters: {{weight: 0.4}}
"""
# verb -> words, in which AT is where inputs lie and OUT is where outputs go; and what it writes.
OUTPUTS: dict[str, tuple[str, list[str]]] = {
    "merge": ("--base AT/base -m iso_c a=AT/a b=AT/b -o OUT/m", ["m/model.safetensors"]),
    "tune": (
        "--base AT/base -m iso_c a=AT/a b=AT/b --search norm -o OUT/m",
        ["m/model.safetensors", "m/eutectic.json"],
    ),
    "tune --plot": (
        "--base AT/base -m iso_c a=AT/a b=AT/b --search norm --plot OUT/curve.png",
        ["curve.png", "curve.json"],
    ),
    "compare": (
        "--base AT/base a=AT/a b=AT/b -m average -m iso_c --search default -t AT/tasks.yaml "
        "-o OUT/table --best OUT/best",
        [
            "best/model.safetensors",
            "table/comparison.json",
            "table/results.json",
        ],
    ),
    "collect": ("AT/a --data AT/rows.jsonl -o OUT/a.safetensors", ["a.safetensors"]),
    "route": (
        "AT/base a=AT/a b=AT/b -s a=AT/a.stats.safetensors -s b=AT/b.stats.safetensors --rank 2 "
        "-o OUT/routed --export OUT/adapters",
        ["routed/routed.safetensors"],
    ),
    "evaluate": (
        "AT/a AT/b --base AT/base -t AT/tasks.yaml -o OUT/r.json --plot OUT/r.svg",
        ["r.json", "r.svg"],
    ),
    "inspect": (
        "--base AT/base a=AT/a b=AT/b --merged base2=AT/b -o OUT/i.json --plot OUT/plots",
        ["i.json", "plots/spectra.png"],
    ),
    "report html": ("AT/recipe.yaml -o OUT/page.html", ["page.html"]),
    "report md": ("AT/recipe.yaml -o OUT/page.md", ["page.md"]),
    "calibrate": (
        "AT/base AT/a AT/b -d a=AT/rows.jsonl -d b=AT/rows.jsonl --samples 8 -o OUT/m",
        ["m/model.safetensors", "m/eutectic.json"],
    ),
    "extract": (
        "--base AT/base --rank 4 --others drop AT/a -o OUT/lora",
        ["lora/adapter_model.safetensors"],
    ),
    "convert": ("AT/mergekit.yml -o OUT/recipe.yaml", ["recipe.yaml"]),
    "init": ("AT/base AT/a AT/b AT/rows.jsonl -o OUT/study", ["study/recipe.yaml"]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verbs read, in a folder of this machine."""
    folder = tmp_path_factory.mktemp("verbs")
    _world(folder)
    experts = {"a": "./a", "b": "./b"}
    recipe = {"base": "./base", "experts": experts, "method": "iso_c", "scale": 1.0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "mergekit.yml").write_text(MERGEKIT.format(base="./base", a="./a"))
    for name in "ab":
        made = folder / f"{name}.stats.safetensors"
        invoke("collect", folder / name, "--data", folder / "rows.jsonl", "-o", made)
    return folder


@pytest.mark.parametrize("case", OUTPUTS)
def test_every_verb_writes_into_a_store(
    case: str, tmp_path: Path, world: Path, store: Any, s3: Proxy
) -> None:
    verb, (words, written) = case.split()[0], OUTPUTS[case]
    place = f"outputs/{case.replace(' ', '')}"
    for path in sorted(world.iterdir()):
        upload(store, path, f"{place}/in/{path.name}")
    at, out = f"s3://{BUCKET}/{place}/in", f"s3://{BUCKET}/{place}/out"
    here = tmp_path / "here"
    here.mkdir()
    asked = [w.replace("AT", str(world)).replace("OUT", str(here)) for w in words.split()]
    told = invoke(verb, *asked)
    assert told.code == 0, told.err
    said = _run(
        tmp_path / "cache", verb, *(w.replace("AT", at).replace("OUT", out) for w in words.split())
    )
    sent = {name.removeprefix(f"{place}/out/") for name in names(store, f"{place}/out/")}
    made = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    assert {*written} <= made
    beside = (MANIFEST, ".outcomes.jsonl")  # what lets a run go on stays on this machine
    assert {n for n in sent if not n.endswith(beside)} == {
        n for n in made if not n.endswith(beside)
    }
    for name in written:
        content = store.get_object(Bucket=BUCKET, Key=f"{place}/out/{name}")["Body"].read()
        assert str(tmp_path).encode() not in content
        if name.endswith((".png", ".safetensors")) and "adapter" not in name:
            assert content == (here / name).read_bytes()
    assert out in said or verb in ("route", "inspect")
    staged = [p.name for p in (tmp_path / "cache").rglob("*") if p.name.endswith(".partial")]
    assert not staged


def test_deltas_are_kept_on_a_disk(tmp_path: Path, store: Any) -> None:
    told = invoke(
        "tune", "--base", "b", "-m", "iso_c", "a=x", "c=y", "--search=norm", "--work", f"{AT}/work"
    )
    assert told.code == 2
    assert "deltas are kept on a disk" in told.err
