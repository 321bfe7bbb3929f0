"""The suite's model: a small pyramid vision transformer (PVT v2) as a transformers checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PvtV2Config, PvtV2Model
from transformers.utils import logging

logging.disable_progress_bar()

CONFIG = {
    "image_size": 32,
    "num_channels": 1,
    "num_encoder_blocks": 2,
    "hidden_sizes": [64, 192],  # 8×8 tokens of 64, then 4×4 tokens of 192
    "depths": [1, 5],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "sr_ratios": [2, 1],
    "num_attention_heads": [2, 6],
    "mlp_ratios": [2, 3],
    "drop_path_rate": 0.0,
}
HIDDEN = CONFIG["hidden_sizes"][-1]


def new_model(seed: int = 0, **changes: object) -> PvtV2Model:
    """Return an untrained model, the same for the same seed."""
    torch.manual_seed(seed)
    return PvtV2Model(PvtV2Config(**{**CONFIG, **changes}))


def load_model(folder: Path | str) -> PvtV2Model:
    """Return the model of a folder (`config.json`, `model.safetensors`) in evaluation mode."""
    return PvtV2Model.from_pretrained(folder, local_files_only=True).eval()


def save(model: PvtV2Model, folder: Path) -> None:
    """Write the model, and how it takes pictures: as they are, in [0, 1]."""
    model.save_pretrained(folder)
    told = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=1) + "\n")


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return mean-pooled features [n, hidden] of images [n, 32, 32] in [0, 1]."""
    return model(images[:, None]).last_hidden_state.mean((2, 3)).float()


@torch.no_grad()
def features(model: nn.Module, images: Tensor, batch: int = 250) -> Tensor:
    """Return the features [n, hidden], float32, of uint8 images [n, 32, 32]."""
    return torch.cat([embed(model, part.float() / 255) for part in images.split(batch)])
