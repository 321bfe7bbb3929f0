"""Every verb that writes, as a command on tiny models, and what its outputs have to be."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from evaluation import world
from helpers.cli import invoke
from helpers.folders import digests
from helpers.system_calls import Run, Server

Words = list[object]
LABELS = ("no", "maybe", "yes")
KIND = "text-classification"


def _model(seed: int, labels: Sequence[str] = LABELS) -> Any:
    """Return a model of one layer."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    sizes = {**world.SMALL, "num_hidden_layers": 1, "vocab_size": 30, "max_position_embeddings": 24}
    config = world.hf.BertConfig(**sizes, num_labels=len(labels), **names)
    model = world.hf.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings" not in name:
                parameter.add_(0.4 * torch.randn(parameter.shape))
    return model


def make_inputs(folder: Path) -> None:
    """Write checkpoints, rows, statistics, tasks and a routed model."""
    for seed, name in enumerate(("base", "a", "b", "merged")):
        world.save(_model(seed), folder / name)
    # `c` has a head of its own, which its folder beside the merged model holds.
    world.save(_model(4, ("x", "y")), folder / "c")
    for seed, name in enumerate(("a", "b", "more")):
        texts = enumerate(world.sentences(6, seed))
        rows = [{"text": text, "label": LABELS[i % 3]} for i, text in texts]
        world.jsonl(folder / f"{name}.jsonl", rows)
    for model, data, file in (
        ("a", "a", "a.stats"),
        ("b", "b", "b.stats"),
        ("a", "more", "more.stats"),
        ("merged", "a", "a.router"),
        ("merged", "b", "b.router"),
    ):
        line = ["collect", folder / model, "--data", folder / f"{data}.jsonl", "-o", folder / file]
        assert invoke(*line).code == 0
    world.tasks(folder / "tasks.yaml", a={"kind": KIND, "data": "a.jsonl"})
    assert invoke(*commands(folder, folder)["route"]).code == 0


def commands(inputs: Path, output: Path) -> dict[str, Words]:
    """Return the words of every command; they write into `output`."""
    experts = [f"{name}={inputs / name}" for name in "ab"]
    statistics = [w for name in "ab" for w in ("-s", f"{name}={inputs / name}.stats")]
    of_router = [w for n in "ab" for w in ("--router-statistics", f"{n}={inputs / n}.router")]
    data = [w for name in "ab" for w in ("-d", f"{name}={inputs / name}.jsonl")]
    start: Words = ["--base", inputs / "base", "--threads", 1]
    collect: Words = ["collect", inputs / "a", "--data", inputs / "a.jsonl", "--batch-size", 3]
    collect += ["-o", output / "a.stats"]
    gram = ["tune", *start, "-m", "iso_c", "--search", "gram", *statistics, *experts]
    route: Words = ["route", inputs / "merged", *experts, *statistics, *of_router, "--rank", 2]
    evaluate: Words = ["evaluate", "--tasks", inputs / "tasks.yaml", "--base", inputs / "base"]
    evaluate += ["-e", f"a={inputs / 'a'}", "--resamples", 20, f"m={inputs / 'merged'}"]
    into: Words = ["-o", output / "model"]
    return {
        "merge": ["merge", *start, "-m", "iso_c", *into, *experts, f"c={inputs / 'c'}"],
        # Deltas that wait for those of like layers.
        "merge in stages": ["merge", *start, "-m", "esm", *statistics, *into, *experts],
        "sweep": ["merge", *start, "-m", "average", "--sweep", "0,1", *experts,
                  "-o", output / "sweep"],
        "collect": collect,
        "collect in passes": [*collect, "--memory", "30KB"],
        "collect and add": [*collect, "--add", inputs / "more.stats"],
        "add": ["collect", "--add", inputs / "a.stats", "--add", inputs / "more.stats",
                "-o", output / "a.stats"],
        "tune": [*gram, *into],
        "tune, keeping": [*gram, "--work", output / "work"],
        "evaluate": [*evaluate, "-o", output / "results.json"],
        "route": [*route, "-o", output / "routed", "--export", output / "adapters"],
        "export": ["route", inputs / "routed", "--export", output / "adapters"],
        "extract": ["extract", inputs / "a", "--base", inputs / "base", "--rank", 2, "--others",
                    "save", "-o", output / "adapter"],
        "merge into an adapter": ["merge", *start, "-m", "tsv_m", "--adapter", "--rank", 2,
                                  "--others", "drop", *into, *experts],
        "compare": ["compare", *start, *experts, "-m", "average", "-m", "iso_c", "-t",
                    inputs / "tasks.yaml", "-o", output / "comparison"],
        "calibrate": ["calibrate", inputs / "merged", *experts, *data, *into],
    }  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command, its calls when nothing disturbs it, and the files that it writes then."""

    server: Server
    folder: Path  # of its outputs alone
    words: Words
    calm: Run
    files: Mapping[str, str]  # path -> digest
    names: frozenset[str]  # what lies in the folder in the end

    def run(self, how: str = "count", at: int = 0, error: int = 0) -> Run:
        """Run the command in what the folder holds."""
        return self.server.run(self.folder, self.words, how, at, error)


def undisturbed(server: Server, folder: Path, words: Words) -> Command:
    """Run a command that nothing disturbs."""
    empty(folder)
    calm = server.run(folder, words)
    assert calm.code == 0, calm.err
    found = frozenset(path.name for path in folder.iterdir())
    return Command(server, folder, words, calm, contents(folder), found)


def contents(folder: Path) -> dict[str, str]:
    """Return what `digests` does, but for the order in which a journal names what is finished."""
    found = digests(folder)
    for path in folder.glob("*/journal.jsonl"):
        found[str(path.relative_to(folder))] = str(sorted(path.read_text().splitlines()))
    return found


def empty(folder: Path) -> None:
    """Empty a folder, or make it."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir()


def faults_of(command: Command, how: str, at: int, error: int = 0) -> list[str]:
    """Disturb a command at its call `at`, run it again, and return what is not as it has to be."""
    empty(command.folder)
    run = command.run(how, at, error)
    found: list[str] = []
    if "Traceback" in run.err:
        found.append(f"traceback:\n{run.err}")
    killed = how in ("kill", "torn")
    if run.code not in ((-signal.SIGKILL,) if killed else (0, 1)):
        found.append(f"ended with {run.code}: {run.err}")
    finished = _as_expected(command)
    if run.code == 0 and not finished:
        found.append(f"ended with 0: {_difference(command)}")
    found += [f"looks finished: {name}" for name in _half_written(command)]
    if not finished:
        again = command.run()
        if again.code != 0:
            found.append(f"the same command again ended with {again.code}: {again.err}")
        elif not _as_expected(command):
            found.append(f"the same command again: {_difference(command)}")
    return found


def _as_expected(command: Command) -> bool:
    """Tell whether the folder holds what an undisturbed run leaves there, and nothing else."""
    names = {path.name for path in command.folder.iterdir()}
    return names == command.names and contents(command.folder) == command.files


def _difference(command: Command) -> str:
    now, names = contents(command.folder), {path.name for path in command.folder.iterdir()}
    other = [name for name in command.files if now.get(name, "") not in ("", command.files[name])]
    missing = [name for name in command.files if name not in now]
    more = [name for name in now if name not in command.files]
    more += sorted(names - command.names)
    return f"of other content {other}, missing {missing}, left over {more}"


def _half_written(command: Command) -> list[str]:
    """Return what has the name of an output and is neither as it has to be, nor a journal."""
    now, found = contents(command.folder), list[str]()
    for name in command.names:
        there = {k: v for k, v in now.items() if k.split("/")[0] == name}
        whole = {k: v for k, v in command.files.items() if k.split("/")[0] == name}
        unfinished = name.endswith(".jsonl") or name in ("work", "sweep", "comparison")
        if there and there != whole and not unfinished:
            found.append(name)
    return found
