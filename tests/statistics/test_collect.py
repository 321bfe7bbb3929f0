"""Guards the sums: against single unpadded examples, in any batching, for any architecture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import (
    MODELS,
    assert_near,
    assert_same,
    batched,
    bert,
    examples,
    llama,
    naive,
    padded,
    seeded,
    t5,
)
from torch import Tensor, nn

from eutectic.errors import NumericalError, RequestError, StatisticsError
from eutectic.models.sites import as_matrix, find_sites, output_rows
from eutectic.statistics import collect, load_statistics


@pytest.mark.parametrize("name", MODELS)
def test_sums_equal_those_of_single_unpadded_examples(name: str) -> None:
    model, data = MODELS[name](), examples(name)
    expected = naive(model, data)

    found = collect(model, batched(data, 4))

    linear = {n for n in found if found.provenance["layers"][n]["kind"] != "parameter"}
    assert linear == set(expected)
    for layer, sums in expected.items():
        got = found[layer]
        assert (got.count, got.sample_count) == (sums["count"], sums["samples"]), layer
        assert_near(got.dense_gram(), sums["gram"])
        assert_near(got.input_sum, sums["input_sum"], 1e-5)
        assert_near(got.pooled_sum, sums["pooled_sum"], 1e-5)
        assert_near(got.pooled_gram, sums["pooled_gram"])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_equal_lengths_of_encoder_and_decoder_do_not_mix_their_masks(name: str) -> None:
    model, data = MODELS[name](), examples(name)
    batch = padded(data)
    assert batch["input_ids"].shape == batch["labels"].shape
    source, target = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    data = data[:-1]  # now the numbers of tokens differ, so that a mistaken mask shows
    batch = padded(data)
    source, target = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    assert source != target

    found = collect(model, [batch])

    for layer in found:
        cross = "EncDecAttention" in layer or "encoder_attn" in layer
        keys = layer.split(".")[-2] in ("k", "v", "k_proj", "v_proj")
        first = next((p for p in layer.split(".") if p in ("encoder", "decoder")), "decoder")
        expected = source if first == "encoder" or (cross and keys) else target
        assert found[layer].count == expected, layer


class Paired(nn.Module):
    """An encoder and a decoder whose layers have names that tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=True)
        self.encoder = nn.Linear(4, 4)
        self.reader = nn.Linear(4, 4)
        self.writer = nn.Linear(4, 4)

    def get_encoder(self) -> nn.Module:
        return self.encoder

    def forward(self, inputs, attention_mask, decoder_inputs, decoder_attention_mask):  # noqa: ANN001, ANN202
        return self.reader(self.encoder(inputs)), self.writer(decoder_inputs)


def test_readers_of_the_encoders_output_see_its_mask_whatever_their_name() -> None:
    batch = {
        "inputs": torch.randn(2, 3, 4),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "decoder_inputs": torch.randn(2, 3, 4),
        "decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    }
    found = collect(Paired(), [batch])
    counts = {name: found[f"{name}.weight"].count for name in ("encoder", "reader", "writer")}
    assert counts == {"encoder": 5, "reader": 5, "writer": 3}


@pytest.mark.parametrize("size", [1, 2, 6])
def test_batching_changes_nothing(size: int) -> None:
    model, data = bert(), examples("bert")
    one = collect(model, batched(data, 3), output_gradients=True, fisher=True)
    other = collect(model, batched(data, size), output_gradients=True, fisher=True)
    assert one.provenance["data"] == other.provenance["data"]
    assert_same(one, other)


def test_layers_with_the_same_input_are_stored_once() -> None:
    found = collect(llama(), batched(examples("llama"), 3))
    layers = found.provenance["layers"]
    q = "model.layers.0.self_attn.q_proj.weight"
    for name in ("self_attn.k_proj", "self_attn.v_proj"):
        assert layers[f"model.layers.0.{name}.weight"]["inputs"] == q
        assert f"model.layers.0.{name}.weight/gram" not in found.tensors
    gate = "model.layers.1.mlp.gate_proj.weight"
    assert layers["model.layers.1.mlp.up_proj.weight"]["inputs"] == gate
    assert layers["model.layers.0.self_attn.o_proj.weight"]["inputs"] not in (q, gate)

    apart = collect(llama(), batched(examples("llama"), 3), share_inputs=False)
    assert all(layer["inputs"] == name for name, layer in apart.provenance["layers"].items())
    assert_same(found, apart)


def test_cross_attention_of_all_layers_shares_the_encoders_output() -> None:
    layers = collect(t5(), [padded(examples("t5"))]).provenance["layers"]
    owners = {
        layer["inputs"]
        for name, layer in layers.items()
        if ".EncDecAttention.k." in name or ".EncDecAttention.v." in name
    }
    assert owners == {"decoder.block.0.layer.1.EncDecAttention.k.weight"}


class Fickle(nn.Module):
    """Two layers that share their input only while it is small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x if float(x.max()) < 10 else x.clone()
        return self.a(x) + self.b(other)


def test_sharing_that_ends_is_refused_and_can_be_switched_off() -> None:
    batches = [torch.ones(2, 3), torch.full((2, 3), 20.0)]
    with pytest.raises(StatisticsError, match="share_inputs=False"):
        collect(Fickle(), batches)
    found = collect(Fickle(), batches, share_inputs=False)
    assert torch.equal(found["a.weight"].dense_gram(), found["b.weight"].dense_gram())


class Aliased(nn.Module):
    """Layers whose inputs lie at one address, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        first = self.a(x)
        x.mul_(2)
        return first + self.b(x)


def test_an_input_changed_in_place_is_not_taken_for_shared() -> None:
    found = collect(Aliased(), [torch.ones(2, 3)])
    assert_near(found["b.weight"].dense_gram(), torch.full((3, 3), 8.0).double())
    assert_near(found["a.weight"].dense_gram(), torch.full((3, 3), 2.0).double())


def test_nan_in_activations_names_layer_and_batch() -> None:
    model, batches = bert(), batched(examples("bert"), 2)
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 39] = 6
    batches[1]["input_ids"][0, 0] = 39
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[39] = float("nan")
    with pytest.raises(NumericalError, match=r"layer\.0\.attention\.self\.query.*batch 1"):
        collect(model, batches)


def test_nan_in_padding_does_no_harm() -> None:
    x = torch.randn(2, 3, 4)
    keep = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    poisoned = x.masked_fill(~keep.unsqueeze(-1), float("nan"))
    clean, found = (
        collect(nn.Sequential(nn.Linear(4, 2)), [batch], token_mask=lambda _: keep)
        for batch in (x, poisoned)
    )
    assert_same(clean, found, 0)


class Mixture(nn.Module):
    """Tokens go to one of two experts; the second is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        flat = inputs.reshape(-1, 4)
        return self.experts[0](flat[: len(flat) // 2])


def test_a_layer_without_tokens_is_listed_with_count_zero() -> None:
    batch = {"inputs": torch.ones(2, 3, 4), "attention_mask": torch.ones(2, 3)}
    found = collect(Mixture(), [batch], unmatched="all")
    assert found.provenance["unseen"] == ["experts.1.weight"]
    assert found["experts.1.weight"].count == 0
    assert found["experts.1.weight"].dense_gram() is None
    assert found["experts.0.weight"].count == 3
    assert found["experts.0.weight"].pooled_gram is None


def test_a_quantised_layer_and_an_attention_of_its_own_are_listed() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            return x

    model = nn.Sequential(Own(4, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = nn.Parameter(model[2].weight.detach().char(), requires_grad=False)
    model[2].forward = lambda x: x
    found = collect(model, [torch.ones(2, 3, 4)])
    assert list(found) == ["1.weight"]
    assert "int8" in found.provenance["skipped"]["2.weight"]
    assert "forward of its own" in found.provenance["skipped"]["0.out_proj.weight"]


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_packed_experts_that_cannot_be_observed_are_listed(name: str) -> None:
    model = seeded(name)
    found = collect(model, [{"input_ids": torch.tensor([[4, 5, 6]])}])
    weights = {n for n, p in model.named_parameters() if p.ndim > 1 and min(p.shape) > 1}
    skipped = found.provenance["skipped"]
    assert weights <= set(found.names) | set(skipped) | {"model.embed_tokens.weight"}
    experts = "model.layers.0.mlp.experts.down_proj"
    assert "no linear layer" in skipped[experts] and "Experts" in skipped[experts]
    assert not any("embed" in n or "norm" in n for n in skipped)
    few = collect(model, [{"input_ids": torch.tensor([[4, 5, 6]])}], layers=["*q_proj*"])
    assert few.provenance["skipped"] == {}


def test_learned_tables_are_no_layers_that_were_left_out() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position_embeddings = nn.Parameter(torch.zeros(1, 3, 4))
            self.positional_embedding = nn.Parameter(torch.zeros(3, 4))
            self.proj = nn.Parameter(torch.ones(4, 2))
            self.layer, self.kernel = nn.Linear(4, 4), nn.Conv1d(4, 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x + self.position_embeddings) @ self.proj

    found = collect(Tower(), [torch.ones(2, 3, 4)])
    assert found.provenance["skipped"] == {"proj": "no linear layer: Tower multiplies by it itself"}


def test_inputs_that_fit_no_mask_are_refused_or_skipped() -> None:
    batch = {"inputs": torch.ones(2, 3, 4), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(StatisticsError, match=r"experts\.0\.weight.*\[3, 4\].*mask \[2, 3\]"):
        collect(Mixture(), [batch])
    found = collect(Mixture(), [batch], unmatched="skip")
    assert found.provenance["skipped"] == {"experts.0.weight": "its inputs fit no mask"}
    assert "experts.0.weight" not in found


def test_a_mask_of_the_callers_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 3, 4)
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = collect(model, [x], token_mask=lambda batch: keep)
    rows = x[keep.bool()].double()
    assert found["0.weight"].count == 3
    assert_near(found["0.weight"].dense_gram(), rows.T @ rows)
    assert found.provenance["mask_policy"] == {"tokens": "caller"}


def test_sequence_first_inputs_are_pooled_per_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(5, 2, 4)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = collect(model, [(x.transpose(0, 1).transpose(0, 1),)], token_mask=lambda _: None)
    assert found["0.weight"].sample_count == 5  # nothing says that the first axis is not samples

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.transpose(0, 1))

    found = collect(Turned(), [x.transpose(0, 1)], token_mask=lambda _: keep)
    means = torch.stack([x[:3, 0].mean(0), x[:, 1].mean(0)]).double()
    assert_near(found["inner.0.weight"].pooled_gram, means.T @ means)
    assert found["inner.0.weight"].count == 8


def test_images_beside_text_have_no_mask() -> None:
    model = nn.ModuleDict({"vision": nn.Linear(4, 4), "text": nn.Linear(4, 4)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = model

        def forward(self, input_ids, attention_mask, patches):  # noqa: ANN001, ANN202
            return self.towers["text"](input_ids), self.towers["vision"](patches)

    batch = {
        "input_ids": torch.randn(2, 3, 4),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "patches": torch.randn(2, 3, 4),
    }
    found = collect(Both(), [batch])
    assert found["towers.vision.weight"].count == 6
    assert found["towers.text.weight"].count == 3


@pytest.mark.parametrize("layers_per_pass", [1, 3])
def test_several_passes_give_the_same(layers_per_pass: int) -> None:
    model, batches = bert(), batched(examples("bert"), 2)
    arguments = {"output_gradients": True, "fisher": True}
    whole = collect(model, batches, **arguments)
    parts = collect(model, batches, layers_per_pass=layers_per_pass, **arguments)
    assert whole.provenance == parts.provenance
    assert_same(whole, parts)


def test_memory_splits_passes_and_refuses_what_cannot_fit() -> None:
    model, batches = bert(), batched(examples("bert"), 2)
    seen: list[tuple[int, int | None]] = []
    need = 2 * 8 * 32**2  # of the widest layer, twice: a sum and what is added to it
    collect(model, batches, memory_bytes=float(need), progress=lambda *state: seen.append(state))
    assert seen[-1][0] == seen[-1][1] and seen[-1][0] > len(batches)
    with pytest.raises(RequestError, match=r"output\.dense\.weight.*bytes"):
        collect(model, batches, memory_bytes=need - 1)
    with pytest.raises(RequestError, match="only once"):
        collect(model, iter(batches), memory_bytes=need)


def test_an_iterator_is_enough_for_one_pass() -> None:
    model, batches = bert(), batched(examples("bert"), 2)
    assert_same(collect(model, iter(batches)), collect(model, batches), 0)


def test_shuffled_batches_are_noticed_on_the_second_pass() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.reads = 0

        def __iter__(self):  # noqa: ANN204
            self.reads += 1
            data = examples("bert")
            return iter(batched(data if self.reads < 3 else data[::-1], 2))

    with pytest.raises(StatisticsError, match="do not shuffle"):
        collect(bert(), Shuffled(), layers_per_pass=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"labels": "mine"}, "labels must be one of data, sample"),
        ({"grams": False}, "nothing is asked for"),
        ({"layers": ["nothing.*"]}, "no layer matches"),
        ({"layers": "nothing.*"}, "no layer matches"),  # not each of its characters
        ({"layers": 5}, "layers must be a list of strings; got 5"),
        ({"memory_bytes": "4GB"}, "memory_bytes must be a number; got '4GB'"),
        ({"seed": None, "block_limit": None}, "seed must be a whole.*None\n.*block_limit must be"),
        ({"max_examples": 1.5, "seed": "x"}, "max_examples must be a whole.*\n.*seed must be"),
        ({"layers_per_pass": 0}, "layers_per_pass must be at least 1"),
        ({"layers": ["nothing.*"], "grams": False, "fisher": True}, "no layer matches"),
        (
            {"grams": False, "output_gradients": True, "output_gradient_limit": 2},
            r"nothing to collect.*\n  - bert.*16 > 2 outputs",
        ),
    ],
)
def test_requests_that_make_no_sense(arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        collect(bert(), batched(examples("bert"), 2), **arguments)


@pytest.mark.parametrize(
    ("shape", "token", "message"),
    [
        ((2, 5), 10**6, "the token 1000000, and the model's table ends at"),
        ((2, 5), -100, "input_ids hold the token -100, and the model's table begins at 0"),
        ((2, 900), 1, "900 tok"),
    ],
)
def test_inputs_that_no_model_of_this_size_takes(shape: tuple, token: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        collect(bert(), [{"input_ids": torch.full(shape, token)}])


@pytest.mark.parametrize("data", ["rows.jsonl", Path("rows.jsonl")])
def test_rows_of_files_are_for_the_command(data: str | Path) -> None:
    with pytest.raises(
        RequestError, match="takes batches of tensors; got 'rows.jsonl'.\\n.*--data FILE"
    ):
        collect(bert(), data)


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.zeros(0, 3).long()}]])
def test_no_data_is_an_error(batches: list) -> None:
    with pytest.raises(RequestError, match="there is no data"):
        collect(bert(), batches)


def test_max_examples_cuts_within_a_batch() -> None:
    model, data = bert(), examples("bert")
    assert_same(
        collect(model, batched(data, 4), max_examples=5), collect(model, batched(data[:5], 5))
    )


def test_half_precision_models_are_summed_in_float32() -> None:
    model = bert().to(torch.bfloat16)
    found = collect(model, batched(examples("bert"), 3), dtype=torch.float64)
    gram = found["bert.encoder.layer.0.intermediate.dense.weight"].gram
    assert gram is not None and gram.dtype == torch.float64
    assert torch.linalg.eigvalsh(gram).min() > -1e-6 * gram.diagonal().sum()


def test_convolutions_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2), nn.ReLU(True))
    x = torch.randn(4, 3, 9, 8)
    with pytest.raises(RequestError, match="no linear layer"):
        collect(model, [x])
    layer = collect(model, [x[:1], x[1:]], convolutions=True)["0.weight"]
    rows = nn.functional.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2)
    outputs = rows @ model[0].weight.flatten(1).T + model[0].bias
    assert torch.allclose(
        outputs.transpose(1, 2).reshape(4, 5, -1), model[0](x).flatten(2), atol=1e-5
    )
    flat = rows.reshape(-1, 27).double()
    assert layer.count == len(flat)
    assert layer.sample_count == 4
    assert_near(layer.dense_gram(), flat.T @ flat)


def test_one_dimensional_convolutions_and_those_that_are_left_out() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding="same", padding_mode="reflect"))
    x = torch.randn(2, 3, 6)
    layer = collect(model, [x], convolutions=True)["0.weight"]
    rows = nn.functional.pad(x, (1, 1), mode="reflect").unfold(2, 3, 1)  # [2, 3, 6, 3]
    flat = rows.permute(0, 2, 1, 3).reshape(-1, 9).double()
    assert_near(layer.dense_gram(), flat.T @ flat)
    deep = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Flatten(), nn.Linear(16, 2))
    found = collect(deep, [torch.randn(2, 2, 2, 2, 2)], convolutions=True)
    assert "Conv3d" in found.provenance["skipped"]["0.weight"]


def transposed_cases() -> list[tuple[nn.Module, Tensor]]:
    plane = nn.ConvTranspose2d(3, 5, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1))
    return [
        (plane, torch.randn(4, 3, 4, 5)),
        (nn.ConvTranspose1d(3, 4, 5, 2, 1, 1), torch.randn(2, 3, 6)),
    ]


@pytest.mark.parametrize("case", [0, 1])
def test_transposed_convolutions_see_positions_and_make_patches(case: int) -> None:
    """A patch's output gradient times its position's input, summed, is the kernel's gradient."""
    layer, x = transposed_cases()[case]
    model = nn.Sequential(layer)
    found = collect(model, [x[:1], x[1:]], convolutions=True)["0.weight"]
    rows = x.flatten(2).transpose(1, 2).reshape(-1, 3).double()
    assert (found.count, found.sample_count) == (len(rows), len(x))
    assert_near(found.dense_gram(), rows.T @ rows)
    (site,) = find_sites(model, convolutions=True, every_kind=True).found
    assert site.shape == (layer.weight[0].numel(), 3)
    outputs = layer(x)
    gradient = torch.randn_like(outputs)
    (of_kernel,) = torch.autograd.grad(outputs, layer.weight, gradient)
    patches = output_rows(site, gradient).reshape(-1, site.shape[0])
    ours = as_matrix(site, x).reshape(-1, 3).T @ patches
    assert torch.allclose(ours.view_as(of_kernel), of_kernel, rtol=1e-4, atol=1e-4)


def test_groups_of_transposed_convolutions_have_grams_of_their_own(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2)), torch.randn(2, 6, 5)
    file = tmp_path / "x.safetensors"
    collect(model, [x], file, convolutions=True)
    layer = load_statistics(file)["0.weight"]
    rows = x.transpose(1, 2).reshape(10, 2, 3).double()
    assert layer.gram is not None and layer.count == 10
    assert_near(layer.gram, torch.einsum("ngc,ngd->gcd", rows, rows))


def test_transposed_convolutions_of_the_same_inputs_share_a_gram() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.wide = nn.ConvTranspose1d(4, 2, 2, 2), nn.ConvTranspose1d(4, 3, 4, 4)
            self.line = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).sum() + self.wide(x).sum() + self.line(x).sum()

    x = torch.randn(2, 4, 4)
    found = collect(Pyramid(), [x], convolutions=True, unmatched="all")
    layers = found.provenance["layers"]
    assert [layers[f"{n}.weight"]["inputs"] for n in ("up", "wide", "line")] == [
        "up.weight",
        "up.weight",
        "line.weight",
    ]
    rows = x.double()
    assert_near(found["wide.weight"].dense_gram(), torch.einsum("bcp,bdp->cd", rows, rows))
    assert_near(found["line.weight"].dense_gram(), torch.einsum("bpc,bpd->cd", rows, rows))


def test_examples_without_a_token_are_refused(tmp_path: Path) -> None:
    batch = padded(examples("llama"))
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(StatisticsError, match="no token of the"):
        collect(llama(), [batch], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
