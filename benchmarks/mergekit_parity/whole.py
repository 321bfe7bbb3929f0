"""Whole recipes against mergekit: tensors, configuration, tokenizer of the two outputs.

Run in an environment that has mergekit (0.1.5), with this package installed there:

    python benchmarks/mergekit_parity/whole.py FOLDER [-k PART] [-o results.json]

FOLDER gets the tiny models and both outputs of every recipe. mergekit takes the order of a union of
tokens from a set: tables are compared row by row of the same token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from tokenizers import Tokenizer

from models import make_all
from recipes import KNOWN, recipes

BOUND = 1e-5
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
TABLES = {"lm_head.weight", "model.embed_tokens.weight"}
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
NOT_COMPARED = {"transformers_version", "_name_or_path", "architectures", "use_cache"}


def by_mergekit(document: str, output: Path, cache: Path) -> None:
    """Merge with mergekit, in this process."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(document))
    # Layers that stand twice share memory there, which its writer refuses.
    options = MergeOptions(lora_merge_cache=str(cache), quiet=True, clone_tensors=True)
    run_merge(config, str(output), options)


def by_us(document: str, output: Path) -> list[str]:
    """Merge with this package; return its warnings."""
    import eutectic

    recipe = output.with_suffix(".yml")
    recipe.write_text(document)
    report = eutectic.merge(recipe, output=output)
    return [str(note) for note in getattr(report, "notes", ())]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    return found


def experts_apart(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Mixtral's stacked experts as a tensor for each, as its files have them."""
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        place, _, kind = name.partition(".mlp.experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            apart[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
            continue
        for e, matrix in enumerate(tensor):
            key = f"{place}.block_sparse_moe.experts.{e}"
            if kind == "down_proj":
                apart[f"{key}.w2.weight"] = matrix
            else:
                apart[f"{key}.w1.weight"], apart[f"{key}.w3.weight"] = matrix.chunk(2)
    return apart


def rows_of_tokens(ours: Path, theirs: Path) -> list[int]:
    """Return for each row of their tables ours of the same token, if the order alone differs."""
    texts = [f / "tokenizer.json" for f in (ours, theirs)]
    if not all(t.exists() for t in texts):
        return []
    a, b = (Tokenizer.from_file(str(t)).get_vocab() for t in texts)
    if a == b or a.keys() != b.keys() or set(a.values()) != set(b.values()):
        return []
    rows = {b[token]: a[token] for token in b}
    count = len(next(iter(tensors(theirs)[t] for t in TABLES if t in tensors(theirs))))
    return [rows.get(row, row) for row in range(count)]


def compare_tensors(ours: Path, theirs: Path) -> list[str]:
    """Return every difference of the tensors."""
    mine, other = tensors(ours), tensors(theirs)
    if rows := rows_of_tokens(ours, theirs):
        for name in TABLES & mine.keys() & other.keys():
            mine[name] = mine[name][rows] if len(mine[name]) == len(other[name]) else mine[name]
    if any(".block_sparse_moe." in n or ".mlp.experts." in n for n in mine):
        mine, other = experts_apart(mine), experts_apart(other)
    faults: list[str] = []
    config = json.loads((theirs / "config.json").read_text())
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    if absent := sorted(other.keys() - mine.keys() - tied):
        faults.append(f"lacks {len(absent)}: {absent[:3]}")
    if more := sorted(mine.keys() - other.keys() - tied):
        faults.append(f"has {len(more)} more: {more[:3]}")
    for name in sorted(mine.keys() & other.keys()):
        a, b = mine[name], other[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{name}: {list(a.shape)} {a.dtype}, there {list(b.shape)} {b.dtype}")
            continue
        norm = float(b.double().norm())
        error = float((a.double() - b.double()).norm()) / (norm or 1.0)
        if not error <= ROUNDING.get(b.dtype, BOUND):
            faults.append(f"{name}: relative error {error:.2e}")
    return faults


def compare_config(ours: Path, theirs: Path) -> list[str]:
    """Return every difference of the configurations that is no matter of taste."""
    mine = json.loads((ours / "config.json").read_text())
    other = json.loads((theirs / "config.json").read_text())
    for config in (mine, other):
        config["dtype"] = config.pop("torch_dtype", config.get("dtype"))
    keys = (mine.keys() | other.keys()) - NOT_COMPARED
    return [
        f"config {key}: {mine.get(key)!r}, there {other.get(key)!r}"
        for key in sorted(keys)
        if mine.get(key) != other.get(key)
    ]


def compare_tokenizer(ours: Path, theirs: Path) -> list[str]:
    """Return every difference between the tokenizers: tokens, ids, template, encoding."""
    import transformers

    if not (theirs / "tokenizer.json").exists():
        return []
    try:
        mine, other = (transformers.AutoTokenizer.from_pretrained(f) for f in (ours, theirs))
    except (OSError, ValueError) as error:
        return [f"tokenizer: {error}"]
    faults: list[str] = []
    a, b = mine.get_vocab(), other.get_vocab()
    if a != b and not rows_of_tokens(ours, theirs):
        apart = sorted(t for t in a.keys() | b.keys() if a.get(t) != b.get(t))
        faults.append(f"tokens: {[(t, a.get(t), b.get(t)) for t in apart[:4]]}")
    for text in ("then hint<|a_end|>no", "<s>that<|b_end|>"):
        tokens = [t.convert_ids_to_tokens(t(text)["input_ids"]) for t in (mine, other)]
        if tokens[0] != tokens[1]:
            faults.append(f"encodes {text!r} as {tokens[0]}, there {tokens[1]}")
    if (mine.chat_template is None) != (other.chat_template is None):
        faults.append("only one has a chat template")
    elif mine.chat_template is not None:
        for prompt in (True, False):
            told = [
                t.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
                for t in (mine, other)
            ]
            if told[0] != told[1]:
                faults.append(f"the template renders {told[0]!r}, there {told[1]!r}")
    return faults


def run_one(name: str, document: str, folder: Path) -> dict[str, Any]:
    """Merge one recipe twice and compare."""
    safe = name.replace("/", "-").replace(" ", "_").replace(",", "")
    ours, theirs = folder / "ours" / safe, folder / "theirs" / safe
    shutil.rmtree(ours, ignore_errors=True)
    text = document.replace("M/", f"{folder / 'models'}/")
    found: dict[str, Any] = {"recipe": name, "faults": []}
    if not (theirs / "config.json").exists():
        try:
            by_mergekit(text, theirs, folder / "lora-cache")
        except Exception as error:
            shutil.rmtree(theirs, ignore_errors=True)
            return found | {"mergekit_fails": f"{type(error).__name__}: {error}"[:200]}
    try:
        ours.parent.mkdir(exist_ok=True)
        by_us(text, ours)
    except Exception as error:
        return found | {"faults": [f"{type(error).__name__}: {error}"[:600]]}
    faults = compare_tensors(ours, theirs) + compare_config(ours, theirs)
    return found | {"faults": faults + compare_tokenizer(ours, theirs)}


def main() -> int:
    """Compare every recipe; exit code 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-k", default="", help="only recipes whose name has this part")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder.absolute()
    make_all(folder / "models")
    results: list[dict[str, Any]] = []
    for name, document in recipes():
        if given.k not in name:
            continue
        start = time.perf_counter()
        results.append(run_one(name, document, folder))
        row = results[-1]
        word = "DIFFERS" if row["faults"] else "same"
        if "mergekit_fails" in row:
            word = "mergekit fails"
        elif row["faults"] and name in KNOWN:
            word, row["known"], row["faults"] = "differs as known", KNOWN[name], []
        print(f"{word:8} {name} ({time.perf_counter() - start:.1f} s)", flush=True)
        for fault in [*row["faults"][:5], *([row["mergekit_fails"]] if word[0] == "m" else [])]:
            print("        ", fault, flush=True)
    if given.output:
        given.output.write_text(json.dumps(results, indent=1) + "\n")
    same = sum(not (r["faults"] or r.keys() & {"mergekit_fails", "known"}) for r in results)
    print(f"{same} of {len(results)} the same")
    return int(any(r["faults"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
