"""A LoRA adapter of a full fine-tune: the change of one checkpoint, cut layer by layer."""

import re
from pathlib import Path
from typing import Any, Literal

from eutectic.execution.run import MergeReport, merge
from eutectic.notebook import with_bar

NAME = "fine-tune"  # what the one expert is called in records, if its path has no name for it
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")  # that experts may have


@with_bar("extracting")
def extract(
    expert: str | Path,
    *,
    base: str | Path,
    output: str | Path,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    others: Literal["error", "drop", "save"] = "error",
    tables: Literal["save", "low_rank"] = "save",
    statistics: str | Path | None = None,
    **options: Any,
) -> MergeReport:
    """Write a PEFT adapter that makes `expert` of `base`, as nearly as its rank allows.

    Δ = W − W₀ of every linear layer becomes B·A, the nearest product of its rank, found by a
    randomised range finder whose error is measured (arXiv 0909.4061). Streamed: one layer is in
    memory at a time, and no model class is needed. Tables of tokens and heads that differ go along
    whole, with rows that the base lacks.

    Args:
        expert: a fine-tuned or merged checkpoint; an adapter too, to cut it.
        base: the checkpoint that it is to be added to.
        output: folder to write, as for `eutectic.merge`; a killed run is continued.
        rank: directions in each layer; "auto" for as many as `energy` asks for.
        energy: share of each layer's ‖Δ‖² that is kept, as far as `rank` allows; 0.99 by default
            where no rank is given.
        others: norms and biases that change: refused, left as in the base, or saved beside.
        tables: "save" keeps changed tables of tokens whole, "low_rank" as factors.
        statistics: a file of `eutectic collect EXPERT`: the cut then keeps the most of what Δ adds
            to the layers' outputs, not of ‖Δ‖², and `energy` is the share of that.
        **options: as for `eutectic.merge`: `threads`, `memory`, `restart`, `progress`, `executor`,
            `ray_address`, `device`, and other keys of a recipe, such as `dtype` (of what is
            written; factors are float32 by default, other tensors as in the base), `tensors`,
            `unmatched` or `heads`.

    Returns:
        A report; `records[tensor]["adapter"]` has rank and lost energy of each layer.

    Raises:
        RequestError: the request is wrong, or norms and biases change and `others` is "error".

    Example:
        >>> eutectic.extract("tuned", base="base", output="adapter", rank=32,
        ...                  others="drop")  # doctest: +SKIP
    """
    stated: dict[str, Any] = {"tables": tables, "others": others}
    if rank is None and energy is None:
        rank = "auto"
    if rank is not None:
        stated["rank"] = rank
    if energy is not None:
        stated["energy"] = energy
    spec = {"path": str(expert)}
    if statistics is not None:
        spec["statistics"] = str(statistics)
        stated["cut"] = "inputs"
    stated_recipe = {
        "base": str(base),
        "experts": {_name_of(expert): spec},
        "method": "task_arithmetic",
        "scale": 1.0,
        "adapter": stated,
    }
    return merge(stated_recipe, output=output, **options)


def _name_of(expert: str | Path) -> str:
    """Return what the expert is called: the last part of its path, if experts may be called so."""
    name = Path(expert).name
    taken = name in ("base", "initial")
    return NAME if taken or not _NAMES.fullmatch(name) else name
