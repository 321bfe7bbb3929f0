"""Convolutions as matrices over patches: 1×1 kernels are linear layers, groups stand apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import eutectic
from eutectic.errors import RequestError
from eutectic.statistics import collect
from helpers.cli import invoke
from helpers.folders import save

SEEDS = {"a": 1, "b": 2, "c": 3}
METHODS: dict[str, dict[str, Any]] = {
    "iso_a": {},
    "iso_c": {},
    "regmean": {},
    "mats": {"operator": "gram", "iterations": 4},
    "esm": {"preset": "vit"},
    "flow": {},
    "lot": {},
}


def model(seed: int, groups: int = 1, kernel: int = 3, scale: float = 0.1) -> nn.Sequential:
    """A convolution and a linear layer, near those of seed 0."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(4, 8, kernel, padding=kernel // 2, groups=groups))
    made.append(nn.Flatten()).append(nn.Linear(8 * 25, 3))
    if seed:
        torch.manual_seed(seed)
        for parameter in made.parameters():
            parameter.data += scale * torch.randn_like(parameter)
    return made


def images(seed: int) -> Tensor:
    torch.manual_seed(10 + seed)
    return torch.randn(6, 4, 5, 5) * torch.rand(4, 1, 1) + torch.randn(4, 1, 1)


def merged(method: str, groups: int, kernel: int = 3, **options: Any) -> dict[str, Tensor]:
    experts = {name: model(seed, groups, kernel) for name, seed in SEEDS.items()}
    statistics = {
        name: collect(expert, [images(SEEDS[name])], convolutions=True)
        for name, expert in experts.items()
    }
    base = kernel_of(model(0, groups, kernel))
    found = eutectic.merge_state_dicts(
        base,
        {name: kernel_of(expert) for name, expert in experts.items()},
        method=method,
        statistics=statistics,
        **{"scale": 1.0, "convolutions": "matrix", **options},
    )
    return {name: tensor.double() - base[name] for name, tensor in found.items()}


def kernel_of(made: nn.Sequential) -> dict[str, Tensor]:
    """The convolution alone: no other layer is compared with it."""
    return {name: t for name, t in made.state_dict().items() if name.startswith("0.")}


@pytest.mark.parametrize("method", METHODS)
def test_a_1x1_convolution_is_a_linear_layer_on_pixels(method: str) -> None:
    found = merged(method, 1, 1, **METHODS[method])["0.weight"]
    base, linear = model(0, 1, 1)[0].weight[:, :, 0, 0], {}
    for name, seed in SEEDS.items():
        linear[name] = nn.Sequential(nn.Linear(4, 8, bias=False))
        linear[name][0].weight.data = model(seed, 1, 1)[0].weight[:, :, 0, 0].detach()
    statistics = {
        name: collect(one, [images(SEEDS[name]).permute(0, 2, 3, 1).reshape(6, 25, 4)])
        for name, one in linear.items()
    }
    expected = eutectic.merge_state_dicts(
        {"0.weight": base.detach()},
        {name: one.state_dict() for name, one in linear.items()},
        method=method,
        statistics=statistics,
        scale=1.0,
        **METHODS[method],
    )["0.weight"]
    torch.testing.assert_close(
        found[:, :, 0, 0], (expected - base).double().detach(), rtol=1e-4, atol=1e-6
    )


def test_least_squares_of_a_convolution_is_that_of_its_outputs() -> None:
    """Against a solver that knows convolutions only: the kernel whose outputs fit best."""
    for groups in (1, 2, 4):
        found = merged("regmean", groups, off_diagonal=1.0)["0.weight"]
        rows, wanted = [], []
        for seed in SEEDS.values():
            x = images(seed).double()
            delta = (model(seed, groups)[0].weight - model(0, groups)[0].weight).double()
            basis = torch.eye(delta.numel(), dtype=torch.float64).view(-1, *delta.shape)
            each = [nn.functional.conv2d(x, e, None, 1, 1, 1, groups).flatten() for e in basis]
            rows.append(torch.stack(each, 1))
            wanted.append(nn.functional.conv2d(x, delta, None, 1, 1, 1, groups).flatten())
        fitted = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None]).solution
        torch.testing.assert_close(found.flatten(), fitted.flatten(), rtol=1e-3, atol=1e-4)


def test_groups_are_matrices_of_their_own_and_single_rows_have_no_spectrum() -> None:
    for groups in (1, 2):
        found = merged("iso_c", groups)["0.weight"].flatten(1).chunk(groups)
        deltas = [
            (model(seed, groups)[0].weight - model(0, groups)[0].weight).detach().flatten(1)
            for seed in SEEDS.values()
        ]
        for index, own in enumerate(found):
            stack = torch.stack([d.chunk(groups)[index] for d in deltas])
            u, s, v = torch.linalg.svd(stack.double().sum(0), full_matrices=False)
            torch.testing.assert_close(own, u @ v * s.mean(), rtol=1e-4, atol=1e-5)
    # Depthwise: Iso-A would only add the experts up; their mean is taken.
    torch.manual_seed(0)
    experts = {n: depthwise(seed) for n, seed in SEEDS.items()}
    statistics = {n: collect(e, [images(SEEDS[n])], convolutions=True) for n, e in experts.items()}
    states = {n: e.state_dict() for n, e in experts.items()}
    base = depthwise(0).state_dict()
    options: dict[str, Any] = {"statistics": statistics, "scale": 1.0}
    found = eutectic.merge_state_dicts(
        base, states, method="iso_a", convolutions="matrix", **options
    )
    mean = torch.stack([s["0.weight"] for s in states.values()]).mean(0)
    torch.testing.assert_close(found["0.weight"], mean)
    plain = eutectic.merge_state_dicts(base, states, method="iso_a", **options)
    assert not torch.allclose(found["1.weight"], plain["1.weight"], atol=1e-3)


def depthwise(seed: int) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 3))
    torch.manual_seed(seed)
    for parameter in made.parameters() if seed else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_expert_gives_itself_and_zero_deltas_the_base(groups: int) -> None:
    base, expert = model(0, groups), model(1, groups)
    statistics = {"a": collect(expert, [images(1)], convolutions=True)}
    for kept in (expert, base):
        found = eutectic.merge_state_dicts(
            base.state_dict(),
            {"a": kept.state_dict()},
            method="regmean",
            statistics=statistics,
            statistics_of="any",
            convolutions="matrix",
        )
        for name, tensor in kept.state_dict().items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_files_give_what_memory_gives_and_the_plan_says_so(tmp_path: Path) -> None:
    base = save(tmp_path / "base", depthwise(0).state_dict())
    words = ["--base", str(base), "--convolutions", "matrix", "--scale", "1"]
    states: dict[str, Any] = {}
    statistics: dict[str, Any] = {}
    for name, seed in SEEDS.items():
        expert = depthwise(seed)
        states[name] = expert.state_dict()
        folder = save(tmp_path / name, states[name])
        file = tmp_path / f"{name}.safetensors"
        statistics[name] = collect(expert, [images(seed)], file, convolutions=True)
        words += [f"{name}={folder}", "--statistics", f"{name}={file}"]
    shown = invoke("plan", "-m", "regmean", *words, "--all")
    assert "convolution as a matrix over patches" in shown.out, shown.err
    assert invoke("merge", "-m", "regmean", *words, "-o", tmp_path / "out").code == 0
    expected = eutectic.merge_state_dicts(
        depthwise(0).state_dict(),
        states,
        method="regmean",
        statistics=statistics,
        convolutions="matrix",
        scale=1.0,
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ties"}, "ties works entry by entry"),
        ({"method": "fisher", "fallback": "allow"}, "fisher works entry by entry"),
        ({"method": "regmean"}, "of none are there any"),
        ({"method": "iso_c", "convolutions": "patches"}, "average"),
    ],
)
def test_what_would_change_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    base, experts = model(0), {n: model(s).state_dict() for n, s in SEEDS.items()}
    linear = {n: collect(model(s), [images(s)], layers=["2.weight"]) for n, s in SEEDS.items()}
    with pytest.raises(RequestError, match=said):
        eutectic.merge_state_dicts(
            base.state_dict(),
            experts,
            **{"statistics": linear, "convolutions": "matrix", **options},
        )


def test_models_without_convolutions_are_refused() -> None:
    base = {"0.weight": torch.randn(4, 3)}
    with pytest.raises(RequestError, match="no tensor that is merged is a convolution"):
        eutectic.merge_state_dicts(
            base, {"a": base, "b": base}, method="iso_c", convolutions="matrix"
        )


@pytest.mark.parametrize("kernel", [1, 3])
def test_cores_of_kernels_have_the_size_of_their_matrices(tmp_path: Path, kernel: int) -> None:
    """Not of the kernels' last two axes, by which a warning would say that nothing is kept."""
    folders = {n: save(tmp_path / n, kernel_of(model(s, 1, kernel))) for n, s in SEEDS.items()}
    base = save(tmp_path / "base", kernel_of(model(0, 1, kernel)))
    asked: dict[str, Any] = {"base": base, "experts": {n: str(f) for n, f in folders.items()}}
    asked |= {"method": "core_ties", "convolutions": "matrix"}
    most = {1: 8 * 4, 3: 8 * 24}[kernel]  # `[8, 4]` and `[8, 36]` with 4 and 8 directions each
    for density, told in ((1.5 / most, []), (0.5 / most, [most])):
        notes = eutectic.plan(**asked, parameters={"density": density}).note_records
        assert [n.numbers["entries"] for n in notes if n.kind == "trimmed_away"] == told


def test_what_is_taken_as_one_group_is_said(tmp_path: Path) -> None:
    folders = {n: save(tmp_path / n, kernel_of(model(s, 2, 3))) for n, s in SEEDS.items()}
    base = save(tmp_path / "base", kernel_of(model(0, 2, 3)))
    asked: dict[str, Any] = {"base": base, "experts": {n: str(f) for n, f in folders.items()}}
    found = eutectic.plan(**asked, method="iso_c", convolutions="matrix").tensors
    said = {planned["name"]: planned["why"] for planned in found}
    assert "no statistics say how many groups it has: taken as one" in said["0.weight"]


def transposed(seed: int, channels: int, groups: int, name: str, bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = nn.Module()
    made.add_module(name, nn.ConvTranspose2d(6, channels, 2, groups=groups, bias=bias))
    torch.manual_seed(seed)
    for parameter in made.parameters() if seed else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return {key: tensor.detach() for key, tensor in made.state_dict().items()}


@pytest.mark.parametrize(
    ("channels", "name", "bias"), [(4, "up", True), (6, "deconv", True), (4, "deconv", False)]
)
def test_a_transposed_convolution_is_a_matrix_from_inputs_to_patches(
    tmp_path: Path, channels: int, name: str, bias: bool
) -> None:
    """`[in, out, k, k]` in the file: wudi, which tells rows from columns, sees `[out·k·k, in]`."""
    states = {n: transposed(s, channels, 1, name, bias) for n, s in SEEDS.items()}
    base, key = transposed(0, channels, 1, name, bias), f"{name}.weight"
    linear = {n: {"0.weight": s[key].flatten(1).T.contiguous()} for n, s in states.items()}
    for method in ("wudi", "iso_c"):
        options: dict[str, Any] = {"method": method, "scale": 1.0}
        found = eutectic.merge_state_dicts(base, states, convolutions="matrix", **options)
        flat = {"0.weight": base[key].flatten(1).T.contiguous()}
        expected = eutectic.merge_state_dicts(flat, linear, **options)["0.weight"]
        torch.testing.assert_close(found[key].flatten(1).T, expected, rtol=1e-5, atol=1e-6)
    folders = {n: str(save(tmp_path / n, s)) for n, s in states.items()}
    asked: dict[str, Any] = {"base": save(tmp_path / "base", base), "experts": folders}
    planned = eutectic.plan(**asked, method="iso_c", convolutions="matrix").tensors
    said = {tensor["name"]: tensor["why"] for tensor in planned}
    assert "transposed convolution as a matrix from inputs to patches" in said[key]


def upsampling(seed: int, axes: int, groups: int) -> nn.Sequential:
    """A transposed convolution of as many inputs as outputs, which no name tells."""
    torch.manual_seed(0)
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}[axes]
    made = nn.Sequential(kind(4, 4, 2, stride=2, groups=groups))
    torch.manual_seed(seed)
    for parameter in made.parameters() if seed else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize(("axes", "groups"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)])
def test_least_squares_of_a_transposed_convolution_is_that_of_its_outputs(
    axes: int, groups: int
) -> None:
    """Patches side by side, so that outputs are the patches: the kernel whose outputs fit best."""
    run = {1: nn.functional.conv_transpose1d, 2: nn.functional.conv_transpose2d}[axes]
    seen = {n: images(s) if axes == 2 else images(s)[..., 0] for n, s in SEEDS.items()}
    experts = {n: upsampling(s, axes, groups) for n, s in SEEDS.items()}
    base = upsampling(0, axes, groups).state_dict()
    found = eutectic.merge_state_dicts(
        base,
        {n: e.state_dict() for n, e in experts.items()},
        method="regmean",
        parameters={"off_diagonal": 1.0},
        statistics={n: collect(e, [seen[n]], convolutions=True) for n, e in experts.items()},
        convolutions="matrix",
        scale=1.0,
    )["0.weight"]
    rows, wanted = [], []
    for name, expert in experts.items():
        x, delta = seen[name].double(), (expert[0].weight - base["0.weight"]).double()
        basis = torch.eye(delta.numel(), dtype=torch.float64).view(-1, *delta.shape)
        each = [run(x, e, None, 2, 0, 0, groups).flatten() for e in basis]
        rows.append(torch.stack(each, 1))
        wanted.append(run(x, delta, None, 2, 0, 0, groups).flatten())
    fitted = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)[:, None]).solution
    merged = (found - base["0.weight"]).double()
    torch.testing.assert_close(merged.flatten(), fitted.flatten(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_bare_statistics_tell_a_transposed_kernel_by_the_inputs_that_they_saw(groups: int) -> None:
    experts = {n: upsampling(s, 2, groups) for n, s in SEEDS.items()}
    states = {n: e.state_dict() for n, e in experts.items()}
    collected = {n: collect(e, [images(SEEDS[n])], convolutions=True) for n, e in experts.items()}
    options: dict[str, Any] = {"method": "regmean", "convolutions": "matrix", "scale": 1.0}
    base = upsampling(0, 2, groups).state_dict()
    told = eutectic.merge_state_dicts(base, states, statistics=collected, **options)
    bare = {n: {name: found[name] for name in found} for n, found in collected.items()}
    found = eutectic.merge_state_dicts(base, states, statistics=bare, **options)
    assert torch.equal(found["0.weight"], told["0.weight"])


def test_statistics_without_grams_tell_kinds_and_groups_too() -> None:
    experts = {n: upsampling(s, 2, 2) for n, s in SEEDS.items()}
    states = {n: e.state_dict() for n, e in experts.items()}
    base = upsampling(0, 2, 2).state_dict()

    def found(**options: Any) -> Tensor:
        seen = {
            n: collect(
                e,
                [images(SEEDS[n])],
                convolutions=True,
                objective=lambda outputs, batch: outputs.square().flatten(1).sum(1),
                **options,
            )
            for n, e in experts.items()
        }
        merged = eutectic.merge_state_dicts(
            base, states, method="iso_c", convolutions="matrix", scale=1.0, statistics=seen
        )
        return merged["0.weight"]

    torch.testing.assert_close(
        found(grams=False, output_gradients=True), found(output_gradients=True)
    )


@pytest.mark.parametrize("post", [None, "svc"])
@pytest.mark.parametrize(("channels", "name"), [(4, "up"), (6, "deconv")])
def test_groups_of_transposed_convolutions_are_matrices_of_their_own(
    tmp_path: Path, channels: int, name: str, post: str | None
) -> None:
    """Without statistics, by the size of the bias; each as a linear layer on its own channels."""
    key = f"{name}.weight"
    states = {n: transposed(s, channels, 2, name, True) for n, s in SEEDS.items()}
    base = transposed(0, channels, 2, name, True)
    options: dict[str, Any] = {"method": "iso_c", "scale": 1.0, "post": post}
    found = eutectic.merge_state_dicts(base, states, convolutions="matrix", **options)[key]

    def linear(state: dict[str, Tensor], half: int) -> dict[str, Tensor]:
        return {"0.weight": state[key].chunk(2)[half].flatten(1).T.contiguous()}

    for half, own in enumerate(found.chunk(2)):
        apart = {n: linear(s, half) for n, s in states.items()}
        expected = eutectic.merge_state_dicts(linear(base, half), apart, **options)["0.weight"]
        torch.testing.assert_close(own.flatten(1).T, expected, rtol=1e-5, atol=1e-6)
    folders = {n: str(save(tmp_path / n, s)) for n, s in states.items()}
    asked: dict[str, Any] = {"base": save(tmp_path / "base", base), "experts": folders}
    planned = eutectic.plan(**asked, method="iso_c", convolutions="matrix").tensors
    said = {tensor["name"]: tensor["why"] for tensor in planned}
    assert "transposed convolution as a matrix from inputs to patches" in said[key]
