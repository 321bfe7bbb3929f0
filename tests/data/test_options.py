"""Keyword arguments as records: unknown names are refused, and none is forgotten."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import eutectic
from eutectic.cluster.where import Where
from eutectic.errors import RequestError
from eutectic.evaluation.pairs import EvaluationSettings
from eutectic.evaluation.run import EvaluationOptions
from eutectic.statistics.settings import CollectOptions, Settings


def test_every_option_is_declared_for_type_checkers():
    where = {*Where.__annotations__, "device"}  # where it is done, which no figure shows
    measured = {f.name for f in fields(EvaluationSettings)}
    assert measured | where == EvaluationOptions.__annotations__.keys()
    named = {"grams", "output_gradients"}
    summed = {f.name for f in fields(Settings)} - named
    assert summed | where | {"shards", "open_model"} == CollectOptions.__annotations__.keys()


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match=r"no option 'fischer'\. Did you mean 'fisher'\?"):
        eutectic.collect(torch.nn.Linear(2, 1), [torch.eye(2)], fischer=True)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match=r"no option 'spit'\. Did you mean 'split'\?"):
        eutectic.evaluate({}, spit="test")  # type: ignore[call-arg]
