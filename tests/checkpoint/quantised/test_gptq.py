"""GPTQ and AWQ against an entry-by-entry reading of their public descriptions."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.quantised.packing import awq, gptq, meant, random_layer

from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.quantised import codes
from eutectic.errors import CheckpointError

NAME = "model.layers.0.mlp.up_proj"


def write(folder, layer, settings=None, config=None):
    folder.mkdir(exist_ok=True)
    tensors = {f"{NAME}.{part}": t.contiguous() for part, t in layer.items()}
    save_file({**tensors, "model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    if settings is not None or config is not None:
        stated = {**(config or {}), "quantization_config": settings or {}}
        (folder / "config.json").write_text(json.dumps(stated))
    return folder


def read(folder):
    with open_reader(folder) as reader:
        assert set(reader.entries) == {f"{NAME}.weight", "model.norm.weight"}
        entry = reader.entries[f"{NAME}.weight"]
        return reader.read(entry.name).view(entry.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stated", [True, False])
def test_gptq(tmp_path, bits, stated):
    made = random_layer(64, 96, bits, 32, seed=bits)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32} if stated else None
    folder = write(tmp_path / "m", gptq(*made[:3], bits), settings)
    assert torch.equal(read(folder), meant(*made))


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order(tmp_path, bits):
    codes_, zeros, scales, groups = random_layer(64, 96, bits, 16, seed=7)
    groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": True}
    folder = write(tmp_path / "m", gptq(codes_, zeros, scales, bits, groups=groups), settings)
    assert torch.equal(read(folder), meant(codes_, zeros, scales, groups))


def test_second_format_stores_zero_points_as_they_are(tmp_path):
    made = random_layer(64, 96, 4, 32)
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
    folder = write(tmp_path / "m", gptq(*made[:3], 4, one_less=False), settings)
    assert torch.equal(read(folder), meant(*made))


@pytest.mark.parametrize("settings", [None, {"quant_method": "awq", "bits": 4, "version": "gemm"}])
def test_awq(tmp_path, settings):
    made = random_layer(64, 96, 4, 32, seed=3)
    folder = write(tmp_path / "m", awq(*made[:3]), settings)
    assert torch.equal(read(folder), meant(*made))


def test_dtype_is_the_models(tmp_path):
    codes_, zeros, scales, groups = random_layer(64, 96, 4, 32)
    config = {"torch_dtype": "bfloat16"}
    folder = write(tmp_path / "m", gptq(codes_, zeros, scales, 4), {"quant_method": "gptq"}, config)
    exact = meant(codes_, zeros, scales.to(torch.float64), groups)
    assert torch.equal(read(folder), exact.to(torch.bfloat16))


def test_conv1d_is_shown_as_the_model_keeps_it(tmp_path):
    made = random_layer(64, 96, 4, 32)
    tensors = {f"h.0.mlp.c_fc.{k}": t for k, t in gptq(*made[:3], 4).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt2", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_reader(tmp_path) as reader:
        assert reader.entries["h.0.mlp.c_fc.weight"].shape == (64, 96)
        values = reader.read("h.0.mlp.c_fc.weight").view(64, 96)
        assert torch.equal(values, meant(*made).T)
        assert torch.equal(reader.read("h.0.mlp.c_fc.weight", 100, 300), values.flatten()[100:300])


@pytest.mark.parametrize("packed", ["gptq", "awq"])
def test_ranges_in_bands(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(codes, "_BAND_BYTES", 64 * 2 * 40)  # 32 outputs: the last band is shorter
    made = random_layer(64, 104, 4, 16, seed=5)
    layer = gptq(*made[:3], 4) if packed == "gptq" else awq(*made[:3])
    weight = meant(*made).flatten()
    with open_reader(write(tmp_path / "m", layer)) as reader:
        for start, stop in ((0, 6656), (63, 65), (2047, 4100), (6000, 6656), (5, 5), (0, 1)):
            assert torch.equal(reader.read(f"{NAME}.weight", start, stop), weight[start:stop])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:x"}, "auto_round:x"),
        ({"quant_method": "inc"}, "inc"),
    ],
)
def test_other_packings_are_refused(tmp_path, settings, word):
    folder = write(tmp_path / "m", gptq(*random_layer(64, 96, 4, 32)[:3], 4), settings)
    with pytest.raises(CheckpointError) as error:
        open_reader(folder)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("lost", ["qzeros", "scales", "qweight"])
def test_lost_parts_are_refused(tmp_path, lost):
    layer = gptq(*random_layer(64, 96, 4, 32)[:3], 4, groups=torch.arange(64) // 32)
    folder = write(tmp_path / "m", {k: v for k, v in layer.items() if k != lost})
    with pytest.raises(CheckpointError, match="missing"):
        open_reader(folder)


def test_shapes_that_fit_no_packing_are_refused(tmp_path):
    layer = gptq(*random_layer(64, 96, 4, 32)[:3], 4)
    folder = write(tmp_path / "m", layer | {"scales": layer["scales"][:, :50]})
    with pytest.raises(CheckpointError, match="neither GPTQ's nor"):
        open_reader(folder)
