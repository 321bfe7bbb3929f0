"""What a mergekit configuration says of tokenizers, as the policy that all dialects share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from eutectic.recipes.document import Location
from eutectic.recipes.mergekit_document import Reading, check_keys, mapping_at, model_at
from eutectic.recipes.mergekit_models import MergekitModel

_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_ROW = ("kind", "model", "token", "token_id")

Names = Mapping[MergekitModel, str]  # model of the document -> "base" or an expert's name


def vocabulary_fields(values: Mapping[str, Any], names: Names, reading: Reading) -> dict[str, Any]:
    """Return `vocabulary` and `chat_template` of a recipe; faults are noted.

    `tokenizer_source: X` is `tokenizer: {source: X}`; without either, rows keep their numbers.
    """
    fields: dict[str, Any] = {}
    template = values.get("chat_template")
    if isinstance(template, str) and template:
        fields["chat_template"] = template
    elif template is not None:
        reading.fault("chat_template", "must be auto, a template's name or Jinja.", "chat_template")
    short, long = values.get("tokenizer_source"), values.get("tokenizer")
    if short is not None and long is not None:
        what = "tokenizer_source and tokenizer say the same thing twice."
        reading.fault("tokenizer", what, "tokenizer_source", next="Keep tokenizer.")
    elif short is not None:
        source = _source(short, ("tokenizer_source",), names, reading)
        fields["vocabulary"] = {"source": source, "padding": "trim"}
    elif long is not None:
        fields["vocabulary"] = _tokenizer(long, names, reading)
    return fields


def _tokenizer(value: object, names: Names, reading: Reading) -> dict[str, Any]:
    place: Location = ("tokenizer",)
    given = mapping_at(value, place, reading)
    check_keys(given, _TOKENIZER, place, reading)
    source = _source(given.get("source", "union"), (*place, "source"), names, reading)
    found: dict[str, Any] = {"source": source, "padding": "trim"}
    if given.get("pad_to_multiple_of") is not None:
        found["pad_to_multiple_of"] = given["pad_to_multiple_of"]
        if not isinstance(given["pad_to_multiple_of"], int) or given["pad_to_multiple_of"] < 1:
            what = "must be a whole number of 1 and more."
            reading.fault("pad_to_multiple_of", what, *place, "pad_to_multiple_of")
    tokens: dict[str, Any] = {}
    if given.get("tokens") is not None:
        where = (*place, "tokens")
        for token, rule in mapping_at(given["tokens"], where, reading).items():
            tokens[str(token)] = _token(rule, str(token), (*where, str(token)), names, reading)
    return {**found, "tokens": {token: rule for token, rule in tokens.items() if rule}}


def _token(
    value: object, token: str, place: Location, names: Names, reading: Reading
) -> dict[str, Any] | None:
    """Return the rule of one token; a token without a source of its own is only to be there."""
    given = mapping_at(value, place, reading)
    check_keys(given, _TOKEN, place, reading)
    source, force = given.get("source"), given.get("force", False)
    if not isinstance(force, bool):
        reading.fault("force", "must be true or false.", *place, "force", got=repr(force))
        return None
    if source is None:
        return {"source": "mean", "force": force, "add": True}
    where = (*place, "source")
    kind = cast("Mapping[str, Any]", source).get("kind") if isinstance(source, Mapping) else None
    if kind == "zero":
        return {"source": "zero", "force": force, "add": True}
    if kind == "model_token":
        row = cast("Mapping[str, Any]", source)
        check_keys(row, _ROW, where, reading)
        model = _model(row.get("model"), (*where, "model"), names, reading)
        named = {"token": row.get("token"), "row": row.get("token_id")}
        named = {key: value for key, value in named.items() if value is not None}
        if len(named) != 1:
            what = f"needs one of token and token_id, to say which row '{token}' gets."
            reading.fault("model_token", what, *where)
        return {"source": {"model": model, **named}, "force": force, "add": True}
    model = _model(source, where, names, reading)
    return {"source": {"model": model}, "force": force, "add": True}


def _source(value: object, place: Location, names: Names, reading: Reading) -> str:
    if value in ("union", "base"):
        return str(value)
    return _model(value, place, names, reading)


def _model(value: object, place: Location, names: Names, reading: Reading) -> str:
    model = model_at(value, place, reading)
    if model is None:
        if not reading.faults:
            reading.fault("model", "must name a model.", *place)
        return "base"
    if model not in names:
        allowed = ", ".join(["union", "base", *map(str, names)])
        what = "is none of the models that are merged."
        reading.fault("unknown_model", what, *place, got=str(model), allowed=allowed)
        return "base"
    return names[model]
