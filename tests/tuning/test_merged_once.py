"""A search merges every matrix once, however many values of α it tries."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import eutectic
from eutectic.checkpoint.expert_tensors import Expert
from eutectic.methods import registry

pytest.importorskip("transformers")
from tuning import world  # noqa: E402 - after the check that transformers is there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def seen(monkeypatch):
    """Count the method's calls by tensor, and reads of task matrices by (expert, tensor)."""
    calls, reads = Counter(), Counter()
    method = registry.get_method("iso_c")

    def counted(deltas, parameters, context):
        calls[context.tensor] += 1
        return method.function(deltas, parameters, context)

    # A plan reads samples, to tell strangers among the experts.
    monkeypatch.setattr("eutectic.planning.notes.kinship", lambda *_: [])
    monkeypatch.setitem(registry._METHODS, "iso_c", replace(method, function=counted))
    for name in ("delta", "weight"):
        real = getattr(Expert, name)

        def noted(self, tensor, *words, real=real, **more):
            reads[self.label, tensor] += 1
            return real(self, tensor, *words, **more)

        monkeypatch.setattr(Expert, name, noted)
    return calls, reads


@pytest.mark.parametrize(
    ("verb", "search"),
    [("merge", "validation"), ("tune", "divergence"), ("tune with output", "validation")],
)
def test_every_matrix_is_merged_once(folder, tmp_path, seen, verb, search):
    calls, reads = seen
    tried = []
    for points in (3, 6):
        calls.clear()
        reads.clear()
        scale = {
            "search": search, "tasks": folder / "tasks.yaml", "points": points, "tolerance": 0.6,
        }  # fmt: skip
        request = {
            "base": folder / "base",
            "experts": {name: folder / name for name in world.CLASSES},
            "method": "iso_c",
        }
        output = tmp_path / f"out{points}"
        if verb == "merge":
            found = eutectic.merge(**request, scale=scale, output=output).search
        elif verb == "tune":
            found = eutectic.tune(**request, search=scale).search
        else:
            found = eutectic.tune(**request, search=scale, output=output).search
        tried.append(len(found["points"]))
        matrices = 2 * 6  # two layers: query, key, value, output and both of the MLP
        assert len(calls) >= matrices and set(calls.values()) == {1}
        assert set(reads.values()) == {1}
        assert {tensor for _, tensor in reads} >= set(calls)
    assert tried[0] < tried[1]
