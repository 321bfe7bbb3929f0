"""Guards that mixtures meet whatever their layout, bit for bit, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert, full_expert
from eutectic.checkpoint.reader import StateDictReader
from eutectic.errors import CheckpointError

EXPERTS, INNER, HIDDEN = 3, 4, 6
AT = "model.layers.0.mlp.experts"


def matrices(inner: int = INNER, hidden: int = HIDDEN, seed: int = 0) -> dict[str, Tensor]:
    """One mixture as linear layers."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {
        f"{e}.{role}": torch.randn(shape, generator=g)
        for e in range(EXPERTS)
        for role, shape in shapes.items()
    }


def fused(own: dict[str, Tensor], alternate: bool = False) -> tuple[Tensor, Tensor]:
    """[E, 2I, H] and [E, H, I]."""
    both = []
    for e in range(EXPERTS):
        pair = own[f"{e}.gate"], own[f"{e}.up"]
        both.append(torch.stack(pair, 1).flatten(0, 1) if alternate else torch.cat(pair))
    return torch.stack(both), torch.stack([own[f"{e}.down"] for e in range(EXPERTS)])


def single(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{AT}.{k}_proj.weight": v for k, v in own.items()}


def mixtral(own: dict[str, Tensor]) -> dict[str, Tensor]:
    at = "model.layers.0.block_sparse_moe.experts"
    spelt = {"gate": "w1", "up": "w3", "down": "w2"}
    return {f"{at}.{k[0]}.{spelt[k[2:]]}.weight": v for k, v in own.items()}


def packed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    gate_up, down = fused(own)
    return {f"{AT}.gate_up_proj": gate_up, f"{AT}.down_proj": down}


def turned(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.mT.contiguous() for name, t in packed(own).items()}


def stacked(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{AT}.{role}_proj.weight": torch.stack([own[f"{e}.{role}"] for e in range(EXPERTS)])
        for role in ("gate", "up", "down")
    }


def vllm(own: dict[str, Tensor]) -> dict[str, Tensor]:
    gate_up, down = fused(own)
    return {f"{AT}.w13_weight": gate_up, f"{AT}.w2_weight": down}


def granite(own: dict[str, Tensor]) -> dict[str, Tensor]:
    gate_up, down = fused(own)
    at = "model.layers.0.block_sparse_moe"
    return {f"{at}.input_linear.weight": gate_up, f"{at}.output_linear.weight": down}


LAYOUTS = [single, mixtral, packed, turned, stacked, vllm, granite]


def opened(base: dict[str, Tensor], own: dict[str, Tensor], *models: str | None) -> Expert:
    common = {"model.norm.weight": torch.ones(2)}
    configs = [{} if m is None else {"model_type": m} for m in (*models, None, None)]
    return full_expert(
        StateDictReader(own | common),
        StateDictReader(base | common).entries,
        "expert 'a'",
        configs[1],
        base_config=configs[0],
    )


def check(found: Expert, wanted: dict[str, Tensor]) -> None:
    assert found.missing == ()
    assert not found.extra
    for name, tensor in wanted.items():
        assert found.entries[name].shape == tuple(tensor.shape)
        assert found.entries[name].dtype == tensor.dtype
        assert torch.equal(found.read(name).view(tensor.shape), tensor), name


@pytest.mark.parametrize("base", LAYOUTS)
@pytest.mark.parametrize("own", LAYOUTS)
def test_every_layout_against_every_other(base: Callable, own: Callable) -> None:
    found = opened(base(matrices()), own(matrices(seed=1)))
    check(found, base(matrices(seed=1)))


@pytest.mark.parametrize(("inner", "hidden"), [(4, 8), (6, 6)])
@pytest.mark.parametrize("base", LAYOUTS)
@pytest.mark.parametrize("own", LAYOUTS)
def test_square_matrices(base: Callable, own: Callable, inner: int, hidden: int) -> None:
    """The stacks that are not square tell the order of axes of those that are."""
    models = ["llama4" if f is turned else "qwen3_moe" for f in (base, own)]
    if stacked not in (base, own) or base is own or inner != hidden:
        models = []
    found = opened(base(matrices(inner, hidden)), own(matrices(inner, hidden, seed=1)), *models)
    check(found, base(matrices(inner, hidden, seed=1)))


def test_square_matrices_alone() -> None:
    """Without another stack, shapes fit both orders of axes; the model type tells."""
    one, other = matrices(6, 6), matrices(6, 6, seed=1)
    base = {name: t for name, t in single(one).items() if "down" in name}
    own = {name: t for name, t in packed(other).items() if "down" in name}
    with pytest.raises(CheckpointError, match=r"\[E, out, in\] or \[E, in, out\]"):
        opened(base, own)
    wanted = {name: t for name, t in single(other).items() if "down" in name}
    check(opened(base, own, "qwen3_moe", "qwen3_moe"), wanted)
    own = {name: t for name, t in turned(other).items() if "down" in name}
    check(opened(base, own, "llama4_text", "llama4_text"), wanted)


def gpt_oss(own: dict[str, Tensor], biases: bool = True) -> dict[str, Tensor]:
    gate_up, down = fused(own, alternate=True)
    out = {f"{AT}.gate_up_proj": gate_up.mT.contiguous(), f"{AT}.down_proj": down.mT.contiguous()}
    if biases:
        out[f"{AT}.gate_up_proj_bias"] = gate_up.sum(-1)
        out[f"{AT}.down_proj_bias"] = down.sum(-1)
    return out


def single_with_biases(own: dict[str, Tensor]) -> dict[str, Tensor]:
    sums = {k.replace("weight", "bias"): v.sum(-1) for k, v in single(own).items()}
    return single(own) | sums


def listed(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """unsloth's gpt-oss: linear layers in lists, rows alternating as in the original."""
    out: dict[str, Tensor] = {}
    for name, stack in zip(("gate_up", "down"), fused(own, alternate=True), strict=True):
        for e in range(EXPERTS):
            out[f"{AT}.{name}_projs.{e}.weight"] = stack[e]
            out[f"{AT}.{name}_projs.{e}.bias"] = stack[e].sum(-1)
    return out


GPT_OSS = [gpt_oss, single_with_biases, listed]


@pytest.mark.parametrize("base", GPT_OSS)
@pytest.mark.parametrize("own", GPT_OSS)
def test_alternating_rows_and_biases(base: Callable, own: Callable) -> None:
    found = opened(base(matrices()), own(matrices(seed=1)), "gpt_oss", "gpt_oss")
    check(found, base(matrices(seed=1)))


def test_fused_rows_without_a_model_type() -> None:
    with pytest.raises(CheckpointError, match="alternating"):
        opened(single_with_biases(matrices()), gpt_oss(matrices()))


def dense(g: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Phi-3's layer, and the same as Llama keeps it."""
    make = torch.Generator().manual_seed(g)
    q, k, v = (torch.randn(n, 4, generator=make) for n in (8, 2, 2))
    gate, up = (torch.randn(6, 4, generator=make) for _ in range(2))
    at = "model.layers.0"
    together = {
        f"{at}.self_attn.qkv_proj.weight": torch.cat([q, k, v]),
        f"{at}.mlp.gate_up_proj.weight": torch.cat([gate, up]),
    }
    apart = {
        **{f"{at}.self_attn.{n}_proj.weight": t for n, t in {"q": q, "k": k, "v": v}.items()},
        **{f"{at}.mlp.{n}_proj.weight": t for n, t in {"gate": gate, "up": up}.items()},
    }
    return together, apart


def test_fused_projections_of_phi3() -> None:
    check(opened(dense(0)[0], dense(1)[1]), dense(1)[0])
    check(opened(dense(0)[1], dense(1)[0]), dense(1)[1])


@pytest.mark.parametrize("change", ["fewer", "more", "one lacks", "narrower"])
def test_what_does_not_make_up_the_base_stays_apart(change: str) -> None:
    own = packed(matrices(seed=1))
    if change == "fewer":
        own = {name: t[:-1] for name, t in own.items()}
    elif change == "more":
        own = {name: torch.cat([t, t[:1]]) for name, t in own.items()}
    elif change == "narrower":
        own = packed(matrices(inner=3))
    base = single(matrices())
    if change == "one lacks":
        own, base = base, packed(matrices())
        del own[f"{AT}.1.up_proj.weight"], own[f"{AT}.1.down_proj.weight"]
    found = opened(base, own)
    assert set(found.missing) == set(base)
    assert set(found.extra) == set(own)


def test_types_of_pieces_may_not_differ() -> None:
    own = single(matrices())
    own[f"{AT}.1.up_proj.weight"] = own[f"{AT}.1.up_proj.weight"].half()
    with pytest.raises(CheckpointError, match="different types"):
        opened(packed(matrices()), own)


def test_twice_the_same_matrices() -> None:
    own = single(matrices()) | packed(matrices())
    with pytest.raises(CheckpointError, match="both hold the gate matrix"):
        opened(stacked(matrices()), own)


def test_readings_are_told() -> None:
    found = opened(single(matrices()), packed(matrices()))
    at = "model.layers.*.mlp.experts"
    told = [(r.own, r.base, r.count) for r in found.alignment.readings]
    assert (f"{at}.gate_up_proj", f"{at}.*.up_proj.weight", EXPERTS) in told


@pytest.mark.parametrize(("base", "own"), [(single, turned), (packed, single), (packed, turned)])
def test_ranges_from_many_threads(base: Callable, own: Callable) -> None:
    found = opened(base(matrices()), own(matrices(seed=1)))
    wanted = base(matrices(seed=1))
    spans = [
        (n, a, a + k) for n, t in wanted.items() for a in range(0, t.numel(), 5) for k in (0, 7)
    ]

    def right(span: tuple[str, int, int]) -> bool:
        name, start, stop = span
        stop = min(stop, wanted[name].numel())
        return torch.equal(found.read(name, start, stop), wanted[name].flatten()[start:stop])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, spans * 5))


def test_ordinary_checkpoints_have_no_views() -> None:
    reader = StateDictReader(packed(matrices()))
    assert full_expert(reader, reader.entries, "a").source is reader
