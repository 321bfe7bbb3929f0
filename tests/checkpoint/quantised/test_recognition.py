"""What is told to be quantised, what is refused in one line, what is plain in spite of a claim."""

import json

import pytest
import torch
from safetensors.torch import save_file

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.opening import logical_tensors, open_reader
from eutectic.checkpoint.reader import CheckpointReader, StateDictReader
from eutectic.errors import CheckpointError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
NORM = {"model.norm.weight": torch.ones(4)}
FP8 = torch.arange(-8.0, 8.0).view(4, 4).to(torch.float8_e4m3fn)
INT8 = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
WORDS = torch.zeros(4, 4, dtype=torch.int32)


def write(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({**NORM, **tensors}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        open_reader(folder)
    text = str(error.value)
    assert "\n" not in text
    return text


def stated(method, **more):
    return {"quantization_config": {"quant_method": method, **more}}


FOREIGN = {
    "quanto": {f"{WEIGHT}._data": INT8, f"{WEIGHT}._scale": torch.ones(4, 1)},
    "hqq": {"q_proj.W_q": INT8.view(torch.uint8), "q_proj.scale": torch.ones(4, 1)},
    "aqlm": {"q_proj.codes": INT8, "q_proj.codebooks": torch.ones(1, 4, 1, 8)},
    "vptq": {"q_proj.indices": WORDS, "q_proj.centroids.weight": torch.ones(4, 8)},
    "eetq": {WEIGHT: INT8, "model.layers.0.self_attn.q_proj.weight_scales": torch.ones(4)},
    "exl2": {"q_proj.q_weight": WORDS, "q_proj.q_perm": torch.zeros(4, dtype=torch.int16)},
    "exl3": {"q_proj.trellis": torch.zeros(2, 2, 16, dtype=torch.int16)},
    "mlx": {
        WEIGHT: WORDS.view(torch.uint32),
        "q.scales": torch.ones(4, 1),
        "q.biases": FP8.float(),
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("by_config", [True, False])
def test_other_formats_are_named_and_refused(tmp_path, kind, by_config):
    config = stated(kind) if by_config else {}
    if by_config and kind == "mlx":
        config = {"quantization": {"group_size": 64, "bits": 4}}
    text = refusal(write(tmp_path, FOREIGN[kind], config))
    names = {"eetq": "EETQ", "quanto": "Quanto"}
    assert f"quantised ({names.get(kind, kind.upper())})" in text
    assert ("mlx_lm.convert" if kind == "mlx" else "hf download") in text


@pytest.mark.parametrize(
    ("method", "kind", "tensors"),
    [
        ("torchao", "torchao", {WEIGHT: INT8}),
        ("bitnet", "BitNet", {WEIGHT: INT8.view(torch.uint8), f"{WEIGHT}_scale": torch.ones(1)}),
        ("higgs", "HIGGS", {WEIGHT: INT8.view(torch.uint8)}),
        ("unheard-of", "unheard-of", {WEIGHT: INT8.view(torch.uint8)}),
        ("unheard-of", "unheard-of", {"x.packed": WORDS}),
        ("fp8", "fp8", {WEIGHT: FP8}),
    ],
)
def test_codes_that_nothing_explains_are_refused(tmp_path, method, kind, tensors):
    text = refusal(write(tmp_path, tensors, stated(method)))
    assert f"quantised ({kind})" in text and next(iter(tensors)) in text


@pytest.mark.parametrize(
    "lone",
    [
        {f"{WEIGHT}_scale_inv": torch.ones(1, 1)},
        {"q_proj.SCB": torch.ones(4)},
        {f"{WEIGHT}.absmax": torch.ones(4)},
        {"q_proj.qzeros": WORDS},
        {"q_proj.g_idx": torch.zeros(8, dtype=torch.int32)},
        {"q_proj.weight_packed": WORDS},
        {"x.experts.down_proj_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)},
        {f"{WEIGHT}_scale_inv": torch.ones(1, 1), WEIGHT: torch.ones(4, 4)},
        {"q_proj.SCB": torch.ones(4), "q_proj.weight": torch.ones(4, 4)},
    ],
    ids=lambda lone: next(iter(lone)).rsplit(".", 1)[-1],
)
def test_companions_without_codes_are_refused(tmp_path, lone):
    assert "missing" in refusal(write(tmp_path, lone)) or "beside" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integers_called_a_weight_are_refused(tmp_path, dtype):
    assert WEIGHT in refusal(write(tmp_path, {WEIGHT: INT8.view(dtype)}))


def test_many_tensors_are_one_line_with_a_count(tmp_path):
    many = {f"model.layers.{i}.q_proj.weight": INT8.clone() for i in range(30)}
    assert "30 tensors, such as 'model.layers.0" in refusal(write(tmp_path, many))


def test_masks_and_positions_are_no_codes(tmp_path):
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    buffers = {"h.0.attn.bias": mask, "x.position_ids": torch.arange(8)[None].to(torch.int32)}
    folder = write(tmp_path, {**buffers, WEIGHT: FP8, f"{WEIGHT}_scale": torch.ones(1)})
    with open_reader(folder) as reader:
        assert set(reader.entries) == {*NORM, *buffers, WEIGHT}
        assert torch.equal(reader.read("h.0.attn.bias"), mask.flatten())


def test_plain_checkpoints_have_the_plain_reader(tmp_path):
    folder = write(tmp_path, {WEIGHT: torch.ones(4, 4)}, {"model_type": "llama"})
    with open_reader(folder) as reader:
        assert type(reader) is CheckpointReader and not reader.notes
        with CheckpointReader(open_index(folder)) as own:
            assert reader.fingerprint() == own.fingerprint()


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "quanto", "gptq"])
def test_a_stale_claim_is_told(tmp_path, method):
    config = {"text_config": stated(method), "model_type": "x"}
    folder = write(tmp_path, {WEIGHT: torch.ones(4, 4)}, config)
    with open_reader(folder) as reader:
        (note,) = reader.notes
        assert note.kind == "stale_quantisation" and note.numbers == {"method": method}
        assert torch.equal(reader.read(WEIGHT), torch.ones(16))
        assert reader.index.config == {"text_config": {}, "model_type": "x"}


def test_half_of_a_checkpoint_may_be_quantised(tmp_path):
    tensors = {
        WEIGHT: FP8,
        f"{WEIGHT}_scale": torch.tensor([0.5]),
        "model.layers.0.self_attn.q_proj.input_scale": torch.tensor([3.0]),
        "model.layers.0.self_attn.k_scale": torch.tensor([3.0]),
        "lm_head.weight": torch.full((4, 4), 0.1),
        "model.layers.0.ls.scale": torch.ones(4),
    }
    settings = {"modules_to_not_convert": ["lm_head"]}
    folder = write(tmp_path, tensors, {**stated("fp8", **settings), "dtype": "float16"})
    with open_reader(folder) as reader:
        assert set(reader.entries) == {*NORM, WEIGHT, "lm_head.weight", "model.layers.0.ls.scale"}
        assert reader.entries["lm_head.weight"].dtype is torch.float32
        assert torch.equal(reader.read(WEIGHT), (FP8.float() * 0.5).to(torch.float16).flatten())


def test_fp8_without_scales_is_what_it_says(tmp_path):
    with open_reader(write(tmp_path, {WEIGHT: FP8})) as reader:
        assert torch.equal(reader.read(WEIGHT, 3, 9), FP8.flatten()[3:9].to(torch.bfloat16))
        assert reader.notes[0].numbers["kinds"] == {"fp8 without scales": 1}


def test_two_tensors_of_one_name_are_refused(tmp_path):
    blocks = torch.zeros(2, 4, 1, 16, dtype=torch.uint8)
    name = "x.experts.down_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": blocks[..., 0].contiguous()}
    assert "means" in refusal(write(tmp_path, {**tensors, name: torch.ones(2, 32, 4)}))


def test_what_decides_the_values_decides_the_fingerprint(tmp_path):
    scale = torch.linspace(1, 2, 2).view(1, 2)
    tensors = {WEIGHT: torch.cat([FP8] * 48, dim=1), f"{WEIGHT}_scale_inv": scale}
    found = set()
    for number, (config, held) in enumerate(
        [
            ({}, tensors),
            ({"dtype": "bfloat16"}, tensors),
            (stated("fp8", weight_block_size=[128, 96]), tensors),
            ({}, tensors | {f"{WEIGHT}_scale_inv": scale + 1}),
        ]
    ):
        with open_reader(write(tmp_path / str(number), held, config)) as reader:
            found.add(reader.fingerprint())
    assert len(found) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_of_the_type_of_those_beside_where_nothing_states_it(tmp_path, dtype):
    tensors = {WEIGHT: FP8, f"{WEIGHT}_scale_inv": torch.tensor([[0.3]])}
    norm = {"model.norm.weight": torch.ones(4, dtype=dtype)}
    with open_reader(write(tmp_path, {**tensors, **norm})) as reader:
        assert torch.equal(reader.read(WEIGHT), (FP8.float() * 0.3).to(dtype).flatten())


def test_state_dicts_too():
    tensors = {WEIGHT: FP8, f"{WEIGHT}_scale": torch.tensor([0.5])}
    source = logical_tensors(StateDictReader(tensors))
    assert torch.equal(source.read(WEIGHT), (FP8.float() * 0.5).to(torch.bfloat16).flatten())
    plain = StateDictReader(NORM)
    assert logical_tensors(plain) is plain
