"""Guards resuming: a killed collection goes on and gives the same bytes, or refuses."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eutectic.errors import ResumeError
from eutectic.statistics import collect
from helpers.processes import run_code

SCRIPT = """
import os, signal, sys
import torch
sys.path.insert(0, {folder!r})
from test_collect_resume import arguments, batches, model
from eutectic.statistics import collect

class Deadly:
    def __init__(self):
        self.reads = 0
    def __iter__(self):
        self.reads += 1
        for index, batch in enumerate(batches()):
            if self.reads == {reading} and index == {index}:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

torch.set_num_threads(1)
collect(model(), Deadly(), {output!r}, snapshot_seconds=0, **arguments({parts}))
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.norm(self.first(x).tanh()))}


def model() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(90, 6, generator=generator),
            "labels": torch.randint(3, (90,), generator=generator),
        }
        for _ in range(8)
    ]


def arguments(parts: int) -> dict[str, Any]:
    found: dict[str, Any] = {"output_gradients": True, "max_examples": 680}
    if parts > 1:
        found |= {"layers_per_pass": 1}
    else:
        found |= {"fisher": True, "block_fisher": True, "max_examples": 90 * 7 + 20}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "reading", "index"),
    # The first reading only looks at the first batch.
    [(1, 2, 0), (1, 2, 1), (1, 2, 6), (2, 2, 3), (2, 3, 0), (2, 3, 5)],
)
def test_a_killed_collection_resumes_to_the_same_bytes(
    tmp_path: Path, parts: int, reading: int, index: int
) -> None:
    output = tmp_path / "killed.safetensors"
    script = SCRIPT.format(
        folder=str(Path(__file__).parent),
        reading=reading,
        index=index,
        output=str(output),
        parts=parts,
    )
    result = run_code(script)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not output.exists()
    assert output.with_name("killed.safetensors.partial").is_dir()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        collect(model(), batches(), output, **arguments(parts))
        whole = tmp_path / "whole.safetensors"
        collect(model(), batches(), whole, **arguments(parts))
    finally:
        torch.set_num_threads(threads)

    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [output.name, whole.name]


def interrupted(output: Path, **changes: Any) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _: int | None) -> None:
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        collect(model(), batches(), output, snapshot_seconds=0, progress=stop, **changes)


def test_a_resumed_collection_does_not_repeat_finished_batches(tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    interrupted(output)
    calls: list[int] = []
    network = model()
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    collect(network, batches(), output)
    assert len(calls) == 1 + 5  # the probe, and what was left of eight batches
    whole = tmp_path / "whole.safetensors"
    collect(model(), batches(), whole)
    assert output.read_bytes() == whole.read_bytes()


def test_other_settings_another_model_or_other_data_refuse(tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    interrupted(output)
    with pytest.raises(ResumeError, match="another model or other settings"):
        collect(model(), batches(), output, output_gradients=True)
    other = model()
    with torch.no_grad():
        other.first.weight.add_(1)
    with pytest.raises(ResumeError, match="another model or other settings"):
        collect(other, batches(), output)
    with pytest.raises(ResumeError, match="batch 0 .* the data changed"):
        collect(model(), batches(seed=1), output)
    relabelled = batches()
    relabelled[1]["labels"] = 2 - relabelled[1]["labels"]
    with pytest.raises(ResumeError, match="batch 1 .* the data changed"):
        collect(model(), relabelled, output)
    with pytest.raises(ResumeError, match="batch 2 .* the data changed"):
        collect(model(), batches()[:2], output)
    collect(model(), batches(), output)


def summed(power: int) -> Any:
    return lambda outputs, batch: outputs["logits"].log_softmax(-1)[:, 0] ** power


def test_another_objective_of_the_same_name_refuses(tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    interrupted(output, fisher=True, objective=summed(1))
    with pytest.raises(ResumeError, match="another model or other settings"):
        collect(model(), batches(), output, fisher=True, objective=summed(2))
    collect(model(), batches(), output, fisher=True, objective=summed(1))


def test_a_folder_that_is_not_its_own_is_never_written_into(tmp_path: Path) -> None:
    folder = tmp_path / "x.safetensors.partial"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(ResumeError, match=r"precious\.txt"):
        collect(model(), batches(), tmp_path / "x.safetensors")
    assert [p.name for p in folder.iterdir()] == ["precious.txt"]


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    interrupted(output)
    snapshot = tmp_path / "x.safetensors.partial" / "snapshot.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:100])
    with pytest.raises(ResumeError, match="to start anew"):
        collect(model(), batches(), output)
