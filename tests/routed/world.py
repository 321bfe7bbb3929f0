"""Small models with experts, batches that tell the experts apart, and their statistics."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.types import LayerStatistics
from helpers.configs import tiny_model

EXPERTS = ("a", "b", "c")
# Lookup tables, and what torch's attention applies without calling the module.
_UNTOUCHED = ("emb", "wte", "wpe", "shared", "relative_attention_bias", "self_attn.out_proj")
Batch = dict[str, Tensor]


@dataclass
class World:
    """A merged model, its experts, and batches of one task each."""

    merged: nn.Module
    experts: dict[str, nn.Module]
    batch: Callable[[int, int, int], Batch]

    def state_dicts(self) -> dict[str, Mapping[str, Tensor]]:
        return {name: model.state_dict() for name, model in self.experts.items()}

    def statistics(self, of_merged: bool = False) -> dict[str, dict[str, LayerStatistics]]:
        return {
            name: collect_inputs(self.merged if of_merged else model, self.batch(t, 40, 1))
            for t, (name, model) in enumerate(self.experts.items())
        }

    def mixed(self, samples: int = 4, seed: int = 2) -> Batch:
        """Return one batch with `samples` of every task, in turns."""
        parts = [self.batch(t, samples, seed) for t in range(len(self.experts))]
        return {k: torch.stack([p[k] for p in parts], 1).flatten(0, 1) for k in parts[0]}

    def labels(self, samples: int = 4) -> list[int]:
        return list(range(len(self.experts))) * samples


_collected: dict[bytes, dict[str, LayerStatistics]] = {}


def collect_inputs(model: nn.Module, batch: Batch) -> dict[str, LayerStatistics]:
    """Statistics of every layer, straight from the definition: one sample at a time, no padding.

    Those of an equal model and batch are computed once.
    """
    kind = repr(
        (type(model), getattr(model, "config", None), list(model.state_dict()), list(batch))
    )
    digest = hashlib.sha256(kind.encode())
    for tensor in (*model.state_dict().values(), *batch.values()):
        digest.update(repr((tensor.dtype, tensor.shape)).encode() + tensor.numpy().tobytes())
    if digest.digest() not in _collected:
        _collected[digest.digest()] = _watched(model, batch)
    return dict(_collected[digest.digest()])


def _watched(model: nn.Module, batch: Batch) -> dict[str, LayerStatistics]:
    inputs: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["query"]
            x = torch.cat(x.unbind()) if x.is_nested else x
            inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).double())

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            name = f"{path}.in_proj_weight"
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            name = f"{path}.weight"
        else:
            continue
        handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
    with torch.no_grad():
        for sample in single(batch):
            model(**sample)
    for handle in handles:
        handle.remove()
    return {name: summed(rows) for name, rows in inputs.items()}


def summed(samples: list[Tensor]) -> LayerStatistics:
    """The sums of per-sample inputs `[tokens, in]`."""
    tokens, pooled = torch.cat(samples), torch.stack([s.mean(0) for s in samples])
    return LayerStatistics(
        gram=tokens.T @ tokens,
        count=len(tokens),
        input_sum=tokens.sum(0),
        pooled_sum=pooled.sum(0),
        pooled_gram=pooled.T @ pooled,
        sample_count=len(samples),
    )


def single(batch: Batch) -> Iterator[Batch]:
    """Split a batch into samples without their padding."""
    for n in range(len(next(iter(batch.values())))):
        sample = {k: v[n : n + 1] for k, v in batch.items()}
        for ids, mask in (
            ("input_ids", "attention_mask"),
            ("decoder_input_ids", "decoder_attention_mask"),
        ):
            if mask in sample:
                keep = sample[mask][0].bool()
                sample[ids], sample[mask] = sample[ids][:, keep], sample[mask][:, keep]
        yield sample


def texts(task: int, samples: int, seed: int, length: int = 9, left: bool = False) -> Batch:
    """Token ids from a range of the task's own, with padding."""
    g = torch.Generator().manual_seed(100 * seed + task)
    ids = torch.randint(3 + 12 * task, 15 + 12 * task, (samples, length), generator=g)
    mask = torch.ones_like(ids)
    for n in range(samples):
        if n % 4:
            mask[n, : n % 4] = 0
    if not left:
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def world(make: Callable[[], nn.Module], batch: Callable[[int, int, int], Batch]) -> World:
    """Perturb a random model into experts."""
    torch.manual_seed(0)
    merged = make().eval()
    experts: dict[str, nn.Module] = {}
    for name in EXPERTS:
        experts[name] = copy.deepcopy(merged)
        with torch.no_grad():
            for key, p in experts[name].named_parameters():
                if p.ndim == 2 and not any(part in key for part in _UNTOUCHED):
                    p.add_(0.02 * torch.randn_like(p))
    return World(merged, experts, batch)


def bert() -> World:
    return world(lambda: tiny_model("BertModel"), texts)


def gpt2() -> World:
    return world(lambda: tiny_model("GPT2LMHeadModel", pad_token_id=0), texts)


def llama() -> World:
    return world(lambda: tiny_model("LlamaForCausalLM", pad_token_id=0), texts)


def mamba() -> World:
    return world(lambda: tiny_model("MambaForCausalLM", pad_token_id=0), texts)


def t5() -> World:
    def batch(task: int, samples: int, seed: int) -> Batch:
        source = texts(task, samples, seed)
        target = texts(task, samples, seed + 50, length=6)
        return {
            **source,
            "decoder_input_ids": target["input_ids"],
            "decoder_attention_mask": target["attention_mask"],
        }

    return world(lambda: tiny_model("T5ForConditionalGeneration"), batch)


def clip_vision() -> World:
    def batch(task: int, samples: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(100 * seed + task)
        shift = torch.tensor([1.0, -1.0, 0.0])[task]
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=g) + 2 * shift}

    return world(lambda: tiny_model("CLIPVisionModel"), batch)


class TorchEncoder(nn.Module):
    """torch's own encoder, fused kernels and all, with its inverted padding mask."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        self.embedding = nn.Embedding(40, 16)
        # The default, which takes nested tensors; with the sequence first torch warns of it.
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            y = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return y if self.batch_first else y.transpose(0, 1)


def torch_encoder() -> World:
    return world(lambda: TorchEncoder(True), texts)


def torch_encoder_sequence_first() -> World:
    return world(lambda: TorchEncoder(False), texts)


WORLDS: dict[str, Callable[[], World]] = {
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "clip": clip_vision,
    "torch": torch_encoder,
    "torch_sequence_first": torch_encoder_sequence_first,
}


def output(model: nn.Module, batch: Batch) -> Tensor:
    """Return the main output `[N, …]`."""
    with torch.no_grad():
        result = model(**batch)
    if isinstance(result, Tensor):
        return result
    return result.logits if "logits" in result else result.last_hidden_state


def counted(model: nn.Module, batch: Batch) -> Tensor:
    """Return the outputs of unmasked tokens only, `[tokens, …]`."""
    y = output(model, batch)
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return y.flatten(0, 1) if mask is None else y[mask.bool()]
