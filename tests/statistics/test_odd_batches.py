"""Batches and data of forms that once were counted wrongly.

Guards: padding on either side gives the statistics of the examples alone; the towers of CLIP count
their own samples; decoders of other widths count the encoder's tokens; copies keep their statistics
in sums; pairs and numbered classes are not guessed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eutectic.data.columns import ClassLabels, Columns
from eutectic.data.encoded_rows import EncodedRows
from eutectic.errors import RequestError, StatisticsError
from eutectic.models.model_inputs import longest_input
from eutectic.statistics import add_statistics, collect
from helpers.configs import tiny_model


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    assert found is not None and wanted is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


def padded(examples: list[dict[str, Tensor]], left: bool) -> dict[str, Tensor]:
    longest = max(e["input_ids"].shape[1] for e in examples)
    fills = {"input_ids": 5, "attention_mask": 0, "labels": -100}

    def pad(values: Tensor, fill: int) -> Tensor:
        room = longest - values.shape[1]
        return nn.functional.pad(values[0], (room, 0) if left else (0, room), value=fill)

    return {k: torch.stack([pad(e[k], fill) for e in examples]) for k, fill in fills.items()}


@pytest.mark.parametrize("labels", ["data", "sample"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_plays_no_part(left: bool, labels: Any):
    torch.manual_seed(0)
    model = tiny_model("LlamaForCausalLM").eval()
    examples = []
    for length in (7, 3, 5):
        ids = torch.randint(4, 38, (1, length))
        mask = torch.ones_like(ids)
        examples.append({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})
    asked: dict[str, Any] = {"output_gradients": True, "fisher": True, "labels": labels}
    alone = collect(model, examples, **asked)
    together = collect(model, [padded(examples, left)], **asked)
    name = next(n for n in alone if "q_proj" in n)
    close(together[name].output_gradient_gram, alone[name].output_gradient_gram)
    close(together[name].fisher_diagonal, alone[name].fisher_diagonal)


@pytest.mark.parametrize(("images", "texts"), [(4, 2), (3, 5), (2, 10), (4, 4)])
def test_towers_count_their_own_samples(images: int, texts: int):
    torch.manual_seed(0)
    model = tiny_model("CLIPModel").eval()
    path = "vision_model.encoder.layers.0.self_attn.q_proj"
    seen: dict[str, Tensor] = {}
    hook = model.get_submodule(path).register_forward_hook(
        lambda module, given, out: seen.update(x=given[0].detach())
    )
    ids = torch.randint(3, 38, (texts, 7))
    ids[:, -1] = 39
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, 8, 8),
    }  # fmt: skip
    found = collect(model, [batch])[f"{path}.weight"]
    hook.remove()
    pooled = seen["x"].mean(1)
    assert found.sample_count == images
    close(found.pooled_gram.float(), pooled.T @ pooled)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers tells what it once did
@pytest.mark.parametrize("width", [16, 24])
def test_projections_of_the_encoders_states_count_its_tokens(width: int):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip
    decoder = hf.GPT2Config(
        vocab_size=40, n_positions=24, n_embd=width, n_layer=1, n_head=2, is_decoder=True,
        add_cross_attention=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = hf.EncoderDecoderModel(config=config).eval()
    examples, columns = [], ("input_ids", "attention_mask", "labels")
    for source, target in ((7, 2), (3, 7)):
        ids = torch.randint(4, 40, (1, source))
        made = (ids, torch.ones_like(ids), torch.randint(4, 40, (1, target)))
        examples.append(dict(zip(columns, made, strict=True)))
    fills = dict(zip(columns, (0, 0, -100), strict=True))
    batch = {
        name: torch.cat(
            [
                nn.functional.pad(e[name], (0, 7 - e[name].shape[1]), value=fills[name])
                for e in examples
            ]
        )
        for name in columns
    }
    alone, together = collect(model, examples), collect(model, [batch])
    name = next(n for n in alone if "crossattention.c_attn.weight" in n)
    assert alone[name].count == together[name].count == 10
    close(together[name].dense_gram(), alone[name].dense_gram())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(self.e(x))))


def test_sums_keep_what_a_copy_shares():
    torch.manual_seed(0)
    model = Tied()
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    both = add_statistics([collect(model, [x]), collect(model, [y], share_inputs=False)])
    union = collect(model, [torch.cat([x, y])])
    assert {"a.weight", "c.weight"} <= {*both}
    for name in union:
        assert both[name].count == union[name].count
        close(both[name].dense_gram(), union[name].dense_gram())


def rows_of(rows: list[dict[str, Any]], labels: dict[str, int]) -> EncodedRows:
    return EncodedRows(rows, "text-classification", None, Columns(), 2, 8, ClassLabels(labels, 3))


def test_rows_are_pairs_or_single_texts():
    pair = {"text": "a", "text_pair": "b"}
    with pytest.raises(RequestError, match="row 3 has no 'text_pair', row 1 has"):
        rows_of([pair, pair, {"text": "a"}], {})


def test_numbers_are_names_where_classes_are_named_by_numbers():
    stars = ClassLabels({"1": 0, "2": 1, "3": 2}, 3)
    assert [stars.of_row(n, 1) for n in (1, 2, 3)] == [0, 1, 2]
    with pytest.raises(StatisticsError, match="knows no label '0'"):
        stars.of_row(0, 1)
    plain = ClassLabels({"no": 0, "yes": 1}, 3)
    assert [plain.of_row(n, 1) for n in (0, "yes", 2)] == [0, 1, 2]


class OwnEncoder(nn.Module):
    """A module of one's own with a method that transformers' models have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def get_encoder(self) -> nn.Module:
        return self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_models_without_a_configuration():
    x = torch.randn(5, 4)
    close(collect(OwnEncoder(), [x])["layer.weight"].dense_gram().float(), x.T @ x)


@pytest.mark.parametrize(("kind", "longest"), [("roberta", 24), ("bert", 26), ("mpnet", 24)])
def test_positions_that_are_counted_from_the_padding_token(kind: str, longest: int):
    config = SimpleNamespace(model_type=kind, max_position_embeddings=26, pad_token_id=1)
    assert longest_input(SimpleNamespace(model_max_length=10**30), config) == longest
