"""`eutectic extract`."""

from pathlib import Path

from eutectic.cli.console import grid, out, print_json, progress_bar, tell_done, tell_notes, verb
from eutectic.cli.corrections import options_in_faults
from eutectic.cli.merge import adapter_rows
from eutectic.cli.options import ExtractOptions, Json, LimitOptions, argument, option
from eutectic.cli.recipe_request import adapter_options
from eutectic.recipes.units import format_bytes


@verb
def extract(
    *,
    expert: str = argument(..., "The fine-tuned or merged model: folder, file or hub id."),
    base: str = option(..., "The model that it was fine-tuned from."),
    output: Path = option(..., "Folder of the adapter; must not hold anything.", "--output", "-o"),
    asked: ExtractOptions,
    limits: LimitOptions,
    restart: bool = option(False, "Discard an unfinished run instead of continuing it."),
    json: Json = False,
) -> None:
    """Make a LoRA adapter of a full fine-tune: its change of the base, layer by layer.

    Streamed, on the CPU, without the model's class. Without --rank and --energy 99 % of each
    layer's change is kept.

    Examples:

      eutectic extract --base ./base ./fine-tuned --rank 32 --others drop -o adapter/

      eutectic extract --base ./base ./merged --energy 0.95 --others save -o adapter/
    """
    import dataclasses

    from eutectic.execution.extraction import extract as run

    stated = adapter_options(asked.rank, asked.energy, asked.others, asked.tables)
    if asked.dtype is not None:
        stated["dtype"] = asked.dtype
    stated_keys = {"adapter": stated, "base": base, "dtype": asked.dtype}
    if asked.statistics is not None:
        stated["statistics"] = asked.statistics
    with (
        options_in_faults(stated_keys, {"dtype": "--dtype"}),
        progress_bar("extracting") as tell,
    ):
        report = run(
            expert,
            base=base,
            output=output,
            restart=restart,
            progress=tell,
            **vars(limits),
            **stated,
        )
    if json:
        tell_notes(report.note_records, warnings_only=True)
        print_json(dataclasses.asdict(report))
        return
    table = grid()
    for label, text in adapter_rows(report.records):
        table.add_row(label, text)
    table.add_row("took", f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_bytes)}")
    out.print(table)
    tell_notes(report.note_records)
    tell_done("written", report.output)
