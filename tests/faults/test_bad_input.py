"""Bad input of every kind: an exit code, a message that names the culprit, and no output.

Guards the promise that whatever is wrong with files or the request is said in words, before any
work where headers can tell, and that nothing which looks finished is left behind.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cli import Answer, invoke
from helpers.folders import (
    Tensors,
    looks_finished,
    make_base,
    make_expert,
    save,
    save_sharded,
)
from helpers.processes import run_cli

FAILED, WRONG_REQUEST = 1, 2


def merge(folder: Path, *words: object, method: str = "average") -> Answer:
    """Merge experts a and b through the command line, and check that a failure leaves nothing."""
    output = folder / "merged"
    experts = [f"{name}={folder / name}" for name in "ab"]
    base = folder / "base"
    answer = invoke("merge", "--base", base, "-m", method, "-o", output, *experts, *words)
    if answer.code != 0:
        assert not looks_finished(output)
        assert answer.err.startswith("error: ")
    return answer


def expect(answer: Answer, code: int, *parts: str) -> None:
    assert answer.code == code, answer
    for part in parts:
        assert part in answer.err, (part, answer.err)


def edit(folder: Path, change: Callable[[Tensors], object], seed: int = 0) -> None:
    """Save an expert with a change."""
    tensors = make_expert(make_base(), seed)
    change(tensors)
    save(folder, tensors)


def test_sound_input_is_merged(inputs: Path) -> None:
    answer = merge(inputs)
    assert answer.code == 0, answer
    assert looks_finished(inputs / "merged")
    assert not (inputs / "merged.partial").exists()


def test_a_missing_file(inputs: Path) -> None:
    (inputs / "b/model.safetensors").unlink()
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "no weights found")


def test_a_missing_folder(inputs: Path) -> None:
    (inputs / "b").rename(inputs / "elsewhere")
    expect(merge(inputs), WRONG_REQUEST, "experts.b", "no such file")


def test_a_truncated_file(inputs: Path) -> None:
    path = inputs / "b/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "truncated")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 4, b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json at all....}"],
)
def test_a_file_that_is_not_safetensors(content: bytes, inputs: Path) -> None:
    (inputs / "b/model.safetensors").write_bytes(content)
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "b/model.safetensors")


def test_a_header_that_lies(inputs: Path) -> None:
    path = inputs / "base/model.safetensors"
    raw = path.read_bytes()
    assert raw.count(b"[32,16]") > 0
    path.write_bytes(raw.replace(b"[32,16]", b"[32,99]", 1))
    expect(merge(inputs), WRONG_REQUEST, "base:", "inconsistent header")


def test_an_index_that_points_outside(inputs: Path) -> None:
    tensors = make_expert(make_base(), 5)
    names = list(tensors)
    folder = inputs / "b"
    (folder / "model.safetensors").unlink()
    shards = {"one.safetensors": {n: tensors[n] for n in names[:4]}}
    save_sharded(folder, shards)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"].update({n: "../a/model.safetensors" for n in names[4:]})
    index.write_text(json.dumps(table))
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "../a/model.safetensors", "Refused")


def test_a_link_that_leads_outside(inputs: Path) -> None:
    path = inputs / "b/model.safetensors"
    path.unlink()
    path.symlink_to(inputs / "a/model.safetensors")
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "leads out of its folder")


class _Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def test_code_in_a_pickle_is_not_run(inputs: Path) -> None:
    (inputs / "b/model.safetensors").unlink()
    marker = inputs / "executed"
    torch.save({"w": torch.zeros(2), "x": _Code(marker)}, inputs / "b/pytorch_model.bin")
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "holds code", "nothing was run")
    (inputs / "b/pytorch_model.bin").write_bytes(pickle.dumps(_Code(marker)))
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "pytorch_model.bin")
    assert not marker.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["average", "ties", "iso_c"])
@pytest.mark.parametrize("name", ["layers.1.proj.weight", "logit_scale"])
def test_nan_and_inf_are_named(value: float, method: str, name: str, inputs: Path) -> None:
    edit(inputs / "b", lambda t: t[name].view(-1)[-1:].fill_(value))
    answer = merge(inputs, method=method)
    expect(answer, FAILED, name, "NaN or Inf", "'b'", "nonfinite: allow")
    assert "'a'" not in answer.err


@pytest.mark.parametrize("method", ["average", "ties", "dare_ties", "slerp"])
def test_nan_and_inf_are_let_through_where_allowed(method: str, inputs: Path) -> None:
    edit(inputs / "b", lambda t: t["layers.1.proj.weight"][0, 0].fill_(math.nan))
    answer = merge(inputs, "--set", "nonfinite=allow", method=method)
    assert answer.code == 0, answer


def test_matrices_with_nan_are_refused_in_words_even_where_allowed(inputs: Path) -> None:
    edit(inputs / "b", lambda t: t["layers.1.proj.weight"][0, 0].fill_(math.nan))
    answer = merge(inputs, "--set", "nonfinite=allow", method="iso_c")
    expect(answer, FAILED, "layers.1.proj.weight")


def test_tables_of_other_size(inputs: Path) -> None:
    edit(inputs / "b", lambda t: t.update({"embed_tokens.weight": torch.zeros(33, 16)}))
    expect(
        merge(inputs),
        WRONG_REQUEST,
        "embed_tokens.weight",
        "[32, 16]",
        "b [33, 16]",
        "treatment head",
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_types_that_cannot_be_merged(dtype: torch.dtype, inputs: Path) -> None:
    edit(inputs / "b", lambda t: t.update({"layers.0.norm.weight": torch.ones(16).to(dtype)}))
    expect(merge(inputs), WRONG_REQUEST, "layers.0.norm.weight", "b holds", "cannot be merged")


def test_a_buffer_that_differs(inputs: Path) -> None:
    edit(inputs / "b", lambda t: t["position_ids"].add_(1))
    expect(merge(inputs), FAILED, "position_ids", "'b'", "treatment head")


def test_a_buffer_of_another_shape(inputs: Path) -> None:
    edit(inputs / "b", lambda t: t.update(position_ids=torch.arange(17)))
    expect(merge(inputs), WRONG_REQUEST, "position_ids", "[16]")


def test_experts_of_another_base(inputs: Path) -> None:
    save(inputs / "b", make_expert(make_base(width=24), 1))
    expect(merge(inputs), WRONG_REQUEST, "expert 'b' is not of this base", "another shape")
    save(inputs / "b", {"quite.other": torch.zeros(3)})
    expect(merge(inputs), WRONG_REQUEST, "expert 'b'", "shares no tensor with the base")


def test_a_missing_tensor(inputs: Path) -> None:
    edit(inputs / "b", lambda t: t.pop("layers.0.norm.weight"))
    expect(merge(inputs), WRONG_REQUEST, "layers.0.norm.weight", "missing from b", "missing: base")


def test_an_unknown_method(inputs: Path) -> None:
    expect(merge(inputs, method="avrage"), WRONG_REQUEST, "'avrage'", "Did you mean 'average'?")


def test_an_unknown_parameter(inputs: Path) -> None:
    answer = merge(inputs, "-p", "densty=0.2", method="ties")
    expect(answer, WRONG_REQUEST, "'densty'", "Did you mean 'density'?")


def test_an_unknown_key(inputs: Path) -> None:
    answer = merge(inputs, "--set", "haeds=drop")
    expect(answer, WRONG_REQUEST, "haeds", "Did you mean 'heads'?")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["-p", "density=1.5", "-m", "ties"], ["density", "less than or equal to 1", "1.5"]),
        (["-p", "density=[1", "-m", "ties"], ["density"]),
        (["-p", "density", "-m", "ties"], ["density", "name=value"]),
        (["--scale", "nan"], ["scale", "finite"]),
        (["-w", "a=inf"], ["weight", "finite"]),
        (["-w", "a=much"], ["weight", "much"]),
        (["-w", "c=1"], ["'c'"]),
        (["-w", "a=1", "-w", "b=-1"], ["weights sum to zero"]),
        (["--set", "seed=-1"], ["seed", "greater than or equal to 0"]),
        (["--set", "heads=none"], ["heads", "none"]),
        (["--set", "dtype=int8"], ["dtype", "int8"]),
        (["--set", "tensors=oops"], ["tensors"]),
        (["--memory", "lots"], ["'lots'", "4GB"]),
        (["--memory", "0"], ["positive"]),
        (["--memory", "100MB"], ["Raise --memory"]),
        (["c=x", "c=y"], ["'c'", "twice"]),
    ],
)
def test_values_out_of_range(words: list[str], parts: list[str], inputs: Path) -> None:
    expect(merge(inputs, *words), WRONG_REQUEST, *parts)


def test_slerp_takes_two(inputs: Path) -> None:
    answer = merge(inputs, f"c={inputs / 'a'}", method="slerp")
    expect(answer, WRONG_REQUEST, "exactly 2", "got 3")


def test_an_output_that_holds_something(inputs: Path) -> None:
    output = inputs / "merged"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    words = [f"a={inputs / 'a'}", "--base", inputs / "base", "-m", "average", "-o", output]
    expect(invoke("merge", *words), WRONG_REQUEST, "is not empty")
    assert [p.name for p in output.iterdir()] == ["mine.txt"]
    assert not (inputs / "merged.partial").exists()


def test_an_output_that_is_a_file_or_a_link(inputs: Path) -> None:
    words = [f"a={inputs / 'a'}", "--base", inputs / "base", "-m", "average", "-o"]
    (inputs / "file").write_text("mine")
    (inputs / "link").symlink_to(inputs / "nowhere")
    for name in ("file", "link"):
        expect(invoke("merge", *words, inputs / name), WRONG_REQUEST, "not a folder")
    inside = inputs / "file/merged"
    assert invoke("merge", *words, inside).code in (FAILED, WRONG_REQUEST)
    assert (inputs / "file").read_text() == "mine"


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_output_without_a_name(output: str, inputs: Path, monkeypatch: Any) -> None:
    (inputs / "empty").mkdir()
    monkeypatch.chdir(inputs / "empty")
    words = [f"a={inputs / 'a'}", "--base", inputs / "base", "-m", "average", "-o", output]
    answer = invoke("merge", *words)
    assert answer.code == WRONG_REQUEST
    assert answer.err.startswith("error: ")
    assert list((inputs / "empty").iterdir()) == []


def test_a_working_folder_of_somebody_else(inputs: Path) -> None:
    foreign = inputs / "merged.partial"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    for words in ([], ["--restart"]):
        expect(merge(inputs, *words), WRONG_REQUEST, "is not an unfinished merge")
    assert [p.name for p in foreign.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "journal", [b"\x00\x01garbage\n", b"[]\n", b'{"identity": 3}\n{"x"\n', b"{}\n"]
)
def test_a_working_folder_with_a_foreign_journal(journal: bytes, inputs: Path) -> None:
    foreign = inputs / "merged.partial"
    foreign.mkdir()
    (foreign / "journal.jsonl").write_bytes(journal)
    expect(merge(inputs), WRONG_REQUEST, "merged.partial")
    assert (foreign / "journal.jsonl").read_bytes() == journal


RECIPE = """\
base: {folder}/base
experts:
  a: {folder}/a
  b: {{path: {folder}/nowhere, wieght: 2}}
method: ties
parameters:
  density: 3
  scop: tensor
scael: 1.0
dtype: float12
tensors:
  - {{match: "*.norm.*", tretment: copy}}
"""


def test_a_recipe_with_many_faults_tells_all_with_lines(inputs: Path) -> None:
    recipe = inputs / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=inputs))
    for verb in (["merge", recipe, "-o", inputs / "merged"], ["plan", recipe]):
        answer = invoke(*verb)
        expect(
            answer,
            WRONG_REQUEST,
            "line 4: experts.b.path: no such file",
            "line 4: unknown key 'experts.b.wieght'. Did you mean 'weight'?",
            "line 7: method 'ties': density",
            "line 8: method 'ties': unknown parameter 'scop'. Did you mean 'scope'?",
            "line 9: unknown key 'scael'. Did you mean 'scale'?",
            "line 10: dtype",
            "line 12: unknown key 'tensors.0.tretment'. Did you mean 'treatment'?",
        )
        assert not looks_finished(inputs / "merged")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("base: [unclosed\n", "not valid YAML"),
        ("base: x\nbase: y\n", "line 2: key 'base' stands twice"),
        ("base: ./a\nmethod: average\n", "'experts' is missing"),
        ("base: ./a\nmethod: average\nexperts: {}\n", "experts"),
        ("base: ./a\nmethod: average\nexperts: [./a]\n", "experts"),
        ("base: ./a\nmethod: average\nexperts: {../x: ./a}\n", "line 3: the key '../x'"),
        ("base: ./a\nmethod: [average]\nexperts: {a: ./a}\n", "method"),
        ("base: 3\nmethod: average\nexperts: {a: 4}\n", "line 1: base"),
        ("base: ./a\nmethod: average\nexperts: {1: ./a}\n", "line 3: the key '1'"),
        ("&a [*a]\n", "recipe"),
        ("base: ./a\nmethod: average\nexperts: {a: ./a}\ntensors: [{match: '*'}]\n", "line 4"),
    ],
)
def test_recipes_that_are_none(text: str, part: str, inputs: Path) -> None:
    recipe = inputs / "recipe.yaml"
    recipe.write_text(text)
    expect(invoke("merge", recipe, "-o", inputs / "merged"), WRONG_REQUEST, part)


def test_a_recipe_that_is_no_text(inputs: Path) -> None:
    expect(
        invoke("merge", inputs / "base/model.safetensors", "-o", inputs / "merged"), WRONG_REQUEST
    )
    expect(invoke("merge", inputs / "base", "-o", inputs / "merged"), WRONG_REQUEST, "base")
    expect(invoke("merge", inputs / "no.yaml", "-o", inputs / "merged"), WRONG_REQUEST, "no.yaml")


def test_several_unreadable_inputs_are_told_together(inputs: Path) -> None:
    for name in ("base", "a", "b"):
        (inputs / name / "model.safetensors").write_bytes(b"junk")
    expect(merge(inputs), WRONG_REQUEST, "3 faults", "base:", "expert 'a'", "expert 'b'")


# Files that the system refuses. Root may read and write all; these run without that privilege.


def _give_up_privileges() -> None:
    """Let file modes count for root too; without effect for others, for whom they always do."""
    override, read_search = 1 << 1, 1 << 2
    system = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; lower half, upper half
    assert system.capget(header, sets) == 0
    for i in range(2):  # permitted too, which access(2) looks at
        sets[i] &= ~(override | read_search)
    assert system.capset(header, sets) == 0


def _unprivileged(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    words = ["--base", folder / "base", "-m", "average", "-o", output]
    experts = [f"{name}={folder / name}" for name in "ab"]
    return run_cli("merge", *words, *experts, before=_give_up_privileges)


def _closed(path: Path) -> None:
    path.chmod(0)


def _listed_only(path: Path) -> None:
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("what", "close"),
    [
        ("b/model.safetensors", _closed),
        ("b", _closed),
        ("b", _listed_only),
        ("base", _closed),
        ("base/config.json", _closed),
    ],
)
def test_inputs_that_may_not_be_read(
    what: str, close: Callable[[Path], None], inputs: Path
) -> None:
    place = inputs / "place"
    place.mkdir()
    close(inputs / what)
    result = _unprivileged(inputs, place / "merged")
    (inputs / what).chmod(0o755)
    assert result.returncode in (FAILED, WRONG_REQUEST), result
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert what.split("/")[0] in result.stderr
    assert "denied" in result.stderr.lower()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_outputs_that_may_not_be_written(mode: int, inputs: Path) -> None:
    place = inputs / "place"
    place.mkdir()
    place.chmod(mode)
    result = _unprivileged(inputs, place / "merged")
    assert result.returncode == WRONG_REQUEST, result
    assert result.stderr.startswith("error: ")
    assert str(place) in result.stderr
    place.chmod(0o755)
    assert list(place.iterdir()) == []


def test_an_error_in_a_process_of_its_own_has_no_traceback(inputs: Path) -> None:
    (inputs / "b/model.safetensors").write_bytes(b"junk")
    words = ["--base", inputs / "base", "-m", "average", "-o", inputs / "merged"]
    result = run_cli("merge", *words, f"b={inputs / 'b'}")
    assert (result.returncode, result.stdout) == (WRONG_REQUEST, "")
    assert len(result.stderr.splitlines()) <= 4
    debugged = run_cli("--debug", "merge", *words, f"b={inputs / 'b'}")
    assert debugged.returncode != 0
    assert "Traceback" in debugged.stderr
