"""Guards the identity of functions: what differs is told apart, what is the same stays the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eutectic.statistics.function_identity import describe_callable
from helpers.processes import run_code


def closing(value: Any) -> Callable[..., Any]:
    return lambda outputs, batch: (outputs, batch, value)


def defaulting(value: Any) -> Callable[..., Any]:
    def objective(outputs: Any, batch: Any, scale: Any = value) -> Any:
        return outputs, batch, scale

    return objective


class Scaled:
    def __init__(self, scale: Any) -> None:
        self.scale = scale

    def __call__(self, outputs: Any, batch: Any) -> Any:
        return outputs, batch, self.scale

    def method(self, outputs: Any) -> Any:
        return outputs, self.scale


def bound(value: Any) -> Callable[..., Any]:
    return Scaled(value).method


def partially(value: Any) -> Callable[..., Any]:
    return partial(closing, value)


VALUES = [
    (1, 2),
    (1, 1.0),
    (torch.zeros(2), torch.zeros(3)),
    (torch.zeros(2), torch.ones(2)),
    (np.float32(1), np.float32(2)),
    (np.zeros(2), np.ones(2)),
    (Path("a"), Path("b")),
    ({"a": [1]}, {"a": [2]}),
    ({"a", "b"}, {"a", "c"}),
    (len, max),
    (torch.float32, torch.float64),
    (closing(1), closing(2)),
    (nn.Linear(1, 1), nn.Linear(1, 1)),
]


@pytest.mark.parametrize("make", [closing, defaulting, Scaled, bound, partially])
@pytest.mark.parametrize(("one", "other"), VALUES)
def test_what_a_function_holds_is_part_of_it(make: Any, one: Any, other: Any) -> None:
    assert describe_callable(make(one)) == describe_callable(make(one))
    assert describe_callable(make(one)) != describe_callable(make(other))


def test_code_and_constants_are_part_of_a_lambda() -> None:
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.sum(1),
        lambda x: x.mean(1),
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: x.sum(1) if (lambda y: y > 1)(x) else x,
        lambda x: x.sum(1) if (lambda y: y > 2)(x) else x,
    ]
    assert len({describe_callable(f) for f in functions}) == len(functions)
    assert describe_callable(closing(1)).startswith(f"{__name__}.closing.<locals>.<lambda> ")


def test_functions_that_hold_themselves() -> None:
    def make() -> Callable[[int], int]:
        def again(n: int) -> int:
            return again(n - 1) if n else 0

        return again

    assert describe_callable(make()) == describe_callable(make())


@pytest.mark.slow
def test_another_process_says_the_same() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        "from test_callables import *; print(describe_callable(closing({'b', 'a', 'c'})))"
    )
    run = run_code(script)
    assert run.returncode == 0, run.stderr
    hashed = describe_callable(closing({"a", "b", "c"}))
    assert run.stdout.split()[1] == hashed.split()[1]
