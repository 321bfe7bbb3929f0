"""FP8, INT8 and MXFP4 against transformers' own functions, and grids of scales entry by entry."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import save_file

from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.quantised import codes
from eutectic.errors import CheckpointError

NAME = "model.layers.0.self_attn.q_proj.weight"
MADE = torch.Generator().manual_seed(0)


def write(folder, tensors, settings=None, **config):
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    if settings is not None:
        config["quantization_config"] = settings
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def values_of(folder, name=NAME):
    with open_reader(folder) as reader:
        assert list(reader.entries) == [name]
        entry = reader.entries[name]
        values = reader.read(name)
        assert values.dtype is entry.dtype
        chosen = random.Random(0)
        for _ in range(8):
            start, stop = sorted(chosen.randrange(entry.numel + 1) for _ in range(2))
            assert torch.equal(reader.read(name, start, stop), values[start:stop])
        return values.view(entry.shape)


def fp8(*shape, dtype=torch.float8_e4m3fn):
    return (torch.randn(shape, generator=MADE) * 100).to(dtype)


def scale(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=MADE) * 0.01 + 1e-3).to(dtype)


@pytest.mark.parametrize("shape", [(256, 384), (256, 128), (3, 256, 128)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_blocks_as_transformers(tmp_path, shape, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = fp8(*shape, dtype=dtype)
    inverse = scale(*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write(tmp_path, {NAME: weight, f"{NAME}_scale_inv": inverse}, settings)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, inverse, torch.bfloat16)
    assert torch.equal(values_of(folder), theirs)


@pytest.mark.parametrize("settings", [{"weight_block_size": [128, 128]}, None])
def test_blocks_that_are_cut_off(tmp_path, settings):
    # DeepSeek-V3's kv_a_proj has 576 rows: blocks of 128 of which the last has 64.
    weight, inverse = fp8(576, 200), scale(5, 2)
    settings = settings and {"quant_method": "fp8", **settings}
    folder = write(tmp_path, {NAME: weight, f"{NAME}_scale_inv": inverse}, settings)
    spread = torch.empty(576, 200)
    for i in range(576):
        for j in range(200):
            spread[i, j] = inverse[i // 128, j // 128]
    assert torch.equal(values_of(folder), (weight.float() * spread).to(torch.bfloat16))


@pytest.mark.parametrize("held", [(), (1,), (1, 1), (6,), (6, 1), (1, 8), (6, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_any_grid(tmp_path, held, suffix):
    weight, scales = fp8(6, 8), scale(*held)
    folder = write(tmp_path, {NAME: weight, NAME + suffix: scales}, torch_dtype="float32")
    down, across = (*held, 1, 1)[:2] if held else (1, 1)
    grid = scales.reshape(down, across)
    wanted = torch.empty(6, 8)
    for i in range(6):
        for j in range(8):
            wanted[i, j] = weight[i, j].float() * grid[i * down // 6, j * across // 8]
    assert torch.equal(values_of(folder), wanted)


@pytest.mark.parametrize(
    "held", [(3,), (3, 1, 1), (3, 6, 1), (3, 1, 8), (3, 6), (3, 2, 4)], ids=str
)
def test_stacks_of_experts(tmp_path, held):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scales = fp8(3, 6, 8), scale(*held)
    tensors = {name: weight, f"{name}_scale": scales, "x.input_scale": scale(1)}
    folder = write(tmp_path, tensors, dtype="float32")
    down, across = (*held[1:], 1, 1)[:2]
    grid = scales.view(3, down, across)
    spread = grid.repeat_interleave(6 // down, 1).repeat_interleave(8 // across, 2)
    assert torch.equal(values_of(folder, name), weight.float() * spread)


def test_int8_with_zero_points(tmp_path):
    weight = torch.randint(-128, 128, (6, 8), generator=MADE, dtype=torch.int8)
    zeros = torch.randint(-20, 20, (6, 1), generator=MADE, dtype=torch.int8)
    scales = scale(6, 1, dtype=torch.bfloat16)
    parts = {NAME: weight, f"{NAME}_scale": scales, f"{NAME}_zero_point": zeros}
    wanted = ((weight.float() - zeros.float()) * scales.float()).to(torch.bfloat16)
    assert torch.equal(values_of(write(tmp_path, parts)), wanted)


def test_exponents_as_scales(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = fp8(4, 64)
    exponents = torch.randint(110, 130, (4, 2), generator=MADE, dtype=torch.uint8)
    folder = write(tmp_path, {NAME: weight, f"{NAME}_scale_inv": exponents})
    theirs = Fp8Dequantize(None)._dequantize_one(weight, exponents, torch.bfloat16)
    assert torch.equal(values_of(folder), theirs)


def test_two_numbers_in_a_byte(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = torch.randint(-128, 128, (4, 32), generator=MADE, dtype=torch.int8)
    exponents = torch.randint(120, 130, (4, 2), generator=MADE, dtype=torch.uint8)
    exponents = exponents.view(torch.float8_e8m0fnu)
    own = NAME.replace(".weight", ".scale")
    folder = write(tmp_path, {NAME: packed, own: exponents}, {"quant_method": "fp8"})
    theirs = Fp8Dequantize(None)._dequantize_one(packed, exponents, torch.bfloat16)
    assert torch.equal(values_of(folder), theirs)


@pytest.mark.parametrize("held", [(5,), (4, 4, 1), (7, 1), (6, 3)], ids=str)
def test_scales_that_do_not_fit_are_refused(tmp_path, held):
    folder = write(tmp_path, {NAME: fp8(6, 8), f"{NAME}_scale": scale(*held)})
    with pytest.raises(CheckpointError, match="fit"):
        open_reader(folder)


@pytest.mark.parametrize(("groups", "width"), [(3, 16), (1, 8)])
def test_mxfp4_as_transformers(tmp_path, monkeypatch, groups, width):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (3, 10, groups, width), generator=MADE, dtype=torch.uint8)
    scales = torch.randint(115, 131, (3, 10, groups), generator=MADE, dtype=torch.uint8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    write(tmp_path, tensors, {"quant_method": "mxfp4"}, torch_dtype="bfloat16")
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(values_of(tmp_path, name), theirs)
    monkeypatch.setattr(codes, "_BAND_BYTES", 700)  # one group: bands cross the experts' ends
    assert torch.equal(values_of(tmp_path, name), theirs)
    assert math.prod(theirs.shape) == blocks.numel() * 2


def test_modelopt_nvfp4(tmp_path):
    packed = torch.randint(0, 256, (4, 16), generator=MADE, dtype=torch.uint8)
    scales, common = fp8(4, 2).abs().to(torch.float8_e4m3fn), torch.tensor(0.003)
    parts = {NAME: packed, f"{NAME}_scale": scales, f"{NAME}_scale_2": common}
    folder = write(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    wanted = torch.empty(4, 32)
    for i in range(4):
        for j in range(32):
            code = int(packed[i, j // 2]) >> 4 * (j % 2) & 15
            sign = -1 if code & 8 else 1
            wanted[i, j] = sign * table[code & 7] * (scales[i, j // 16].float() * common)
    assert torch.equal(values_of(folder), wanted.to(torch.bfloat16))
