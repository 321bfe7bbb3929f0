"""No output holds NaN or Inf unless that is allowed, whatever they come from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.cli import Answer, invoke
from helpers.folders import Tensors, looks_finished, save


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save(folder, tensors)


def merge(folder: Path, *words: object, method: str = "average") -> Answer:
    experts = [f"{name}={folder / name}" for name in "ab"]
    output = folder / "out"
    request = ["--base", folder / "base", "-m", method, "-o", output, *experts, *words]
    answer = invoke("merge", *request, "--restart")
    assert looks_finished(output) == (answer.code == 0)
    return answer


def refused(answer: Answer, *parts: str) -> None:
    assert answer.code == 1, answer
    for part in parts:
        assert part in answer.err, answer.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_values_beyond_the_outputs_dtype(inputs: Path, dtype: str, method: str) -> None:
    """float64 experts may hold what float32 cannot, float32 ones what bfloat16 rounds to Inf."""
    value = 3.4e38 if dtype == "bfloat16" else 1e200
    name = "layers.1.proj.weight"
    for expert in "ab":
        edit(inputs / expert, lambda t: t.update({name: t[name].double()}))
        edit(inputs / expert, lambda t: t[name][0, 0].fill_(value))
    answer = merge(inputs, "--set", f"dtype={dtype}", "--scale", 1, method=method)
    refused(answer, name, "beyond the range of " + dtype, "Choose dtype")
    wide = merge(inputs, "--set", "dtype=float64", "--scale", 1, method=method)
    assert wide.code == 0, wide


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "iso_c", "tsv_m"])
def test_a_scale_far_out(inputs: Path, method: str) -> None:
    for scale, said in (("3e38", "NaN or Inf"), ("1e308", "beyond the range of torch.float32")):
        edit(inputs / "a", lambda t: t["layers.0.proj.weight"].mul_(1e3))
        refused(merge(inputs, "--scale", scale, method=method), said, "smaller scale")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("how", ["missing", "rule"])
def test_a_copied_tensor(inputs: Path, how: str, value: float) -> None:
    edit(inputs / "base", lambda t: t.update({"extra_scale": torch.tensor([1.0, value])}))
    words = ["--set", "missing=base"]
    if how == "rule":
        for expert in "ab":
            edit(inputs / expert, lambda t: t.update({"extra_scale": torch.ones(2)}))
        words = ["--set", "tensors=[{match: extra_scale, treatment: copy}]"]
    refused(merge(inputs, *words), "extra_scale: NaN or Inf in the base", "nonfinite: allow")
    allowed = merge(inputs, *words, "--set", "nonfinite=allow")
    assert allowed.code == 0, allowed
    kept = load_file(inputs / "out/model.safetensors")["extra_scale"]
    torch.testing.assert_close(kept, torch.tensor([1.0, value]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN or Inf in 'b'"), (7e4, "7e+04")])
def test_an_experts_head(inputs: Path, value: float, said: str) -> None:
    for expert in "ab":
        edit(inputs / expert, lambda t: t.update({"classifier.weight": torch.ones(3, 8)}))
    edit(inputs / "b", lambda t: t["classifier.weight"][1, 1].fill_(value))
    answer = merge(inputs, "--set", "dtype=float16")
    refused(answer, "classifier.weight", said)
    assert merge(inputs, "--set", "dtype=float16", "--set", "nonfinite=allow").code == 0
