"""Tables of tokens whose rows stand for other tokens in other models: which row goes where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry
from eutectic.checkpoint.reader import TensorSource
from eutectic.conventions import is_token_embedding
from eutectic.conventions_vocabulary import (
    is_input_table,
    is_table_of_tokens,
    may_have_rows_of_tokens,
)
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import Donor, FilledRows, RowMap, Source, TensorPlan
from eutectic.recipes.document import Source as Document
from eutectic.recipes.schema import Recipe
from eutectic.types import Treatment
from eutectic.vocabulary.agreement import BASE, Vocabulary, agree, conflicts
from eutectic.vocabulary.chat_templates import (
    AUTO,
    BUILT_IN,
    most_common,
    template_fault,
    template_of,
)
from eutectic.vocabulary.row_places import places
from eutectic.vocabulary.tokenizer_files import unwritable
from eutectic.vocabulary.tokens import Tokens, files_identity, read_tokens, tokens_of_gguf

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PlannedVocabulary:
    """The vocabulary of an output, and the tensors that have a row for each of its tokens."""

    agreed: Vocabulary
    tensors: frozenset[str]  # of the base
    height: int  # rows of the base's
    based: bool  # whether the recipe names a base, or takes one of its models for its form alone
    folders: Mapping[str, Path]  # model -> folder of its tokenizer

    def meets(self, name: str) -> bool:
        """Tell whether a tensor of the base has a row per token."""
        return name in self.tensors


@dataclass(frozen=True)
class Found:
    """What planning found of vocabularies."""

    planned: PlannedVocabulary | None = None  # None where every row stays where it is
    faults: tuple[Fault, ...] = ()
    notes: tuple[Note, ...] = ()
    chat_template: str | None = None  # Jinja to be written; None leaves the tokenizer's


def find_vocabulary(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    """Return the vocabulary of a recipe's output, what is wrong with it, and what is to be told.

    Without a policy, or with `error`, rows are matched by their number; rows that stand for
    different tokens are told, or refused.
    """
    found = _find(recipe, inputs, document)
    template = _template(recipe, inputs, document)
    return replace(
        found,
        faults=(*found.faults, *template.faults),
        notes=(*found.notes, *template.notes),
        chat_template=template.chat_template,
    )


def _find(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    policy = recipe.vocabulary
    line = document.line("vocabulary")
    if policy is None or policy.source == "error":
        return _by_number(inputs, refused=policy is not None, line=line)
    if inputs.index is None:
        what = "state dicts come without tokenizers, so that no row is known by its token."
        where = "vocabulary"
        return Found(faults=(Fault("no_tokenizer", what, where, line, next="Merge folders."),))
    height, tensors = tables_of(inputs.base.entries, inputs.index)
    if inputs.rows:  # the output layer may be another model's than the table
        held = inputs.base.entries
        sizes = {_rows(e.shape) for n, e in held.items() if is_table_of_tokens(n)}
        likely = {n: _rows(e.shape) for n, e in held.items() if may_have_rows_of_tokens(n)}
        tensors |= {name for name, rows in likely.items() if rows in sizes}
    if not tensors:
        what = "the base has no table of tokens."
        return Found(faults=(Fault("no_tables", what, "vocabulary", line),))
    faults: list[Fault] = []
    models: dict[str, Tokens | None] = {}
    folders = dict(_folders(inputs))
    for name, folder in folders.items():
        try:
            models[name] = None if folder is None else read_tokens(folder)
            if models[name] is None:
                models[name] = _of_gguf(name, inputs)
        except CheckpointError as error:
            whose = "base" if name == BASE else f"expert '{name}'"
            faults.append(Fault("unusable_tokenizer", str(error), whose, line))
    if faults:
        return Found(faults=tuple(faults))
    heights = {BASE: height}
    for name, expert in _experts(inputs):
        heights[name] = _height(expert, tensors, height)
    agreed = agree(policy, models, heights)
    if isinstance(agreed, list):
        return Found(faults=tuple(replace(fault, line=line) for fault in agreed))
    based = recipe.script is None or recipe.script.based
    known = {name: folder for name, folder in folders.items() if folder is not None}
    if why := unwritable(agreed, known[agreed.donor]):
        what = f"the tokenizer of '{agreed.donor}' cannot be written with other tokens: {why}."
        choose = "Save it with transformers (save_pretrained), or choose base or an expert's name."
        return Found(faults=(Fault("unwritable", what, "vocabulary", line, next=choose),))
    planned = PlannedVocabulary(agreed, tensors, height, based, known)
    return Found(planned, notes=tuple(_notes(planned)))


def _template(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    """Return the chat template that the output gets, if the recipe names one."""
    asked, line = recipe.chat_template, document.line("chat_template")
    if asked is None:
        return Found()
    if fault := template_fault(asked, line):
        return Found(faults=(fault,))
    if inputs.index is None:
        what = "state dicts have no tokenizer to put a chat template beside."
        return Found(faults=(Fault("no_tokenizer", what, "chat_template", line),))
    if asked != AUTO:
        return Found(chat_template=BUILT_IN.get(asked, asked))
    try:
        folders = [(n, f) for n, f in _folders(inputs) if f is not None and n != "initial"]
        chosen = most_common({name: template_of(folder) for name, folder in folders})
    except CheckpointError as error:
        return Found(faults=(Fault("unusable_template", str(error), "chat_template", line),))
    if chosen is None:
        return Found(notes=(Note("no_template"),))
    template, owners = chosen
    return Found(notes=(Note("template", tuple(owners)),), chat_template=template)


def tables_of(
    entries: Mapping[str, TensorEntry], index: CheckpointIndex | None
) -> tuple[int, frozenset[str]]:
    """Return how many rows a model's table of tokens has, and which tensors have a row for each.

    The table is known by its name, or by the configuration's `vocab_size`; output layers and
    biases by names and the same number of rows.
    """
    matrices = {n: e.shape for n, e in entries.items() if len(e.shape) == 2}
    exact = [shape[0] for n, shape in matrices.items() if is_token_embedding(n)]
    if not exact:
        stated = index.config.get("vocab_size") if index is not None else None
        wide = [s[0] for n, s in matrices.items() if is_input_table(n) and s[0] == stated]
        exact = wide or [s[0] for n, s in matrices.items() if is_table_of_tokens(n)]
    if not exact:
        return 0, frozenset()
    height = Counter(exact).most_common(1)[0][0]
    return height, frozenset(
        name
        for name, entry in entries.items()
        if may_have_rows_of_tokens(name) and _rows(entry.shape) == height
    )


def _rows(shape: Shape) -> int:
    """Return how many tokens a shape has room for: its rows, or the columns of a single one."""
    return (shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0]) if shape else 0


def _with_rows(shape: Shape, rows: int) -> Shape:
    return (1, rows) if len(shape) == 2 and shape[0] == 1 else (rows, *shape[1:])


def _width(shape: Shape) -> int:
    if len(shape) == 2 and shape[0] == 1:
        return 1
    width = 1
    for length in shape[1:]:
        width *= length
    return width


def _folders(inputs: Inputs) -> Iterator[tuple[str, Path | None]]:
    """Yield the base and the experts with the folders of their tokenizers."""
    index = inputs.index
    yield BASE, None if index is None else _tokenizer_folder(index.folder, index)
    for name, expert in _experts(inputs):
        own = getattr(expert.source, "index", None)
        yield name, None if expert.folder is None else _tokenizer_folder(expert.folder, own)


def _of_gguf(name: str, inputs: Inputs) -> Tokens | None:
    """Return the tokens that a GGUF file lists itself."""
    index = inputs.index
    if name != BASE:
        expert = dict(_experts(inputs))[name]
        index = getattr(expert.source, "index", None)
    table = None if index is None else index.gguf
    return None if table is None else tokens_of_gguf(table.tokenizer)


def _tokenizer_folder(folder: Path, index: CheckpointIndex | None) -> Path:
    """Return the folder of a model's tokenizer: its own, or that of the transformer in it."""
    if index is None or (folder / "tokenizer_config.json").is_file():
        return folder
    inner = next((m.folder for m in index.modules if m.transformer), "")
    return folder / inner if inner else folder


def _experts(inputs: Inputs) -> list[tuple[str, Expert]]:
    initial = [] if inputs.initial is None else [("initial", inputs.initial)]
    return [*inputs.experts.items(), *initial]


def _entry(expert: Expert, name: str) -> TensorEntry | None:
    return expert.entries.get(name) or expert.extra.get(name)


def _height(expert: Expert, tensors: frozenset[str], base: int) -> int:
    """Return the rows of an expert's table of tokens; of an adapter without one, the base's."""
    held = [(n, e) for n in sorted(tensors) if (e := expert.entries.get(n)) is not None]
    tables = [e for n, e in held if is_input_table(n)] or [e for _, e in held]
    return _rows(tables[0].shape) if tables else base


class _Bounded:
    """Tensors of an expert whose tables look larger or smaller than they are."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.is_delta = source.is_delta
        self.notes = source.notes
        self.entries = source.entries

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return a range; CheckpointError beyond the end, for those that compare values."""
        held = self.entries.get(name)
        if held is not None and max(start, stop or 0) > held.numel:
            raise CheckpointError(f"'{name}' has no such rows; they are matched by their tokens.")
        return self._source.read(name, start, stop)

    def fingerprint(self) -> str:
        """Return the identity of the content."""
        return self._source.fingerprint()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return the files."""
        return self._source.identity()

    def close(self) -> None:
        """Release files."""
        self._source.close()


def as_one_size(inputs: Inputs, planned: PlannedVocabulary) -> Inputs:
    """Return inputs whose experts have tables as large as the base's, for whoever asks for shapes.

    Their rows are placed by `with_vocabulary`; nothing reads them by these shapes.
    """
    heights = planned.agreed.heights

    def fitted(expert: Expert, height: int) -> Expert:
        def rows_of(name: str) -> int:
            own = inputs.base.entries.get(name)
            return planned.height if own is None else _rows(own.shape)

        def like_base(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
            return {
                name: replace(entry, shape=_with_rows(entry.shape, rows_of(name)))
                if entry.shape
                and (planned.meets(name) or may_have_rows_of_tokens(name))
                and (planned.meets(name) or _rows(entry.shape) == height)
                else entry
                for name, entry in entries.items()
            }

        return replace(
            expert,
            source=_Bounded(expert.source),
            entries=like_base(expert.entries),
            extra=like_base(expert.extra),
        )

    experts = {name: fitted(e, heights[name]) for name, e in inputs.experts.items()}
    initial = inputs.initial
    if initial is not None:
        initial = fitted(initial, heights["initial"])
    return replace(inputs, experts=experts, initial=initial)


def with_vocabulary(
    plan: TensorPlan, planned: PlannedVocabulary, inputs: Inputs
) -> TensorPlan | Fault:
    """Return the plan of a tensor with its rows placed by the output's vocabulary.

    `inputs` are those that are read. Unchanged for tensors without a row per token.
    """
    own = plan.like if plan.base is None else plan.base.tensor
    if own is None or not planned.meets(own):
        return plan
    if plan.treatment is Treatment.HEAD:
        what = "has a row per token, so that it cannot be each expert's own beside one vocabulary."
        return Fault("head_of_vocabulary", what, plan.name, next="Leave the rule out.")
    shape = inputs.base.entries[own].shape
    width = _width(shape)
    # The base lends the rows that models lack, also where it is not subtracted.
    lent_by = inputs.rows[own].like[0] if own in inputs.rows else BASE
    lends = (planned.based and lent_by == BASE) or plan.base is not None
    sources: list[Source] = [*([Source(BASE, own)] if lends else []), *plan.experts]
    if plan.initial is not None:
        sources.append(plan.initial)
    heights: dict[str, int] = {}
    tensors: dict[str, str] = {}
    donors: list[str] = []
    for source in sources:
        if source.tensor is None:
            continue
        full = True
        if source.owner == BASE:
            held = inputs.base.entries[source.tensor].shape
        else:
            expert = inputs.owner(source)
            entry = _entry(expert, source.tensor)
            if entry is None:  # an adapter that does not act on it: unchanged as a whole
                continue
            held = entry.shape
            full = source.tensor in expert.stored and source.tensor not in expert.factored
            if _width(held) != width:
                what = f"'{source.owner}' has rows of {_width(held)} numbers, the base of {width}."
                return Fault("table_width", what, plan.name, got=str(list(held)))
        heights[source.owner], tensors[source.owner] = _rows(held), source.tensor
        if full and source.owner != "initial" and source.owner not in donors:
            donors.append(source.owner)
    size = planned.agreed.size
    placed = places(planned.agreed, heights, donors, based=plan.base is not None)

    def mapped(source: Source, behind: Source | None = None) -> Source:
        found = placed.get(source.owner) if source.tensor is not None else None
        if found is None or found.is_whole(size, heights[source.owner]):
            return source
        filled = tuple(
            FilledRows(
                rows.first,
                rows.count,
                tuple(Donor(owner, tensors[owner], row) for owner, row in rows.donors),
            )
            for rows in found.filled
        )
        if found.padding is not None:
            filled += (FilledRows(*found.padding, (), average=True, behind=behind),)
        return replace(source, rows=RowMap(width, found.runs, filled))

    base = None if plan.base is None else mapped(plan.base)
    initial = None if plan.initial is None else mapped(plan.initial, base)
    return replace(
        plan,
        shape=_with_rows(shape, size),
        base=base,
        experts=tuple(mapped(s, None if s.owner == BASE else base) for s in plan.experts),
        initial=initial,
    )


def head_faults(
    heads: Mapping[str, Sequence[TensorEntry]], planned: PlannedVocabulary
) -> list[Fault]:
    """Refuse heads over the tokens of one expert, beside a table of the output's tokens."""
    agreed = planned.agreed
    what = "has a row for each of the expert's own tokens, which are not those of the output."
    choose = "Choose heads: base or drop, or that expert's vocabulary."
    return [
        Fault("head_of_vocabulary", f"expert '{name}': {what}", entry.name, next=choose)
        for name, own in heads.items()
        for entry in own
        if may_have_rows_of_tokens(entry.name)
        and _rows(entry.shape) == agreed.heights[name]
        and (agreed.models[name].rows != agreed.rows or agreed.size != agreed.heights[name])
    ]


def _by_number(inputs: Inputs, *, refused: bool, line: int) -> Found:
    """Look for rows that stand for different tokens, where rows are matched by their number."""
    if inputs.index is None or not tables_of(inputs.base.entries, inputs.index)[1]:
        return Found()
    if inputs.rows:
        held = inputs.base.entries
        sizes = {n: _rows(e.shape) for n, e in held.items() if is_table_of_tokens(n)}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{rows:,} in '{name}'" for name, rows in sizes.items())
            what = f"the tables of tokens are of models with different numbers of rows: {listed}."
            choose = (
                "Match their rows by tokens (vocabulary: union, or tokenizer: {source: union})."
            )
            return Found(faults=(Fault("table_size", what, "vocabulary", line, next=choose),))
    folders = [(name, folder) for name, folder in _folders(inputs) if folder is not None]
    try:
        identities = {name: files_identity(folder) for name, folder in folders}
        if not identities.get(BASE) or len({i for i in identities.values() if i}) < 2:
            return Found()
        read: dict[str, Tokens | None] = {}  # identity -> tokens
        models: dict[str, Tokens | None] = {}
        for name, folder in folders:
            key = identities[name]
            if key not in read:
                read[key] = read_tokens(folder) if key else None
            models[name] = read[key]
        found = conflicts(models)
    except CheckpointError as error:
        if not refused:
            return Found()  # nobody asked for tokens, and rows are where they are
        return Found(faults=(Fault("unusable_tokenizer", str(error), "vocabulary", line),))
    notes = [
        Note(
            "other_tokens",
            (name,),
            {"count": len(rows), "row": rows[0][0], "base": rows[0][1], "own": rows[0][2]},
            "warning",
        )
        for name, rows in found.items()
    ]
    if refused:
        choose = "Choose vocabulary: union, base, intersection or an expert's name."
        faults = [Fault("other_tokens", note.text, line=line, next=choose) for note in notes]
        return Found(faults=tuple(faults))
    return Found(notes=tuple(notes))


def _notes(planned: PlannedVocabulary) -> Iterator[Note]:
    """Yield what a user should know of the output's vocabulary."""
    agreed = planned.agreed
    numbers = {
        "policy": agreed.policy.source,
        "tokens": len(agreed.rows),
        "rows": agreed.size,
        "before": planned.height,
    }
    yield Note("vocabulary", (), numbers)
    if agreed.new:
        owners = Counter(agreed.new.values())
        told = {"count": len(agreed.new), "owners": dict(owners)}
        yield Note("tokens_added", tuple(agreed.new), told)
    if agreed.created:
        yield Note("tokens_created", agreed.created)
    if agreed.removed:
        yield Note("tokens_removed", agreed.removed, {"count": len(agreed.removed)})
    if agreed.assumed:
        yield Note("tokenizer_assumed", agreed.assumed)
    absent: set[str] = set(agreed.rows)
    for name in agreed.models:
        lacking = agreed.lacking(name)
        absent &= set(lacking)
        if name == BASE:
            lacking = [token for token in lacking if token not in agreed.new]
        if lacking:
            told = {"model": name, "count": len(lacking)}
            yield Note("tokens_lacking", tuple(lacking), told)
    nowhere = tuple(t for t in agreed.rows if t in absent and t not in agreed.policy.tokens)
    if nowhere:
        yield Note("tokens_without_row", nowhere, {"count": len(nowhere)}, "warning")
