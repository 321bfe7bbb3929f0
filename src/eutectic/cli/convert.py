"""`eutectic convert`."""

from pathlib import Path

import yaml

from eutectic.cli.console import print_json, tell_done, verb
from eutectic.cli.options import Json, argument, option
from eutectic.errors import RequestError


@verb
def convert(
    recipe: Path = argument(..., "A mergekit configuration."),
    output: Path | None = option(None, "File to write; else it is printed.", "--output", "-o"),
    json: Json = False,
) -> None:
    """Write a mergekit configuration as a recipe of ours, where it can be said.

    Both give the same merge. What has no words in our recipes is told, and nothing is written;
    `eutectic merge` takes the configuration itself.

    Examples:

      eutectic convert mergekit.yml

      eutectic convert mergekit.yml -o recipe.yaml
    """
    from eutectic.checkpoint.writer import write_atomically
    from eutectic.recipes.document import read_document
    from eutectic.recipes.mergekit_convert import converted
    from eutectic.recipes.mergekit_document import is_mergekit
    from eutectic.storage import view

    values, source, faults = read_document(recipe, "a recipe", "models and merge_method")
    if faults or not is_mergekit(values):
        raise RequestError(
            f"{recipe} is no mergekit configuration: it has no merge_method, models, slices or "
            "modules.\nRecipes of ours need no conversion."
        )
    folder = Path.cwd() if output is None else output.absolute().parent
    found = converted(values, source, folder)
    if json:
        print_json(found)
        return
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, default_flow_style=None)
    if output is None:
        print(text, end="")  # noqa: T201 - a file for pipes, not for people
        return
    view(output)
    if output.exists():
        raise RequestError(f"{output} exists.\nChoose another name, or remove it.")
    write_atomically(output, text.encode())
    tell_done("written", output)
