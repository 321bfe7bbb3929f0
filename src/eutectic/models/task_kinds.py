"""The kinds of task: one spelling for every verb, recipe, tasks file and Python function.

Older spellings are accepted wherever a user may have written them down; see `ALIASES`.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

from eutectic.errors import RequestError, suggest

TaskKind = Literal[
    "text-classification",
    "pair-classification",
    "regression",
    "image-classification",
    "zero-shot-image-classification",
    "sentence-similarity",
    "retrieval",
    "feature-extraction",
    "sequence-to-sequence",
    "language-model",
    "function",
    "lm-eval",
]
TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)

# Earlier versions of `collect` and of statistics files -> the spelling in force.
# And what others call a kind.
ALIASES: Mapping[str, str] = {
    "causal-lm": "language-model",
    "seq2seq": "sequence-to-sequence",
    "similarity": "sentence-similarity",
    "sts": "sentence-similarity",
}

ZERO_SHOT: TaskKind = "zero-shot-image-classification"
_TWO_TOWERS = ("CLIPModel", "SiglipModel", "Siglip2Model", "AlignModel", "AltCLIPModel")
_SEQUENCES = ("AutoModelForSequenceClassification", ("ForSequenceClassification",))
_CAUSAL = ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"))
# The transformers class that runs each kind, and endings of the names of architectures that have
# its head; `function` runs code of the user's own.
_MODELS: Mapping[TaskKind, tuple[str, tuple[str, ...]]] = {
    "text-classification": _SEQUENCES,
    "pair-classification": _SEQUENCES,
    "regression": _SEQUENCES,
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
    ZERO_SHOT: ("AutoModelForZeroShotImageClassification", _TWO_TOWERS),
    "sentence-similarity": ("AutoModel", ("Model",)),
    "retrieval": ("AutoModel", ("Model",)),
    "feature-extraction": ("AutoModel", ("Model",)),
    "sequence-to-sequence": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "language-model": _CAUSAL,
    "lm-eval": _CAUSAL,
}
MODEL_CLASSES: Mapping[TaskKind, str] = {kind: name for kind, (name, _) in _MODELS.items()}
ARCHITECTURES: Mapping[TaskKind, tuple[str, ...]] = {
    kind: endings for kind, (_, endings) in _MODELS.items()
}
CLASSIFICATION: tuple[TaskKind, ...] = (
    "text-classification",
    "pair-classification",
    "image-classification",
)
# Kinds whose inputs are pictures.
PICTURES: tuple[TaskKind, ...] = ("image-classification", ZERO_SHOT)
# Kinds whose data may name classes.
LABELLED: tuple[TaskKind, ...] = (*CLASSIFICATION, ZERO_SHOT)
# Kinds whose models have one output per label and a head that may lie in a file of its own.
WITH_HEAD: tuple[TaskKind, ...] = (*CLASSIFICATION, "regression")
# Kinds that compare vectors of texts, made by the bare model and what pools its states.
EMBEDDING: tuple[TaskKind, ...] = ("sentence-similarity", "retrieval")
GENERATIVE: tuple[TaskKind, ...] = ("sequence-to-sequence", "language-model")
# Kinds that `collect` and `route` run over proxy data.
COLLECTED: tuple[TaskKind, ...] = (
    *WITH_HEAD,
    ZERO_SHOT,
    "feature-extraction",
    *GENERATIVE,
)


def spelled(name: str) -> str:
    """Return the spelling in force of a kind of task (or of an objective named after one).

    Hyphens and underscores are the same; unknown names are returned as they are.

    >>> spelled("seq2seq"), spelled("causal_lm"), spelled("regression"), spelled("my_task")
    ('sequence-to-sequence', 'language-model', 'regression', 'my_task')
    """
    hyphened = name.replace("_", "-")
    found = ALIASES.get(hyphened, hyphened)
    return found if found in TASK_KINDS else name


def task_kind(name: str, allowed: Sequence[TaskKind] = TASK_KINDS) -> TaskKind:
    """Return a kind of task from any spelling of it."""
    found = spelled(name)
    if found not in allowed:
        raise RequestError(
            f"unknown task '{name}'; known are {', '.join(allowed)}.{suggest(name, allowed)}"
        )
    return cast("TaskKind", found)


def kind_of_architectures(architectures: Sequence[str]) -> TaskKind | None:
    """Return the kind of task that a configuration's `architectures` are made for, if they tell.

    >>> kind_of_architectures(["BertForSequenceClassification"])
    'text-classification'
    """
    for name in architectures:
        for kind, endings in ARCHITECTURES.items():
            # A model with two towers may be asked for either, a bare one for vectors too.
            if kind in ("feature-extraction", ZERO_SHOT, *EMBEDDING):
                continue
            if name.endswith(endings):
                return kind
    return "feature-extraction" if any(name.endswith("Model") for name in architectures) else None
