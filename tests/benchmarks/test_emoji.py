"""The emoji suite's network against the published one, and its splits of made-up emoji."""

from __future__ import annotations

import io
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

SUITE = Path(__file__).parents[2] / "benchmarks" / "emoji"
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
PUBLISHED = 4_652_008  # parameters of EfficientNet-lite0, 1000 classes among them


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Load the suite's scripts, which import each other by bare names, for one test."""
    found: dict[str, Any] = {}
    for name in ("model", "fetch", "data"):
        spec = util.spec_from_file_location(name, SUITE / f"{name}.py")
        assert spec is not None and spec.loader is not None
        found[name] = util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found[name])
        spec.loader.exec_module(found[name])
    return found


def emoji() -> list[dict[str, Any]]:
    """Return emoji as the package lists them: hands, people of two roles, animals, a flag."""
    both = {"has_img_google": True, "has_img_twitter": True}

    def entry(name: str, unified: str, category: str, kind: str, toned: bool) -> dict[str, Any]:
        own = {"image": f"{unified.lower()}.png", "unified": unified, **both}
        pairs = (*TONES, "1F3FB-1F3FC") if toned else ()
        variations = {t: {"image": f"{unified}-{t}.png".lower(), **both} for t in pairs}
        told = {"short_name": name, "category": category, "subcategory": kind}
        return own | told | ({"skin_variations": variations} if toned else {})

    people = "People & Body"
    found = [entry(f"hand{i}", f"1F44{i}", people, "hand-fingers-open", True) for i in range(9)]
    for role in range(6):
        for gender, sign in (("woman", "1F469"), ("man", "1F468"), ("person", "1F9D1")):
            code = f"{sign}-200D-1F50{role}"
            found.append(entry(f"{gender}-{role}", code, people, "person-role", True))
        found.append(entry(f"judo-{role}", f"1F93{role}-200D-2640-FE0F", people, "family", True))
    for kind, count in (("animal-bird", 9), ("animal-bug", 8), ("animal-reptile", 5)):
        for i in range(count):
            found.append(entry(f"{kind}{i}", f"{kind}{i}", "Animals & Nature", kind, False))
    return found


def test_the_network_is_the_published_one(suite: dict[str, Any], tmp_path: Path) -> None:
    model = suite["model"]
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = model.EfficientNetLite().state_dict()
    # Small enough that no feature is cut by ReLU6.
    whole = {k: torch.randn(v.shape).mul(0.05).abs().to(v.dtype) for k, v in shapes.items()}
    whole |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    parameters = [v for k, v in whole.items() if "running" not in k and "tracked" not in k]
    assert sum(value.numel() for value in parameters) == PUBLISHED
    assert tuple(whole["_blocks.9._depthwise_conv.weight"].shape) == (672, 1, 5, 5)
    assert tuple(whole["_blocks.15._project_conv.weight"].shape) == (320, 1152, 1, 1)
    suite["fetch"].make_base(whole, tmp_path / "base")
    assert set(load_file(tmp_path / "base" / "model.safetensors")) == {
        name for name in whole if not name.startswith("_fc.")
    }
    loaded = model.load_model(tmp_path / "base")
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = model.features(loaded, pictures, batch=2)
    assert tuple(found.shape) == (3, 1280)
    assert torch.allclose(found[2:], model.features(loaded, pictures[2:]), rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(64, 3, 2), (7, 3, 2), (8, 5, 1), (9, 5, 2)]
)
def test_zeros_stand_as_in_tensorflow(
    suite: dict[str, Any], size: int, kernel: int, stride: int
) -> None:
    layer = suite["model"].convolution(1, 1, kernel, stride)
    image = torch.rand(1, 1, size, size)
    places = -(-size // stride)
    assert tuple(layer(suite["model"].padded(image, layer)).shape[2:]) == (places, places)
    # TensorFlow's rule: of all zeros that the last window needs, the smaller half goes first.
    total = max((places - 1) * stride + kernel - size, 0)
    sides = (total // 2, total - total // 2) * 2
    assert torch.equal(suite["model"].padded(image, layer), F.pad(image, sides))


def test_no_picture_is_in_two_splits(suite: dict[str, Any]) -> None:
    data, listed = suite["data"], emoji()
    for task in ("hands", "roles", "nature"):
        pictures = data.pictures_of(listed, task)
        splits = data.splits_of(pictures, task)
        assert splits == data.splits_of(pictures, task)
        files = [{(p.style, p.file) for p in own} for own in splits.values()]
        assert all(files) and len(set().union(*files)) == sum(map(len, files))
        labels = [{p.label for p in own} for own in splits.values()]
        assert labels[0] >= labels[1] | labels[2]
        if task in data.NAMED:
            assert {p.style for p in splits["train"]} == {"google"}
            assert {p.style for p in splits["test"]} == {"twitter"}
        else:
            groups = [{p.group for p in own} for own in splits.values()]
            assert len(set().union(*groups)) == sum(map(len, groups))
    assert {p.label for p in data.pictures_of(listed, "nature")} == {"animal-bird", "animal-bug"}
    assert {p.label for p in data.pictures_of(listed, "roles")} == {f"1F50{i}" for i in range(6)}
    assert len(data.pictures_of(listed, "hands")) == 9 * 2 * (1 + len(TONES))
    assert data.without_gender("1F93C-200D-2640-FE0F") == "1F93C"


def test_labels_are_drawn_alike_and_pictures_stay_in_range(suite: dict[str, Any]) -> None:
    data = suite["data"]
    pictures = [
        data.Picture("google", f"{i}", "rare" if i < 2 else "common", f"{i}") for i in range(40)
    ]
    drawn = data.balanced(pictures, 600, torch.Generator().manual_seed(0))
    share = sum(pictures[i].label == "rare" for i in drawn) / 600
    assert share == pytest.approx(0.5, abs=0.08)
    content = io.BytesIO()
    image = pytest.importorskip("PIL.Image").new("RGBA", (64, 64), (255, 0, 0, 128))
    image.save(content, "PNG")
    one = data.drawing(content.getvalue())
    assert one[:, 3, 5].tolist() == pytest.approx([1, 0, 0, 128 / 255])
    found = data.distort(one[None].repeat(4, 1, 1, 1), data.seeded("a"))
    assert found.dtype == torch.uint8 and tuple(found.shape) == (4, 3, 64, 64)
    assert torch.equal(found, data.distort(one[None].repeat(4, 1, 1, 1), data.seeded("a")))
    assert not torch.equal(found[0], found[1])
    middle = found[:, :, 24:40, 24:40].float().mean((0, 2, 3))
    assert middle[0] > middle[1] + 50  # half of it is red, on whatever background
