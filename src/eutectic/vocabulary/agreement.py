"""One vocabulary for models whose vocabularies differ, by a policy: which token has which row.

Tokens are matched by their text. Nothing here reads a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from eutectic.errors import Fault, suggest
from eutectic.vocabulary.policy import TokenRow, VocabularyPolicy
from eutectic.vocabulary.tokens import Tokens

BASE = "base"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of an output, and those of the models that it is made of.

    Attributes:
        policy: what was asked for.
        donor: the model whose tokenizer the output's begins with.
        rows: token -> row of the output.
        size: rows of the output's tables.
        models: model -> its tokens.
        heights: model -> rows of its table of tokens.
        new: token that the donor's tokenizer lacks -> the model that it is taken from.
        removed: tokens of the donor's tokenizer that the output lacks.
        created: tokens that a rule adds to the tokenizer.
        assumed: models without a tokenizer of their own; they have the donor's base's.
    """

    policy: VocabularyPolicy
    donor: str
    rows: Mapping[str, int]
    size: int
    models: Mapping[str, Tokens]
    heights: Mapping[str, int]
    new: Mapping[str, str] = field(default_factory=dict[str, str])
    removed: tuple[str, ...] = ()
    created: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many rows the tokens take."""
        return max(self.rows.values(), default=-1) + 1

    @property
    def renumbered(self) -> bool:
        """Whether a token of the donor has another row in the output."""
        own = self.models[self.donor].rows
        return any(self.rows.get(token, row) != row for token, row in own.items())

    def lacking(self, model: str) -> list[str]:
        """Return the output's tokens that a model has no row for, in the order of rows."""
        own, height = self.models[model].rows, self.heights[model]
        added = set(self.created)
        return [t for t in self.rows if own.get(t, height) >= height and t not in added]


def agree(
    policy: VocabularyPolicy,
    models: Mapping[str, Tokens | None],
    heights: Mapping[str, int],
) -> Vocabulary | list[Fault]:
    """Return the vocabulary of the output, or what is wrong with the request.

    `models` are the base and the experts in order, None where one has no tokenizer: it has the
    base's then. `heights` are the rows of their tables of tokens. A token whose row lies beyond its
    model's table counts as lacking there. Cost: linear in the tokens of all models.
    """
    donor = policy.model
    if donor not in models:
        allowed = ", ".join(["error", "base", "union", "intersection", *_experts(models)])
        what = f"'{donor}' is no policy, and no expert."
        nearest = suggest(donor, ["union", "intersection", *models])
        return [Fault("unknown_vocabulary", what, "vocabulary", allowed=allowed, next=nearest)]
    fallback = models.get(BASE) or next((t for t in models.values() if t is not None), None)
    if fallback is None or models[donor] is None:
        whose = "the base" if donor == BASE else f"expert '{donor}'"
        return [
            Fault(
                "no_tokenizer",
                f"{whose} has no tokenizer, so that nobody knows which token a row stands for.",
                "vocabulary",
                next="Put its tokenizer files beside the weights, or name an expert that has them.",
            )
        ]
    known = {name: own or fallback for name, own in models.items()}
    assumed = tuple(name for name, own in models.items() if own is None)
    own = known[donor]
    rows, new, removed = dict(own.rows), dict[str, str](), ()
    if policy.source == "union":
        faults = _join(rows, new, known, heights, donor)
        if faults:
            return faults
    elif policy.source == "intersection":
        rows, removed = _common(known, heights, donor)
    created = tuple(t for t, rule in policy.tokens.items() if rule.add and t not in rows)
    first = max(rows.values(), default=-1) + 1
    rows |= {token: first + number for number, token in enumerate(created)}
    count = first + len(created)
    size = count
    if policy.padding == "keep" and not removed:
        size = max(size, heights.get(donor, 0))
    step = policy.pad_to_multiple_of or 1
    size = -(-size // step) * step
    found = Vocabulary(policy, donor, rows, size, known, heights, new, removed, created, assumed)
    return _rule_faults(found) or found


def conflicts(models: Mapping[str, Tokens | None]) -> dict[str, list[tuple[int, str, str]]]:
    """Return model -> (row, the base's token, its own) of rows that stand for different tokens."""
    base = models.get(BASE)
    found: dict[str, list[tuple[int, str, str]]] = {}
    if base is None:
        return found
    theirs: dict[int, str] | None = None
    for name, own in models.items():
        if own is None or own.identity == base.identity or own.rows == base.rows:
            continue
        theirs = base.by_row() if theirs is None else theirs
        rows = [
            (row, theirs[row], token)
            for token, row in own.rows.items()
            if row in theirs and theirs[row] != token and base.rows.get(token) != row
            if own.rows.get(theirs[row]) != row
        ]
        if rows:
            found[name] = sorted(rows)
    return found


def _experts(models: Iterable[str]) -> list[str]:
    return [name for name in models if name != BASE]


def _join(
    rows: dict[str, int],
    new: dict[str, str],
    models: Mapping[str, Tokens],
    heights: Mapping[str, int],
    donor: str,
) -> list[Fault]:
    """Add the tokens that the donor lacks: those of vocabularies first, then added ones."""
    place = max(rows.values(), default=-1) + 1
    others = {name: own for name, own in models.items() if own.rows is not models[donor].rows}
    faults: list[Fault] = []
    for added in (False, True):
        for name, own in others.items():
            height = heights.get(name, own.count)
            more = [
                token
                for token, row in sorted(own.rows.items(), key=lambda pair: pair[1])
                if token not in rows and row < height and (token in own.added) is added
            ]
            if more and not added and own.kind != models[donor].kind:
                faults.append(_other_kind(name, own, models[donor], donor, more))
                continue
            for token in more:
                rows[token], new[token] = place, name
                place += 1
    return faults


def _other_kind(name: str, own: Tokens, theirs: Tokens, donor: str, more: list[str]) -> Fault:
    whose = "the base's" if donor == BASE else f"that of '{donor}'"
    return Fault(
        "other_tokenizer",
        f"the tokenizer of '{name}' is another kind ({own.kind or 'unknown'}) than {whose} "
        f"({theirs.kind or 'unknown'}), and {len(more):,} tokens of its vocabulary, such as "
        f"{more[0]!r}, cannot be made by it.",
        "vocabulary",
        next="Choose base, or an expert's name.",
    )


def _common(
    models: Mapping[str, Tokens], heights: Mapping[str, int], donor: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the tokens that every model has, and the donor's special ones; and those removed."""
    own = models[donor]
    kept = {t for t, row in own.rows.items() if row < heights.get(donor, own.count)}
    for name, other in models.items():
        if other.rows is not own.rows:
            height = heights.get(name, other.count)
            kept &= {token for token, row in other.rows.items() if row < height}
    kept |= set(own.special.values())
    removed = tuple(t for t in own.rows if t not in kept)
    if not removed:
        return dict(own.rows), ()
    order = sorted({own.rows[token] for token in kept if token in own.rows})
    place = {row: position for position, row in enumerate(order)}
    return {t: place[row] for t, row in own.rows.items() if t in kept}, removed


def _rule_faults(found: Vocabulary) -> list[Fault]:
    """Return what is wrong with the rules about single tokens."""
    faults: list[Fault] = []
    for token, rule in found.policy.tokens.items():
        where = f"vocabulary.tokens[{token!r}]"
        if token not in found.rows:
            what = "is no token of the output's vocabulary."
            known = [t for t in found.models[found.donor].added if t in found.rows]
            nearest = suggest(token, known)
            nearest = nearest or "Set add: true to add it to the tokenizer."
            faults.append(Fault("unknown_token", what, where, next=nearest))
        elif isinstance(rule.source, TokenRow):
            faults += _source_faults(found, token, rule.source, where)
    return faults


def _source_faults(found: Vocabulary, token: str, source: TokenRow, where: str) -> list[Fault]:
    if source.model not in found.models:
        what = f"'{source.model}' is neither base nor an expert."
        nearest = suggest(source.model, list(found.models))
        return [Fault("unknown_expert", what, where, next=nearest)]
    height = found.heights.get(source.model, 0)
    row = row_of(found, token, source)
    if row is None or row >= height:
        named = f"row {source.row}" if source.row is not None else repr(source.token or token)
        what = f"'{source.model}' has no row for {named}: its table has {height:,} rows."
        return [Fault("no_row", what, where)]
    return []


def row_of(found: Vocabulary, token: str, source: TokenRow) -> int | None:
    """Return the row of a model that a rule about a token names; None where it has none."""
    if source.row is not None:
        return source.row
    return found.models[source.model].rows.get(source.token or token)
