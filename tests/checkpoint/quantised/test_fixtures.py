"""Checkpoints that the formats' libraries wrote, against what these decode them to, by the bit."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.quantised import codes

FIXTURES = Path(__file__).parents[2] / "fixtures/quantised"
FOLDERS = sorted(path.parent.name for path in FIXTURES.glob("*/decoded.json"))
KINDS = {
    "bnb-fp4-gpt2": "bitsandbytes fp4",
    "bnb-int8": "bitsandbytes int8",
    "bnb-int8-gpt2": "bitsandbytes int8",
    "bnb-nf4-double": "bitsandbytes nf4 with double quantisation",
    "bnb-nf4-wide": "bitsandbytes nf4",
    "ct-fp8-block": "fp8 blocks",
    "ct-fp8-channel": "fp8 per channel",
    "ct-fp8-tensor": "fp8 per tensor",
    "ct-int3": "int3 packed",
    "ct-int4": "int4 packed",
    "ct-int4-zeros": "int4 packed",
    "ct-int8-channel": "int8 per channel",
    "ct-int8-group": "int8 groups",
    "ct-mxfp4": "mxfp4",
    "ct-nvfp4": "nvfp4",
}


def test_every_kind_is_there():
    assert FOLDERS == sorted(KINDS)


@pytest.mark.parametrize("name", FOLDERS)
def test_as_the_library_decodes(name):
    decoded = json.loads((FIXTURES / name / "decoded.json").read_text())
    with open_reader(FIXTURES / name) as reader:
        for key, (dtype, shape, digest) in decoded.items():
            entry, values = reader.entries[key], reader.read(key)
            assert entry.dtype is values.dtype is getattr(torch, dtype)
            assert list(entry.shape) == shape and values.numel() == entry.numel
            assert hashlib.sha256(values.view(torch.uint8).numpy()).hexdigest() == digest, key
        plain = [n for n, e in reader.entries.items() if n not in decoded]
        assert not [n for n in reader.entries if not n.endswith(("weight", "bias"))]
        assert all(reader.entries[n].dtype.is_floating_point for n in plain)
        (note,) = reader.notes
        assert note.numbers["kinds"] == {KINDS[name]: len(decoded)}
        assert "quantization_config" not in reader.index.config
        assert reader.index.entries == reader.entries


@pytest.mark.parametrize("name", FOLDERS)
def test_any_range_is_that_of_the_whole(name, monkeypatch):
    monkeypatch.setattr(codes, "_BAND_BYTES", 600)
    chosen = random.Random(name)
    with open_reader(FIXTURES / name) as reader:
        for key, entry in reader.entries.items():
            whole = reader.read(key)
            for _ in range(12):
                start, stop = sorted(chosen.randrange(entry.numel + 1) for _ in range(2))
                part = reader.read(key, start, stop)
                assert torch.equal(part, whole[start:stop])
                assert part.untyped_storage().nbytes() == part.nbytes
