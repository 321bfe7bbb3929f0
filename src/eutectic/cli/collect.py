"""`eutectic collect`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from eutectic.cli.console import out, print_json, progress_bar, verb
from eutectic.cli.options import (
    Device,
    ImageColumn,
    MaxLength,
    SourceColumn,
    Split,
    TargetColumn,
    Task,
    TextColumn,
    TextPairColumn,
    TrustCode,
    given_options,
    refuse,
)
from eutectic.errors import RequestError
from eutectic.recipes.units import format_bytes, parse_bytes

# What only some collections look at.
_WITH_GRADIENTS = ("head", "labels", "seed", "label_column")
_WITH_HEAD = ("pooling", "normalize")
_ADDING = {"output", "add", "json"}


@verb
def collect(
    context: typer.Context,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="The expert: a folder, or an adapter folder with --base."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Statistics file to write.")] = ...,  # type: ignore[assignment]
    data: Annotated[
        str | None,
        typer.Option(
            help="Proxy data: jsonl, csv, tsv, parquet, folder of images, `datasets` folder, or "
            "module:function."
        ),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base of an adapter.")] = None,
    task: Task = None,
    output_gradients: Annotated[
        bool, typer.Option("--output-gradients", help="Also Grams of output gradients (K-FAC).")
    ] = False,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="Also the diagonal Fisher of all parameters.")
    ] = False,
    block_fisher: Annotated[
        bool, typer.Option("--block-fisher", help="Also the block Fisher of vectors.")
    ] = False,
    labels: Annotated[
        str, typer.Option(help="data: labels of the data; sample: drawn from the model.")
    ] = "data",
    head: Annotated[
        Path | None,
        typer.Option(
            help="A linear head beside the checkpoint: safetensors with `weight` and `bias`."
        ),
    ] = None,
    pooling: Annotated[
        str, typer.Option(help="Features that --head takes: mean, cls or pooler.")
    ] = "mean",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale those features to length 1 first.")
    ] = False,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many (with gradients: 1000).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 16,
    max_length: MaxLength = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many directions, and a diagonal, of wider layers."),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Parameters to observe.")
    ] = None,
    convolutions: Annotated[
        bool, typer.Option("--convolutions", help="Observe convolutions too.")
    ] = False,
    unmatched: Annotated[
        str, typer.Option(help="Layers whose inputs fit no mask: error, all or skip.")
    ] = "error",
    seed: Annotated[int, typer.Option(help="Seed of sampled labels.")] = 0,
    share_inputs: Annotated[
        bool,
        typer.Option(
            "--share-inputs/--no-share-inputs", help="Store once what layers with one input share."
        ),
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of the stored sums: float32 or float64.")] = "float32",
    memory: Annotated[
        str | None, typer.Option(help="Limit for the running sums, such as 4GB; more passes.")
    ] = None,
    device: Device = "cpu",
    split: Split = None,
    trust_code: TrustCode = False,
    text_column: TextColumn = "text",
    text_pair_column: TextPairColumn = "text_pair",
    label_column: Annotated[str, typer.Option(help="Column of labels.")] = "label",
    source_column: SourceColumn = "source",
    target_column: TargetColumn = "target",
    image_column: ImageColumn = "image",
    add: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Add statistics of other data; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Collect an expert's statistics over its proxy data, or add statistics files.

    The unfinished state is kept in OUTPUT.partial; a killed run is continued by the same command.

    Examples:
      eutectic collect ./sst2 --data proxy.jsonl -o sst2.stats.safetensors

      eutectic collect ./sst2-lora --base ./base --data proxy.csv -o sst2.stats.safetensors

      eutectic collect ./sst2 --data proxy.jsonl --output-gradients --labels sample -o x.safetensors

      eutectic collect ./sst2 --head sst2-head.safetensors --output-gradients \
          --labels sample --data proxy.jsonl -o sst2.stats.safetensors

      eutectic collect --add first.safetensors --add second.safetensors -o both.safetensors
    """
    if dtype not in ("float32", "float64"):
        raise RequestError(f"--dtype {dtype}: allowed are float32 and float64.")
    import torch

    from eutectic.planning.notes import some
    from eutectic.statistics import add_statistics, load_statistics
    from eutectic.statistics import collect as run
    from eutectic.statistics.data import open_batches
    from eutectic.statistics.encode import Columns
    from eutectic.statistics.heads import read_head
    from eutectic.statistics.models import load_model
    from eutectic.statistics.rows import check_split

    started = time.monotonic()
    made_up: list[str] = []
    given = given_options(context)
    if checkpoint is None:
        if data is not None or not add:
            raise RequestError(
                "name a CHECKPOINT and its --data, or statistics files to --add.\n"
                "Example: eutectic collect ./expert --data proxy.jsonl -o expert.stats.safetensors"
            )
        refuse(
            [option for name, option in given.items() if name not in _ADDING],
            "for collecting, and files are only added.",
            "Name a CHECKPOINT and its --data to collect and add.",
        )
        result = add_statistics(add, output)
    else:
        if data is None:
            raise RequestError(f"{checkpoint}: no data to run it on; name them with --data.")
        gradients = output_gradients or fisher or block_fisher
        _check_given(given, gradients, labels)
        if split is not None:
            check_split([data], split)
        if head is not None and task not in (None, "feature-extraction"):
            raise RequestError(f"--head is for bare models, not for --task {task}.\nLeave it out.")
        own = None if head is None else read_head(head, pooling, normalize)  # pyright: ignore[reportArgumentType]
        wanted = "feature-extraction" if own is not None else task
        loaded = load_model(checkpoint, base, wanted, device)  # pyright: ignore[reportArgumentType]
        made_up = list(loaded.made_up)
        if gradients:
            loaded.check_head(own)
        batches = open_batches(
            data,
            loaded,
            columns=Columns(
                text=text_column,
                text_pair=text_pair_column,
                label=label_column,
                source=source_column,
                target=target_column,
                image=image_column,
            ),
            batch_size=batch_size,
            max_length=max_length,
            max_examples=max_examples,
            split=split,
            trust_code=trust_code,
            needs_labels=gradients and labels != "sample",
            classes=None if own is None else len(own.bias),
        )
        for file in add or ():
            load_statistics(file)  # a file that cannot be added is told before any data are run
        # What is to be added goes through a file of its own, so that OUTPUT is never half a sum.
        target = output.with_name(f"{output.name}.collected") if add else output
        with progress_bar("collecting") as tell:
            result = run(
                loaded.model,
                batches,
                target,
                output_gradients=output_gradients,
                fisher=fisher,
                block_fisher=block_fisher,
                labels=labels,  # pyright: ignore[reportArgumentType]
                head=own,
                max_examples=max_examples,
                layers=layers,
                convolutions=convolutions,
                rank=rank,
                unmatched=unmatched,  # pyright: ignore[reportArgumentType]
                seed=seed,
                share_inputs=share_inputs,
                dtype=getattr(torch, dtype),
                memory_bytes=None if memory is None else parse_bytes(memory),
                fingerprint=loaded.fingerprint,
                progress=lambda done, total: tell(done, total or done + 1, f"batch {done}"),
            )
        if add:
            result = add_statistics([result, *add], output)
            target.unlink()
    report: dict[str, Any] = {
        "output": str(output),
        "bytes": output.stat().st_size,
        "examples": result.provenance["data"]["examples"],
        "layers": len(result),
        "checkpoint": result.fingerprint,
        "unseen": result.provenance["unseen"],
        "skipped": result.provenance["skipped"],
        "made_up": made_up,
        "seconds": round(time.monotonic() - started, 1),
    }
    if json:
        print_json(report)
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("examples", f"{report['examples']:,}")
    table.add_row("parameters", f"{report['layers']:,}")
    for name in report["unseen"]:
        vector = result.provenance["layers"][name]["kind"] == "parameter"
        table.add_row("got no gradient" if vector else "saw no token", name)
    alike: dict[str, list[str]] = {}
    for name, reason in report["skipped"].items():
        alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        table.add_row("left out", f"{some(names)}: {reason}")
    for name in made_up:
        table.add_row("at random", f"{name}: the checkpoint does not hold it")
    table.add_row("took", f"{report['seconds']:.1f} s, {format_bytes(report['bytes'])}")
    out.print(table)
    out.print(f"[bold green]written[/] {output}", highlight=False, soft_wrap=True)


def _check_given(given: Mapping[str, str], gradients: bool, labels: str) -> None:
    """Refuse options that this collection would ignore."""
    if not gradients:
        refuse(
            [given[name] for name in _WITH_GRADIENTS if name in given],
            "for gradients, and none are asked for.",
            "Add --output-gradients, --fisher or --block-fisher.",
        )
    if "head" not in given:
        refuse(
            [given[name] for name in _WITH_HEAD if name in given],
            "for --head, and none is named.",
            "The checkpoint's own head is used as it is.",
        )
    if labels == "sample" and "label_column" in given:
        raise RequestError(
            f"{given['label_column']}: drawn labels take no column.\n"
            "Leave out it or --labels sample."
        )
    if labels == "data" and "seed" in given:
        raise RequestError(
            f"{given['seed']}: labels of the data are not drawn.\nAdd --labels sample."
        )
