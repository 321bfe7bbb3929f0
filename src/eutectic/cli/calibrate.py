"""`eutectic calibrate`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from eutectic.cli.console import (
    grid,
    out,
    print_json,
    print_named,
    progress_bar,
    tell,
    tell_done,
    verb,
)
from eutectic.cli.named_words import named_paths, pairs
from eutectic.cli.options import CalibrationDataOptions, Json, argument, option
from eutectic.words import counted, few

_ONE = {"matrices": "matrix", "biases": "bias", "norms": "norm", "convolutions": "convolution"}
_SHOWN = 12  # layers in the table, evenly over the depth


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The models, and the inputs of their tasks."""

    merged: Path = argument(..., "The merged model's folder.")
    experts: list[str] = argument(
        ..., "Experts: folders, adapters or hub ids.", metavar="[NAME=]EXPERT…"
    )
    data: list[str] = option(
        ..., "Unlabelled inputs of an expert's task.", "--data", "-d", metavar="NAME=DATA"
    )
    base: Path | None = option(None, "The base; for adapters, and for --anchor-scale.")


@dataclass(frozen=True, kw_only=True)
class StrengthOptions:
    """How far layers go from the merged model to the experts."""

    ridge: float = option(
        0.05, "λ: how strongly layers are held at the anchor, relative to the inputs.", min=0
    )
    anchor_scale: float = option(1.0, "ρ: how much of the merged delta is in the anchor.")
    expert_share: float = option(
        0.25, "a: the expert's share in the mixture of inputs.", min=0, max=1
    )


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """Which layers, and which inputs."""

    sites: list[str] | None = option(
        None, "matrices, biases, norms, convolutions (default: all).", metavar="SITES"
    )
    layers: list[str] | None = option(
        None, "Parameters whose layers are calibrated.", metavar="GLOB"
    )
    samples: int = option(256, "Inputs of every task at most.", min=1)
    holdout: float = option(
        0.0, "Share of them that no layer is fitted to; errors are measured there.", min=0, max=0.9
    )
    seed: int = option(0, "Seed of the sample.")


@verb
def calibrate(
    *,
    models: ModelOptions,
    output: Path = option(..., "Folder to write; must not hold anything.", "--output", "-o"),
    strength: StrengthOptions,
    choice: ChoiceOptions,
    reading: CalibrationDataOptions,
    threads: int | None = option(
        None, "Forward passes side by side (default: one per core).", min=1
    ),
    restart: bool = option(False, "Discard an unfinished run instead of continuing it."),
    json: Json = False,
) -> None:
    """Calibrate a merged model layer by layer towards its experts, in closed form.

    8 to 256 unlabelled inputs of every task; no labels, no training. The work goes on in
    OUTPUT.partial; a killed run is continued by the same command. Runs on the CPU.

    Examples:

      eutectic calibrate merged/ sst2=./sst2 mnli=./mnli -d sst2=sst2.jsonl -d mnli=mnli.jsonl
      -o calibrated/

      eutectic calibrate merged/ a=./a-lora b=./b-lora --base ./base -d a=a.csv -d b=b.csv
      --samples 64 --holdout 0.25 -o calibrated/

      eutectic calibrate merged/ cars=./cars dtd=./dtd -d cars=photos/ -d dtd=textures/
      --sites matrices --sites biases --ridge 0.01 -o calibrated/
    """
    from eutectic.calibration import calibrate as run
    from eutectic.data.row_files import check_split

    named, sources = named_paths(models.experts, "expert"), pairs(models.data, "--data")
    if reading.split is not None:
        check_split(list(sources.values()), reading.split)
    options: dict[str, Any] = {**vars(strength), **vars(choice), "task": reading.task}
    if choice.sites is None:
        del options["sites"]
    with progress_bar("calibrating") as bar:
        report = run(
            models.merged,
            named,
            sources,
            output,
            base=models.base,
            progress=bar,
            reading=reading.how(),
            threads=threads,
            restart=restart,
            **options,
        )
    if json:
        print_json(dataclasses.asdict(report))
        return
    table = grid()
    counts = ", ".join(counted(n, _ONE[kind], kind) for kind, n in report.calibrated.items())
    table.add_row("calibrated", counts)
    for why, names in report.left.items():
        table.add_row("as merged", escape(f"{few(names, 1)}: {why}"))
    for task, own in report.data.items():
        apart = f", {own['held_out']} held out" if own["held_out"] else ""
        table.add_row(task, counted(own["examples"], "input") + apart)
    resumed = ", continued" if report.resumed else ""
    table.add_row("took", f"{report.seconds:.1f} s{resumed}")
    out.print(table)
    _show_errors(report.layers)
    where = "held-out inputs" if report.held_out else "the inputs that the layers were fitted to"
    tell("error", f"of a layer's outputs against its expert's own, relative, on {where}")
    tell_done("written", report.output)


def _show_errors(layers: Any) -> None:
    """Print the errors before and after, of layers evenly over the depth and the last one."""
    names = list(layers)
    step = max(1, -(-len(names) // _SHOWN))
    shown = [*names[::step], *([] if (len(names) - 1) % step == 0 else [names[-1]])]
    columns = [(key, [f"{layers[name][key]:.3f}" for name in shown]) for key in ("before", "after")]
    print_named(shown, [columns], title="layer")
