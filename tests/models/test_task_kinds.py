"""One spelling of every kind of task; older ones are understood."""

from __future__ import annotations

import pytest

from eutectic.errors import RequestError
from eutectic.models.task_kinds import (
    ARCHITECTURES,
    COLLECTED,
    MODEL_CLASSES,
    TASK_KINDS,
    kind_of_architectures,
    spelled,
    task_kind,
)


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("causal-lm", "language-model"),
        ("causal_lm", "language-model"),
        ("seq2seq", "sequence-to-sequence"),
        ("text_classification", "text-classification"),
        ("lm-eval", "lm-eval"),
    ],
)
def test_older_spellings_are_understood(written: str, kind: str) -> None:
    assert task_kind(written) == kind


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_the_spelling_in_force_stays(kind: str) -> None:
    assert task_kind(kind) == kind


def test_unknown_kinds_are_refused_with_the_nearest() -> None:
    assert spelled("made_up") == "made_up"
    with pytest.raises(RequestError, match="unknown task 'language-modl'.*language-model"):
        task_kind("language-modl")
    with pytest.raises(RequestError, match="unknown task 'function'; known are text-class"):
        task_kind("function", COLLECTED)


def test_every_kind_that_runs_a_model_has_a_class_and_an_architecture() -> None:
    assert MODEL_CLASSES.keys() == ARCHITECTURES.keys() == set(TASK_KINDS) - {"function"}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("GPT2LMHeadModel", "language-model"),
        ("LlamaForCausalLM", "language-model"),
        ("T5ForConditionalGeneration", "sequence-to-sequence"),
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", None),
    ],
)
def test_the_configuration_tells_the_kind(architecture: str, kind: str | None) -> None:
    assert kind_of_architectures([architecture]) == kind
