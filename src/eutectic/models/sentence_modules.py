"""What makes one vector of a text's token states, as `modules.json` of sentence-transformers says.

Pooling, and maps behind it (`Dense`), hang on the bare model under the names of their folders: then
their parameters are called as a merge calls them. Lengths play no part in cosines, so `Normalize`
is nothing here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from eutectic.checkpoint.module_folders import MODULES_NAME, module_folders
from eutectic.checkpoint.names import check_inside
from eutectic.errors import CheckpointError, RequestError
from eutectic.models.batches import token_means
from eutectic.models.linear_head import Pooling, features
from eutectic.storage.small_files import read_json

SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
POOLING_FOLDER = "1_Pooling"  # where sentence-transformers writes it
_SILENT = ("Transformer", "Normalize", "Dropout")  # read elsewhere, or without a part in cosines
_MODES = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken", "pooler")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


class PooledStates(nn.Module):
    """Token states `[n, tokens, hidden]` to vectors: one mode, or several side by side."""

    def __init__(self, modes: Sequence[str]) -> None:
        """Take names of `_MODES`."""
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, outputs: Any, mask: Tensor) -> Tensor:
        """Return `[n, hidden × modes]`, float32."""
        return torch.cat([_pooled(outputs, mask, mode) for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A linear map of vectors with its activation."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        """Take `weight` [out, in], `bias` [out] and a name of `_ACTIVATIONS`."""
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if bias is not None:
                self.linear.bias.copy_(bias)
        self.activation = getattr(nn, activation)()

    def forward(self, vectors: Tensor) -> Tensor:
        """Return `[n, out]`."""
        if vectors.shape[-1] != self.linear.in_features:
            raise RequestError(
                f"a Dense module takes {self.linear.in_features} features, the pooling gives "
                f"{vectors.shape[-1]}.\nLeave `pooling` out: the checkpoint says which it is."
            )
        return self.activation(self.linear(vectors))


@dataclass(frozen=True)
class SentenceSettings:
    """What a checkpoint says of the texts that it embeds."""

    max_length: int | None = None  # tokens; None: what the model takes
    query_prompt: str = ""  # goes before every query
    document_prompt: str = ""
    prompt: str = ""  # goes before texts that are neither


def hang_on(
    model: nn.Module,
    folders: Sequence[Path],
    state: Mapping[str, Tensor],
    pooling: Pooling | None = None,
) -> nn.Module:
    """Hang the modules of the first folder that names any on a bare model, and return it.

    `state` holds the tensors of the checkpoint by file keys, those of `Dense` modules too. Without
    a `modules.json` the pooling is the mean; `pooling` replaces what the checkpoint says.

    Raises:
        CheckpointError: a module of another class, or a `Dense` without its tensors.
    """
    home = next((f for f in folders if (f / MODULES_NAME).is_file()), None)
    stated = dict(_modules(home)) if home is not None else {}
    hung = False
    for place, kind in stated.items():
        if kind == "Pooling":
            modes = _modes(home, place) if pooling is None else (pooling,)
            model.add_module(place, PooledStates(modes))
            hung = True
        elif kind == "Dense":
            model.add_module(place, _dense(home, place, state))
    if not hung:
        children = dict(model.named_children())
        later = [place for place, kind in stated.items() if kind == "Dense"]
        for place in later:  # the order of children is that of computation
            delattr(model, place)
        model.add_module(POOLING_FOLDER, PooledStates((pooling or "mean",)))
        for place in later:
            model.add_module(place, children[place])
    return model


def sentence_vectors(model: nn.Module, outputs: Any, mask: Tensor) -> Tensor:
    """Return the vectors `[n, width]` of what a model with hung modules returned on a batch."""
    vectors = torch.empty(0)
    for module in model.children():
        if isinstance(module, PooledStates):
            vectors = module(outputs, mask)
        elif isinstance(module, Dense):
            vectors = module(vectors)
    return vectors.float()


def sentence_settings(folders: Sequence[Path]) -> SentenceSettings:
    """Return what the first folder with files of such settings says of lengths and prompts.

    Queries and documents take the prompts of those names, as `encode_query` and `encode_document`
    of sentence-transformers do; other texts the default one.
    """
    home = next((f for f in folders if any((f / name).is_file() for name in SETTINGS)), None)
    if home is None:
        return SentenceSettings()
    lengths, stated = (
        read_json(check_inside(home, name), CheckpointError) if (home / name).is_file() else {}
        for name in SETTINGS
    )
    if lengths.get("do_lower_case"):
        raise CheckpointError(
            f"{home / SETTINGS[0]}: asks for texts in lower case (do_lower_case), which is not "
            "done here.\nWrite the texts so, and set it to false."
        )
    longest = lengths.get("max_seq_length")
    prompts = stated.get("prompts")
    known = {k: v for k, v in prompts.items() if isinstance(v, str)} if prompts else {}
    usual = known.get(str(stated.get("default_prompt_name")), "")
    documents = ("document", "passage", "corpus")
    return SentenceSettings(
        longest if isinstance(longest, int) and longest > 0 else None,
        known.get("query", usual),
        next((known[name] for name in documents if name in known), usual),
        usual,
    )


def is_sentence_model(folder: Path) -> bool:
    """Tell whether a folder's `modules.json` names a pooling: it embeds texts."""
    try:
        return any(kind == "Pooling" for _, kind in _modules(folder))
    except CheckpointError:
        return False


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (folder, class) of the modules behind the first; others than are known are refused."""
    if not (folder / MODULES_NAME).is_file():
        return
    module_folders(folder)  # checks the folders
    listed: Any = read_json(check_inside(folder, MODULES_NAME), CheckpointError, kind=list)
    for number, own in enumerate(listed):
        place, kind = str(own.get("path", "")), str(own.get("type", "")).rpartition(".")[2]
        if kind in _SILENT:
            continue
        if kind not in ("Pooling", "Dense") or number == 0 or "/" in place or not place:
            raise CheckpointError(
                f"{folder / MODULES_NAME}: the module {place or number} is a {kind}, which is not "
                "run here.\nRun are Transformer, Pooling, Dense, Normalize and Dropout. Merging "
                "takes all; measure such a model by a task of the kind 'function'."
            )
        yield place, kind


def _module_config(folder: Path | None, place: str) -> dict[str, Any]:
    assert folder is not None
    name = f"{place}/config.json"
    if not (folder / name).is_file():
        return {}
    return read_json(check_inside(folder, name), CheckpointError)


def _modes(folder: Path | None, place: str) -> tuple[str, ...]:
    config = _module_config(folder, place)
    stated = config.get("pooling_mode")  # versions from 6 on write one name
    told = [stated] if isinstance(stated, str) else list(stated or ())
    told += [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    unknown = [mode for mode in told if mode not in _MODES]
    if unknown:
        raise CheckpointError(
            f"{folder}/{place}/config.json: the pooling '{unknown[0]}' is none of "
            f"{', '.join(_MODES)}.\nName another in the task: pooling: mean."
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(
            f"{folder}/{place}/config.json: leaves prompts out of the pooling (include_prompt), "
            "which is not done here.\nMeasure it by a task of the kind 'function'."
        )
    # Side by side they stand in the order of sentence-transformers.
    return tuple(sorted(told, key=_MODES.index)) or ("mean",)


def _dense(folder: Path | None, place: str, state: Mapping[str, Tensor]) -> Dense:
    config = _module_config(folder, place)
    weight, bias = (state.get(f"{place}.linear.{part}") for part in ("weight", "bias"))
    if weight is None or weight.ndim != 2:
        raise CheckpointError(
            f"{folder}: the module {place} (Dense) has no weight {place}.linear.weight.\n"
            "Copy its folder there from the model that this one was made from."
        )
    activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{folder}/{place}/config.json: the activation {activation} is none of "
            f"{', '.join(_ACTIVATIONS)}.\nMeasure such a model by a task of the kind 'function'."
        )
    return Dense(weight, bias, activation)


def _pooled(outputs: Any, mask: Tensor, mode: str) -> Tensor:
    if mode in get_args(Pooling):
        return features(outputs, mask, mode).float()  # pyright: ignore[reportArgumentType]
    states: Tensor = outputs.last_hidden_state.float()
    if mode == "max":
        return states.masked_fill(mask.unsqueeze(-1) == 0, -1e9).amax(1)
    if mode == "lasttoken":
        last = (mask.sum(1) - 1).clamp_min(0)
        return states[torch.arange(len(states), device=states.device), last]
    if mode == "mean_sqrt_len":
        return token_means(states, mask.bool()) * mask.sum(1, keepdim=True).float().sqrt()
    places = torch.arange(1, states.shape[1] + 1, device=states.device) * mask  # weightedmean
    return (states * places.unsqueeze(-1)).sum(1) / places.sum(1, keepdim=True).clamp_min(1)
