"""What a merge would do, as a record: from headers, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eutectic.cluster.where import taken_for_merge
from eutectic.conventions import layer_group
from eutectic.errors import Note, RequestError
from eutectic.execution.executors import Limits, limits_of
from eutectic.execution.run import recipe_from
from eutectic.methods import get_method
from eutectic.planning.adapter_outlook import adapter_bytes, adapter_outlook, outlook_in_words
from eutectic.planning.cost import check_memory, merged_by, plan_cost, tensor_cost
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan, output_layout
from eutectic.recipes.load import Source
from eutectic.recipes.mergekit_stages import read_stages
from eutectic.recipes.schema import Recipe
from eutectic.recipes.units import format_bytes
from eutectic.sentences import shares as in_words
from eutectic.tables import InNotebooks, Shown, data_frame, facts, table


@dataclass(frozen=True)
class PlanReport(InNotebooks):
    """What a merge would do.

    Attributes:
        method: the method's name.
        post: what follows it, by name; None where nothing does.
        scale: α; None where it is searched.
        search: the search for α, as the recipe asks for it.
        threads: jobs side by side.
        memory_limit_bytes: what they may take together.
        device: where matrices are merged; what is too large for it, on the CPU.
        device_memory_bytes: what tasks may take of it; None for the CPU.
        cost: estimates: `read_bytes`, `write_bytes`, `peak_bytes`, `seconds`. What an adapter is
            written with is a bound where experts or energies say how much changes.
        files: number of files of the output's weights.
        merged_by: number of tensors per method that merges them ("copy" for copies).
        shares: parts of the experts' numbers that are `merged`, `kept` as heads and `left`.
        heads: expert -> names of the tensors kept for it alone.
        notes: what a user should know.
        tensors: for every tensor of the output `name`, `shape`, `dtype`, `treatment`, `method`,
            `post` (what follows it), `merged_by` (both in words), `scale`, `why`, its costs, and
            the `route` through linear algebra, if asked for.
        note_records: the notes as records, for programs.
        adapter: where the output is one: `layers` and `ranks` of thin factors, `modules_to_save`,
            and what it does not hold (`not_held`, `loose`, `others`).
    """

    method: str
    scale: float | None
    search: Mapping[str, Any] | None
    threads: int
    memory_limit_bytes: int
    cost: Mapping[str, Any]
    files: int
    merged_by: Mapping[str, int]
    shares: Mapping[str, Any]
    heads: Mapping[str, list[str]]
    notes: tuple[str, ...]
    tensors: tuple[Mapping[str, Any], ...] = field(repr=False)
    note_records: tuple[Note, ...] = field(default=(), repr=False)
    adapter: Mapping[str, Any] | None = None
    device: str = "cpu"
    device_memory_bytes: int | None = None
    post: str | None = None

    @property
    def named(self) -> str:
        """The method and what follows it, in words."""
        return self.method if self.post is None else f"{self.method} + {self.post}"

    def grouped(self) -> list[dict[str, Any]]:
        """Return the tensors with like layers in one row (`layer.*.weight ×12`).

        Small tensors are in one row per treatment.
        """
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in self.tensors:
            small = row["treatment"] == "vector" and row["kinds"] == ["small"]
            pattern = layer_group(row["name"])
            what = ("biases and norms", ()) if small else (pattern, tuple(row["shape"]))
            key = (*what, row["treatment"], row["merged_by"], row["scale"])
            groups.setdefault(key, []).append(row)
        folded: list[dict[str, Any]] = []
        for (pattern, shape, *_), members in groups.items():
            name = f"{pattern} ×{len(members)}" if len(members) > 1 else members[0]["name"]
            folded.append({**members[0], "name": name, "shape": shape})
        return folded

    def to_pandas(self) -> Any:
        """Return the tensors as a data frame, one row each, by name."""
        return data_frame(self.tensors, "name")

    def __repr__(self) -> str:
        """Show the groups of tensors, what they cost, and the notes."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        rows = [
            [r["name"], shape_of(r), r["treatment"], r["merged_by"], alpha_of(r)]
            for r in self.grouped()
        ]
        scale = f"{self.scale:g}" if self.search is None else f"by {self.search['search']}"
        cost = {key: format_bytes(self.cost[f"{key}_bytes"]) for key in ("read", "write", "peak")}
        known = {
            "method": f"{self.named}, scale {scale}",
            "merged by": ", ".join(f"{name} {n}" for name, n in self.merged_by.items()),
            "shares": in_words(self.shares),
            "costs": f"{cost['read']} read, {cost['write']} written, peak about {cost['peak']}",
            "adapter": "\n".join(outlook_in_words(self.adapter)) if self.adapter else "",
            "notes": "\n".join(self.notes),
        }
        known = {key: text for key, text in known.items() if text or key != "adapter"}
        headers = ["tensor", "shape", "treatment", "method", "α"]
        return facts("PlanReport", known), table(headers, rows)


def shape_of(row: Mapping[str, Any]) -> str:
    """Return a row's shape in words."""
    return "×".join(map(str, row["shape"])) or "small"


def alpha_of(row: Mapping[str, Any]) -> str:
    """Return a row's α in words."""
    if row["method"] == "copy":
        return ""
    return "searched" if row["scale"] is None else f"{row['scale']:g}"


def plan(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    threads: int | None = None,
    memory: str | int | None = None,
    explain: bool = False,
    **options: Any,
) -> PlanReport:
    """Return what a merge would do, from the files' headers: quick, and nothing is written.

    Args:
        recipe: as for `eutectic.merge`.
        threads: jobs side by side (default: the cores of this process).
        memory: limit, such as "4GB" (default: 60 % of what is available).
        explain: say which linear algebra each matrix would take, and why.
        **options: `executor`, `ray_address` and `device`, keys of a recipe and parameters of the
            method, as for `eutectic.merge`.

    Returns:
        A report, which shows like layers in one row; `.to_pandas()` has every tensor.

    Raises:
        RequestError: every fault of the recipe at once, with its line.

    Example:
        >>> eutectic.plan(base="base", experts={"a": "a", "b": "b"}, method="iso_c")
        ... # doctest: +SKIP
    """
    where = taken_for_merge(options)
    stages = read_stages(recipe) if isinstance(recipe, (str, Path)) else ()
    if stages:
        raise RequestError(
            f"{recipe}: has {len(stages)} stages, of which the later read what the first write.\n"
            "See them one by one with `eutectic plan`, or plan each as a recipe of its own."
        )
    checked, source = recipe_from(recipe, options)
    allowed = limits_of(threads, memory, **where, models=checked.runs_models)
    return planned(checked, source, allowed, explain=explain)


def planned(
    checked: Recipe, source: Source, limits: Limits, *, explain: bool = False
) -> PlanReport:
    """Return what a checked recipe would do."""
    count, limit = limits.threads, limits.memory
    with open_inputs(checked, source) as inputs:
        made = make_plan(checked, inputs, source)
        check_memory(made, inputs, limits.of_one_task)
        total = plan_cost(made, inputs, count)
        costs = {t.name: tensor_cost(t, inputs) for t in made.tensors}
        files = len(output_layout(made, inputs).files) if made.adapter is None else 1
        held = None if made.adapter is None else adapter_outlook(made, inputs)
        if made.adapter is not None:
            written = adapter_bytes(made, inputs)
            total = replace(total, write_bytes=sum(written.values()))
            costs = {n: replace(c, write_bytes=written.get(n, 0)) for n, c in costs.items()}
    searched = made.search
    return PlanReport(
        made.method.name,
        made.scale if searched is None else None,
        None if searched is None else searched.model_dump(mode="json"),
        count,
        limit,
        vars(total),
        files,
        merged_by(made),
        made.shares.record,
        {n: [e.name for e in own] for n, own in made.heads.items()},
        tuple(map(str, made.notes)),
        tuple(_row(t, costs[t.name], explain, searched is not None) for t in made.tensors),
        tuple(made.notes),
        held,
        limits.device.name,
        limits.device.memory,
        None if made.post is None else made.post.name,
    )


def _row(planned: Any, cost: Any, explain: bool, searched: bool) -> dict[str, Any]:
    return {
        "name": planned.name,
        "shape": list(planned.shape),
        "dtype": str(planned.dtype).removeprefix("torch."),
        "treatment": planned.treatment.value,
        "method": planned.method,
        "post": None if planned.post is None else planned.post.name,
        "merged_by": planned.merged_by,
        "scale": planned.scale if not (searched and planned.tunable) else None,
        "why": planned.why,
        "kinds": [note.kind for note in planned.reason],
        "peak_bytes": cost.peak_bytes,
        "read_bytes": cost.read_bytes,
        "write_bytes": cost.write_bytes,
        "seconds": cost.seconds,
        "route": _route(planned) if explain else "",
    }


def _route(planned: Any) -> str:
    if not planned.merged or planned.treatment.value != "matrix":
        return ""
    explain, stack = get_method(planned.method).explain, len(planned.experts)
    if explain is None:
        return ""
    return "; ".join(
        explain((stack, *shape), planned.parameters, planned.precision)
        for shape in dict.fromkeys(planned.matrix_shapes)
    )
