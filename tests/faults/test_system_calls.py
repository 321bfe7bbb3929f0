"""Every verb, killed before any of its system calls, in the middle of a write, or refused one.

Guards: nothing that a killed run leaves looks finished; the same command again gives the same bytes
and leaves nothing behind; a call that fails once is survived, or ends the run in words.

A hundred kills and some failures, drawn by a seed; `--every-call` tries each call of each verb
in each way (half an hour).
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.verbs import Command, commands, faults_of, make_inputs, undisturbed
from helpers.system_calls import FAILING, WRITES, Server, can_trace

pytestmark = pytest.mark.skipif(not can_trace(), reason="processes cannot be traced here")
KILLS, FAILURES = 100, 26
ERRORS = {"fail": errno.EIO, "full": errno.ENOSPC}


LONG = {"compare"}  # of whose calls none is drawn: a run takes as long as ten others


@pytest.fixture
def verbs(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[dict[str, Command]]:
    (tmp_path / "inputs").mkdir()
    make_inputs(tmp_path / "inputs")
    server, output = Server(), tmp_path / "output"
    try:
        every = pytestconfig.getoption("--every-call")
        lines = commands(tmp_path / "inputs", output).items()
        asked = {name: words for name, words in lines if every or name not in LONG}
        yield {name: undisturbed(server, output, words) for name, words in asked.items()}
    finally:
        server.close()


def every_case(name: str, command: Command) -> list[tuple[str, str, int]]:
    """Return (command, how, call) for all that can happen to a command."""
    cases: list[tuple[str, str, int]] = []
    for at, (call, _) in enumerate(command.calm.calls, start=1):
        cases.append((name, "kill", at))
        cases += [(name, "torn", at)] * (call in WRITES)
        cases += [(name, how, at) for how in ERRORS if call in FAILING]
    return cases


def drawn(verbs: dict[str, Command]) -> list[tuple[str, str, int]]:
    """Return some cases of every command, as many of each."""
    chance = random.Random(24)
    kills: list[list[tuple[str, str, int]]] = []
    failures: list[list[tuple[str, str, int]]] = []
    for name, command in verbs.items():
        cases = every_case(name, command)
        chance.shuffle(cases)
        kills.append([case for case in cases if case[1] in ("kill", "torn")])
        failures.append([case for case in cases if case[1] in ERRORS])
    return _in_turns(kills, KILLS) + _in_turns(failures, FAILURES)


def _in_turns(groups: list[list[tuple[str, str, int]]], count: int) -> list[tuple[str, str, int]]:
    longest = max(map(len, groups))
    return [g[i] for i in range(longest) for g in groups if i < len(g)][:count]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_disturbed_run_is_finished_by_the_same_command(
    verbs: dict[str, Command], pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--every-call"):
        cases = [case for name, command in verbs.items() for case in every_case(name, command)]
    else:
        cases = drawn(verbs)
    found: list[str] = []
    for name, how, at in cases:
        faults = faults_of(verbs[name], how, at, ERRORS.get(how, 0))
        call = " ".join(verbs[name].calm.calls[at - 1])
        found += [f"{name}: {how} at call {at} ({call}): {fault}" for fault in faults]
    assert not found, "\n".join(found)
