"""`eutectic init`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eutectic.cli.console import out, print_json, tell, tell_done, verb
from eutectic.cli.options import Json, argument, option
from eutectic.errors import OutputError, RequestError
from eutectic.words import with_urls

RECIPE, TASKS = "recipe.yaml", "tasks.yaml"


@verb
def init(
    *,
    what: list[str] = argument(
        ...,
        "Checkpoints, adapters, folders that hold several, files and folders of rows.",
        metavar="FOLDER…",
    ),
    base: str | None = option(None, "The model that all started from (default: found out)."),
    data: list[Path] | None = option(
        None,
        "A file of rows, or a folder of such; those called like an expert, as in "
        "data/NAME/test.jsonl, are found beside the experts. Repeatable.",
    ),
    output: Path = option(Path(), "Folder for both files.", "--output", "-o"),
    json: Json = False,
) -> None:
    """Write a recipe and a file of tasks to edit, from what lies in folders.

    Nothing is merged, and nothing that is there is replaced. The base is the model that is called
    so, that adapters name, or that all others are nearest to.

    Examples:

      eutectic init ./base ./sst2 ./mnli

      eutectic init ./base ./sst2 ./mnli data/

      eutectic init runs/ --base org/model --data data/sst2.jsonl -o study/
    """
    from eutectic.checkpoint.writer import write_atomically
    from eutectic.drafting import draft
    from eutectic.storage import view

    view(output)
    files = {RECIPE: output / RECIPE, TASKS: output / TASKS}
    for path in files.values():
        if path.exists() or path.is_symlink():
            raise RequestError(
                f"{path} is there already, and is not replaced.\nMove it away, or name another "
                "folder with --output."
            )
    found = draft(what, output, base=base, data=data or ())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror or error}).") from None
    write_atomically(files[RECIPE], found.recipe.encode())
    write_atomically(files[TASKS], found.tasks.encode())
    if json:
        written = {name: str(path) for name, path in files.items()}
        print_json({**dataclasses.asdict(found), "written": written})
        return
    for text in found.found:
        tell("found", text)
    for text in found.open:
        tell("to fill in", text)
    for path in files.values():
        tell_done("written", path)
    recipe, tasks = (with_urls(str(path)) for path in files.values())
    for line in (
        f"next: eutectic plan {recipe}",
        f"      eutectic compare {recipe} --tasks {tasks} -o comparison/",
    ):
        out.print(line, style="dim", highlight=False, soft_wrap=True)
