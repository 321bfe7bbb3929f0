"""What every test takes for granted: no network, one computing thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402 - after the settings above

torch.set_num_threads(1)
