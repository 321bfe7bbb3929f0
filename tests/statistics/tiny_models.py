"""Tiny random models, ragged data, and the plainest way to get their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eutectic.statistics import StatisticsFile
from helpers.configs import tiny_model

VOCABULARY = 40
LENGTHS = (7, 4, 1, 5, 2, 6)
Example = dict[str, Tensor]


def seeded(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the tiny default scale, so that every layer matters.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bert(**changes: Any) -> nn.Module:
    return seeded("BertForSequenceClassification", num_labels=3, **changes)


def t5() -> nn.Module:
    return seeded("T5ForConditionalGeneration")


def bart() -> nn.Module:
    return seeded("BartForConditionalGeneration")


def gpt2() -> nn.Module:
    return seeded("GPT2LMHeadModel")


def llama() -> nn.Module:
    return seeded("LlamaForCausalLM")


def clip_vision() -> nn.Module:
    return seeded("CLIPVisionModelWithProjection")


MODELS = {
    "bert": bert,
    "t5": t5,
    "bart": bart,
    "gpt2": gpt2,
    "llama": llama,
    "clip_vision": clip_vision,
}


def examples(name: str, lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[Example]:
    """Return unpadded single examples `[1, …]` for one of `MODELS`."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randint(4, VOCABULARY, (1, length), generator=generator)

    found: list[Example] = []
    for index, length in enumerate(lengths):
        if name == "clip_vision":
            found.append({"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)})
            continue
        example = {"input_ids": tokens(length), "attention_mask": torch.ones(1, length).long()}
        if name == "bert":
            example["labels"] = torch.tensor([index % 3])
        elif name in ("t5", "bart"):
            # Crosswise lengths: padded, encoder and decoder have equally many tokens.
            example["labels"] = tokens(lengths[-1 - index])
        else:
            example["labels"] = example["input_ids"].clone()
        found.append(example)
    return found


def padded(some: Sequence[Example]) -> dict[str, Tensor]:
    """Return one batch, padded on the right with token 5 and label -100."""
    batch: dict[str, Tensor] = {}
    fill = {"input_ids": 5, "attention_mask": 0, "labels": -100}
    for key in some[0]:
        rows = [e[key][0] for e in some]
        ragged = key in fill and rows[0].ndim == 1
        if ragged:
            rows = [
                nn.functional.pad(r, (0, max(map(len, rows)) - len(r)), value=fill[key])
                for r in rows
            ]
        batch[key] = torch.stack(rows)
    return batch


def batched(some: Sequence[Example], size: int) -> list[dict[str, Tensor]]:
    return [padded(some[i : i + size]) for i in range(0, len(some), size)]


def naive(model: nn.Module, some: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Return float64 statistics of every linear layer, from single unpadded examples."""
    found: dict[str, dict[str, Any]] = {}
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def hook(module: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
                out.retain_grad()
                calls.append((path, args[0].detach(), out))

            handles.append(module.register_forward_hook(hook))
    for example in some:
        calls.clear()
        output = model(**example)
        loss = output.loss if "labels" in example else output.image_embeds.sum()
        loss.backward()
        for path, inputs, out in calls:
            x = inputs.reshape(-1, inputs.shape[-1]).double()
            assert out.grad is not None
            y = out.grad.reshape(-1, out.shape[-1]).double()
            entry = found.setdefault(f"{path}.weight", {"count": 0, "samples": 0})
            terms = {
                "gram": x.T @ x,
                "input_sum": x.sum(0),
                "pooled_sum": x.mean(0),
                "pooled_gram": torch.outer(x.mean(0), x.mean(0)),
                "output_gradient_gram": y.T @ y,
            }
            for key, term in terms.items():
                entry[key] = entry.get(key, 0) + term
            entry["count"] += len(x)
            entry["samples"] += 1
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def assert_near(actual: Tensor | None, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_same(one: StatisticsFile, other: StatisticsFile, tolerance: float = 5e-6) -> None:
    assert one.names == other.names
    for name in one:
        left, right = one[name], other[name]
        assert (left.count, left.sample_count) == (right.count, right.sample_count)
        if left.dense_gram() is not None:
            expected = right.dense_gram()
            assert expected is not None
            assert_near(left.dense_gram(), expected, tolerance)
        for field in ("output_gradient_gram", "fisher_diagonal", "pooled_gram", "input_sum"):
            expected = getattr(right, field)
            assert (getattr(left, field) is None) == (expected is None)
            # Keys' biases have no gradient but rounding: softmax does not see them.
            if expected is not None and not name.endswith(("key.bias", "k_proj.bias")):
                assert_near(getattr(left, field), expected.double(), tolerance)
