"""Linear heads that lie beside a checkpoint: pooled features in, logits out."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eutectic.errors import CheckpointError, RequestError
from eutectic.models.batches import token_means, without_autocast
from eutectic.storage.small_files import check_regular

Pooling = Literal["mean", "cls", "pooler"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear map of pooled features."""

    weight: Tensor  # [outputs, hidden], float32
    bias: Tensor  # [outputs], float32
    # Mean over unmasked tokens (or over the places of a feature map), the first token, or the
    # model's own pooled output.
    pooling: Pooling = "mean"
    normalize: bool = False  # features to length 1 first, as zero-shot heads of CLIP need it

    def logits(self, outputs: Any, batch: Any) -> Tensor:
        """Return weight·feature + bias `[n, outputs]` of what a bare model returned on a batch."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return self.of(features(outputs, mask, self.pooling))

    def of(self, pooled: Tensor) -> Tensor:
        """Return the logits of features `[n, hidden]`; float32 whatever autocast says."""
        if self.weight.shape[1] != pooled.shape[1]:
            raise RequestError(
                f"the head takes {self.weight.shape[1]} features, the model gives "
                f"{pooled.shape[1]}.\nName the head that was made for this model and pooling."
            )
        with without_autocast(pooled.device):
            wide = pooled.float()
            if self.normalize:
                wide = nn.functional.normalize(wide, dim=-1)
            return wide @ self.weight.to(wide.device).T + self.bias.to(wide.device)

    def fingerprint(self) -> str:
        """Return a hash of all that decides the logits."""
        settled = sha256(f"{self.pooling} {self.normalize}".encode())
        for tensor in (self.weight, self.bias):
            settled.update(tensor.contiguous().numpy().tobytes())
        return settled.hexdigest()[:16]


def read_head(path: Path, pooling: Pooling = "mean", normalize: bool = False) -> Head:
    """Read a head from a safetensors file; without `bias` it is zero."""
    if pooling not in POOLINGS:
        raise RequestError(f"unknown pooling '{pooling}'; known are {', '.join(POOLINGS)}.")
    try:
        check_regular(path)
        tensors = load_file(path)
        weight = tensors["weight"].float()
        bias = tensors["bias"].float() if "bias" in tensors else torch.zeros(len(weight))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)}")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: is no head: {error}.\n"
            "Wanted: a safetensors file with `weight` [outputs, hidden] and `bias` [outputs]."
        ) from None
    return Head(weight, bias, pooling, normalize)


def features(outputs: Any, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Return pooled features `[n, hidden]` of what a bare transformers model returned."""
    name = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    states = getattr(outputs, name, None)
    if not isinstance(states, Tensor):
        raise RequestError(
            f"the model's outputs ({type(outputs).__name__}) hold no `{name}` to pool.\n"
            f"Choose another pooling ({', '.join(POOLINGS)}), or load the bare model."
        )
    if pooling == "pooler":
        return states
    if pooling == "cls":
        if states.ndim != 3:
            raise RequestError("the model has no first token; pool: mean.")
        return states[:, 0]
    states = states.float()
    if states.ndim == 4:  # maps of pyramids and convolutional networks: [n, hidden, height, width]
        return states.mean((2, 3))
    return token_means(states, None if mask is None else mask.bool())
