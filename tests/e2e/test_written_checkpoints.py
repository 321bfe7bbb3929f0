"""Checkpoints as libraries write them (`fixtures/write_checkpoints.py`), merged in files.

Guards: the average, and one matrix method, of what each library wrote against arithmetic on its
files, or on the models that transformers makes of them; and that the outputs have what their
loaders look for. transformers loads its outputs here with no missing and no unexpected key; the
other libraries need not be installed (run the script's environments for them).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eutectic
from helpers.folders import Tensors

ROOT = Path(__file__).parents[1] / "fixtures" / "checkpoints"


def merged(family: str, output: Path, **options: Any) -> Path:
    root = ROOT / family
    experts = {"a": root / "a", "b": root / "b"}
    request: dict[str, Any] = {"base": root / "base", "experts": experts, "method": "average"}
    return eutectic.merge(**{**request, **options}, output=output).output


def files(folder: Path) -> dict[str, Tensors]:
    """Return folder -> tensors of every weight file below a model's folder, experts' left out."""
    found: dict[str, Tensors] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        place = path.parent.relative_to(folder).as_posix()
        if not place.startswith("experts"):
            found.setdefault(place, {}).update(load_file(path))
    for path in folder.rglob("*.bin"):
        place = path.parent.relative_to(folder).as_posix()
        if place not in found:
            found[place] = torch.load(path, weights_only=True)
    return found


def assert_close(found: Tensor, wanted: Tensor, name: str) -> None:
    assert torch.allclose(found.double(), wanted.double(), rtol=1e-5, atol=2e-6), name


def isotropic(base: Tensor, experts: list[Tensor]) -> Tensor:
    """Return W₀ + σ̄·U·Vᵀ of the sum of the changes, by a float64 SVD."""
    delta = torch.stack([w.double() - base.double() for w in experts]).sum(0)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    kept = values > max(delta.shape) * 1e-7 * values[0]
    flat = torch.where(kept, values.sum() / kept.sum(), 0.0)
    return base.double() + (left * flat) @ right


MODULES = ("sentence-transformers", "router", "open-clip")


@pytest.mark.parametrize("family", MODULES)
def test_the_average_of_every_tensor_in_every_folder(family: str, tmp_path: Path) -> None:
    out = merged(family, tmp_path / "out")
    found, base, a, b = map(files, (out, *(ROOT / family / name for name in ("base", "a", "b"))))
    assert {p: set(t) for p, t in found.items()} == {p: set(t) for p, t in base.items()}
    for place, tensors in base.items():
        for name, before in tensors.items():
            pair = (a[place][name], b[place][name])
            wanted = sum(pair) / 2 if before.is_floating_point() else before
            assert_close(found[place][name], torch.as_tensor(wanted), f"{place}/{name}")


@pytest.mark.parametrize(
    ("family", "place", "name"),
    [
        ("sentence-transformers", "2_Dense", "linear.weight"),
        ("sentence-transformers", ".", "encoder.layer.0.attention.self.query.weight"),
        ("router", "document_2_Dense", "linear.weight"),
        ("open-clip", ".", "visual.transformer.resblocks.0.mlp.c_fc.weight"),
    ],
)
def test_a_matrix_method_in_every_folder(
    family: str, place: str, name: str, tmp_path: Path
) -> None:
    out = merged(family, tmp_path / "out", method="iso_c", scale=1.0)
    found, base, a, b = map(files, (out, *(ROOT / family / n for n in ("base", "a", "b"))))
    wanted = isotropic(base[place][name], [a[place][name], b[place][name]])
    assert_close(found[place][name], wanted, name)


def test_an_adapter_of_the_transformer_beside_modules_in_full(tmp_path: Path) -> None:
    root = ROOT / "sentence-transformers"
    experts = {"a": root / "a", "c": root / "c"}
    found = files(merged("sentence-transformers", tmp_path / "out", experts=experts))
    base, a, own = (files(root / name) for name in ("base", "a", "c"))
    factors, changed = own["."], 0
    for name, before in base["."].items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tuned = before
        if (left := factors.get(f"{module}.lora_B.weight")) is not None:
            tuned = before + 2 * left @ factors[f"{module}.lora_A.weight"]  # lora_alpha / r
            changed += 1
        if before.is_floating_point():
            assert_close(found["."][name], (a["."][name] + tuned) / 2, name)
    assert 2 * changed == len(factors) > 0
    for place in ("2_Dense", "3_LayerNorm"):
        for name, tensor in found[place].items():
            assert_close(tensor, (a[place][name] + own[place][name]) / 2, name)


@pytest.mark.parametrize("family", MODULES)
def test_everything_but_weights_is_that_of_the_base(family: str, tmp_path: Path) -> None:
    out, base = merged(family, tmp_path / "out"), ROOT / family / "base"
    weights = (".safetensors", ".bin")
    for path in base.rglob("*"):
        if path.is_file() and path.suffix not in weights:
            assert (out / path.relative_to(base)).read_bytes() == path.read_bytes()
    assert not list(out.rglob("*.bin"))


def test_open_clip_finds_its_weights(tmp_path: Path) -> None:
    """By its own name, also where the base is a pickle."""
    out = merged("open-clip", tmp_path / "one")
    assert [p.name for p in out.glob("*.safetensors")] == ["open_clip_model.safetensors"]
    out = merged("open-clip", tmp_path / "two", base=ROOT / "open-clip" / "b")
    assert [p.name for p in out.glob("*.safetensors")] == ["open_clip_model.safetensors"]


def test_heads_of_timm_are_one_file_each(tmp_path: Path) -> None:
    out = merged("timm", tmp_path / "out")
    (found,), base = files(out).values(), ROOT / "timm" / "base"
    stored = {name: load_file(ROOT / "timm" / name / "model.safetensors") for name in "ab"}
    for name, before in load_file(base / "model.safetensors").items():
        if name.startswith("head."):
            assert torch.equal(found[name], before)
        else:
            assert_close(found[name], (stored["a"][name] + stored["b"][name]) / 2, name)
    for expert, own in stored.items():
        folder = out / "experts" / expert
        assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
        written = load_file(folder / "model.safetensors")
        assert set(written) == set(own)
        for name, tensor in written.items():
            assert torch.equal(tensor, own[name] if name.startswith("head.") else found[name])
        config = json.loads((folder / "config.json").read_text())
        assert config["num_classes"] == own["head.bias"].shape[0]


# --- transformers: names and layouts differ between the versions; its models are compared ---

WRITTEN = {
    "vision-language/qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "vision-language/gemma3": "Gemma3ForConditionalGeneration",
    "mixture": "Qwen3MoeForCausalLM",
    "tied/t5": "T5ForConditionalGeneration",
    "tied/bart": "BartForConditionalGeneration",
}


def loaded(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return the parameters of a model as transformers loads it, which must find all of them."""
    import transformers as hf

    model, info = getattr(hf, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return {name: w.detach() for name, w in model.state_dict().items()}


# Of transformers about configurations of its earlier versions, and about itself.
quiet = pytest.mark.filterwarnings("ignore::FutureWarning")


@quiet
@pytest.mark.parametrize("family", WRITTEN)
def test_models_of_three_versions_of_transformers(family: str, tmp_path: Path) -> None:
    kind = WRITTEN[family]
    found = loaded(merged(family, tmp_path / "out"), kind)
    a, b = (loaded(ROOT / family / name, kind) for name in "ab")
    base = loaded(ROOT / family / "base", kind)
    assert set(found) == set(a) == set(b)
    changed = 0
    for name, tensor in found.items():
        wanted = (a[name] + b[name]) / 2 if tensor.is_floating_point() else base[name]
        assert_close(tensor, wanted, name)
        changed += int(not torch.equal(wanted, base[name]))
    assert changed > len(found) // 2


@quiet
def test_adapters_of_two_versions_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers as hf

    root = ROOT / "adapters"
    tuned: list[dict[str, Tensor]] = []
    for name in "ab":
        model = hf.LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        whole = peft.PeftModel.from_pretrained(model, root / name).merge_and_unload()
        tuned.append({n: w.detach().clone() for n, w in whole.state_dict().items()})
    found = loaded(merged("adapters", tmp_path / "out"), "LlamaForCausalLM")
    for name, tensor in found.items():
        assert_close(tensor, (tuned[0][name] + tuned[1][name]) / 2, name)


# --- The other loaders, where they are installed ---


@quiet
@pytest.mark.parametrize("family", ["sentence-transformers", "router"])
def test_sentence_transformers_loads_all_modules(family: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    out = merged(family, tmp_path / "out")
    held = library.SentenceTransformer(str(out), device="cpu").state_dict()
    stored = [(k, w) for tensors in files(out).values() for k, w in tensors.items()]
    assert len(stored) == len(held)
    for key, tensor in stored:
        assert any(name.endswith(key) and torch.equal(w, tensor) for name, w in held.items()), key


@quiet
def test_open_clip_loads_the_folder(tmp_path: Path) -> None:
    library = pytest.importorskip("open_clip")
    for base in ("base", "b"):
        out = merged("open-clip", tmp_path / base, base=ROOT / "open-clip" / base)
        model, *_ = library.create_model_and_transforms(f"local-dir:{out}")
        held = {name: w for name, w in model.state_dict().items() if name != "attn_mask"}
        (stored,) = files(out).values()
        assert held.keys() == stored.keys() - {"attn_mask"}
        assert all(torch.equal(held[name], stored[name]) for name in held)


@quiet
def test_timm_loads_the_output_and_the_experts(tmp_path: Path) -> None:
    library = pytest.importorskip("timm")
    out = merged("timm", tmp_path / "out")
    for folder, classes in ((out, 3), (out / "experts/a", 3), (out / "experts/b", 5)):
        stored = load_file(folder / "model.safetensors")
        sizes = json.loads((folder / "config.json").read_text())["model_args"]
        loaded = (
            library.create_model(f"local-dir:{folder}", pretrained=True),
            library.create_model(
                "vit_tiny_patch16_224",
                checkpoint_path=str(folder / "model.safetensors"),
                **{**sizes, "num_classes": classes},
            ),
        )
        for model in loaded:
            assert model.num_classes == classes
            held = model.state_dict()
            assert held.keys() == stored.keys()
            assert all(torch.equal(held[name], stored[name]) for name in held)
