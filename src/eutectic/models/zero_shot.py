"""Classifiers of pictures whose heads are texts: the class names through CLIP's text tower."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.conventions import image_tower_names
from eutectic.errors import CheckpointError, RequestError
from eutectic.models.linear_head import Head
from eutectic.models.loading import in_words, load_config, transformers_for
from eutectic.models.model_inputs import positions_of
from eutectic.models.task_kinds import MODEL_CLASSES, ZERO_SHOT

PROMPTS = ("a photo of a {}.",)
MOST_PROMPTS = 1000  # the longest published list has a hundred
_TEXTS_AT_ONCE = 256


def has_both_towers(config: Any) -> bool:
    """Tell whether a configuration is of a model with a text tower beside that of pictures."""
    auto = getattr(transformers_for("CLIP models"), MODEL_CLASSES[ZERO_SHOT])
    return type(config) in auto._model_mapping


def is_whole(folder: Path) -> bool:
    """Tell whether a folder's model has both towers."""
    with in_words(folder):
        return has_both_towers(load_config(folder))


def completed(tower: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a whole model's tensors with those of a tower of pictures in place of its own.

    Both by the keys of files. CheckpointError where a tensor of the tower has no place, or the
    whole model's tower has more.
    """
    called = image_tower_names(tower, whole)
    unknown = [n for n in tower if n not in called and n.partition(".")[0] != "classifier"]
    wrong = [n for n, w in called.items() if tower[n].shape != whole[w].shape]
    if unknown or wrong or not called:
        first = [*unknown, *wrong, "no tensor of a tower of pictures"][0]
        raise CheckpointError(
            f"{first}: has no place in the whole model that should complete it.\n"
            "Name with `text_model` the model that this tower of pictures was taken from."
        )
    return {**whole, **{w: tower[n] for n, w in called.items()}}


def embed_pictures(model: Any) -> Any:
    """Let calls of a model with two towers embed pictures alone, or texts alone, and return it.

    `model(pixel_values=…)` and `model(input_ids=…)` give an output whose `pooler_output` is the
    projected embedding `[n, d]`. Hooks, names of parameters and the class stay as they are.
    """

    def forward(
        self: Any,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        if pixel_values is not None:
            return _output(self.get_image_features(pixel_values=pixel_values))
        return _output(self.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    if not hasattr(model, "get_image_features"):
        raise RequestError(f"{type(model).__name__} has no towers of pictures and texts.")
    model.forward = MethodType(forward, model)
    return model


def _output(found: Any) -> Any:
    """Return an output object; before transformers 5 features were tensors."""
    if not isinstance(found, Tensor):
        return found
    outputs = transformers_for("CLIP models").modeling_outputs
    return outputs.BaseModelOutputWithPooling(pooler_output=found)


def class_texts(names: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return the texts of all classes, those of one class together.

    >>> class_texts(["cat", "dog"], ["a {}.", "the {}."])
    ['a cat.', 'the cat.', 'a dog.', 'the dog.']
    """
    return [prompt.replace("{}", name) for name in names for prompt in prompts]


def tokenized(texts: Sequence[str], tokenizer: Any, longest: int | None) -> dict[str, Tensor]:
    """Return the tokens of class texts `[classes · prompts, length]`, cut to `longest`."""
    # SigLIP is trained on texts padded to the full length, and reads the last position.
    padding = "max_length" if "siglip" in type(tokenizer).__name__.lower() else True
    found = tokenizer(
        list(texts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
    )
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


@torch.no_grad()
def class_embeddings(model: nn.Module, texts: Mapping[str, Tensor], classes: int) -> Tensor:
    """Return the head `[classes, d]`: of every class the mean direction of its texts.

    Every text's embedding is scaled to length 1, those of a class are averaged, and the mean is
    scaled to length 1 (arXiv 2103.00020, section 3.1.4).
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    for start in range(0, len(texts["input_ids"]), _TEXTS_AT_ONCE):
        part = {k: v[start : start + _TEXTS_AT_ONCE].to(device) for k, v in texts.items()}
        found.append(nn.functional.normalize(model(**part).pooler_output.float(), dim=-1))
    means = torch.cat(found).unflatten(0, (classes, -1)).mean(1)
    return nn.functional.normalize(means, dim=-1)


def head_in_texts(model: Any, tokenizer: Any, names: Sequence[str], prompts: Sequence[str]) -> Head:
    """Return the same as a linear head on a picture's embedding, with the model's own e^s and b."""
    longest = positions_of(getattr(model.config, "text_config", model.config))
    texts = tokenized(class_texts(names, prompts), tokenizer, longest)
    weight = class_embeddings(model, texts, len(names)).cpu()
    no_bias = torch.zeros(1, weight.shape[1])
    bias = class_logits(model, no_bias, weight)[0]  # what is left where every cosine is zero
    scale = class_logits(model, weight[:1], weight[:1])[0, 0] - bias[0]
    return Head(scale * weight, bias, "pooler", normalize=True)


def class_logits(model: Any, pictures: Tensor, head: Tensor) -> Tensor:
    """Return e^s · cos(picture, class) (+ b) `[n, classes]`, with the model's own s and b."""
    cosines = nn.functional.normalize(pictures.float(), dim=-1) @ head.T
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    if isinstance(scale, Tensor):
        cosines = cosines * scale.detach().float().exp()
    return cosines + bias.detach().float() if isinstance(bias, Tensor) else cosines
