"""Calls on a real cluster: answers, errors as they were raised, and workers that are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.conftest import MEMORY
from eutectic.cluster.connection import Share, connect
from eutectic.cluster.spread import ATTEMPTS, Bounds, Call, spread
from eutectic.errors import EutecticError, NumericalError, RecipeError, RequestError
from helpers import ray_calls

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = 400_000_000
TWO = Bounds(2, 2 * MEMORY)


@pytest.fixture(autouse=True)
def connected(address: str) -> None:
    found = connect(address, share=lambda: Share(1, 1))
    assert (found.cpus, found.machines) == (3, 3)
    assert (found.memory, found.largest) == (3 * MEMORY, MEMORY)


def call(function: Callable[[Any], Any], payload: Any = None, memory: int = SMALL) -> Call:
    return Call("layer.0.weight", function, payload, memory)


def test_every_call_has_its_answer() -> None:
    calls = [call(ray_calls.double, number) for number in range(20)]
    found = {c.payload: a.value for c, a in spread(calls, TWO)}
    assert found == {number: 2 * number for number in range(20)}


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("number", NumericalError, r"layer\.3: NaN in expert 'a' \(on worker [0-9.]+\)\nRepair"),
        ("recipe", RecipeError, r"2 faults"),
        ("other", RuntimeError, "ZeroDivisionError: of nobody's purpose"),
    ],
)
def test_errors_are_raised_as_they_were_on_the_worker(kind: str, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        list(spread([call(ray_calls.fail, kind)], TWO))


def test_a_call_whose_process_was_killed_is_done_again(tmp_path: Path) -> None:
    told: list[str] = []
    calls = [call(ray_calls.die_once, str(tmp_path / "marker")), call(ray_calls.double, 4)]
    found = [a.value for _, a in spread(calls, TWO, lambda _, why: told.append(why))]
    assert sorted(map(str, found)) == ["8", "alive"]
    assert told == ["its process died"]


def test_a_call_without_memory_gets_twice_the_room_next_time(tmp_path: Path) -> None:
    calls = [call(ray_calls.need_memory, str(tmp_path / "marker"))]
    [(_, found)] = spread(calls, TWO)
    assert found.value == 2 * SMALL


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (ray_calls.die, rf"layer.0.weight: given up after {ATTEMPTS} attempts: its process died"),
        (ray_calls.never_enough, r"it ran out of memory(.|\n)*It asked for 3\.0 GB"),
    ],
)
def test_a_call_that_is_always_lost_is_given_up(function: Any, text: str) -> None:
    with pytest.raises(EutecticError, match=text):
        list(spread([call(function)], TWO))


def test_a_call_that_no_machine_can_do_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match=r"needs 4\.0 GB, and the largest machine .* 3\.0 GB"):
        list(spread([call(ray_calls.double, 1, 4_000_000_000)], TWO))


def test_what_still_runs_is_ended_with_the_first_error() -> None:
    began = time.monotonic()
    with pytest.raises(NumericalError):
        list(spread([call(ray_calls.sleep, 60), call(ray_calls.fail, "number")], TWO))
    assert time.monotonic() - began < 30


def test_no_more_run_side_by_side_than_memory_allows() -> None:
    calls = [call(ray_calls.sleep, 0.3) for _ in range(3)]
    began = time.monotonic()
    assert len(list(spread(calls, Bounds(3, 2 * SMALL - 1)))) == 3
    assert time.monotonic() - began > 0.9
