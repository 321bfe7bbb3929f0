"""The card of a routed model's folder: what is in it, how well it routes, how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import nn

from eutectic.models.sites import routable_sites
from eutectic.routed.forward_pass import Routing
from eutectic.routed.heads import heads_of
from eutectic.routed.routed_folder import experts_of
from eutectic.routed.routed_layers import layer_kinds
from eutectic.routed.routed_modules import Experts
from eutectic.routed.routing_modes import routing_of
from eutectic.versions import version
from eutectic.words import as_markdown, counted, plain

CARD = "README.md"

_CODE = """import eutectic
{imports}
routed = eutectic.load_routed("PATH-OF-THIS-FOLDER")
{use}
with eutectic.routing(routed, mode="oracle", expert={expert}):  # you name the expert
    {again}
with eutectic.routing(routed, mode="vote"):  # one decision for the whole network
    {again}
"""
_GENERATE = """tokenizer = AutoTokenizer.from_pretrained("PATH-OF-THIS-FOLDER")
prompt = tokenizer("…", return_tensors="pt")
print(tokenizer.decode(routed.generate(**prompt, max_new_tokens=64)[0]))  # routed on the prompt
"""
_PREDICT = """for answer in eutectic.routed.predict(routed, batch):  # the chosen expert's head
    print(answer.expert, answer.label)
"""


def routed_card(routed: nn.Module, licence: str | None = None) -> str:
    """Return the card of a routed model as Markdown, with the merged model's licence if known."""
    handle, held = routing_of(routed), experts_of(routed)
    heads = tuple(getattr(heads_of(routed), "stored", {}))
    stated = {"license": licence} if licence else {}
    front = yaml.safe_dump({"tags": ["merge", "routed", "eutectic"], **stated}, sort_keys=False)
    ranks = sorted({experts.up.shape[2] for experts in held.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    parts = [
        f"---\n{front}---\n\n# Routed model\n\nA merged {as_markdown(type(routed).__name__)}, and "
        f"{counted(len(handle.experts), 'expert')} of {rank} beside "
        f"{counted(len(held), 'layer')}. A router ({handle.router}) picks one for every sample. "
        f"Made with eutectic {version('eutectic')}.\n",
        _experts(handle, heads),
        f"## Use\n\n```python\n{_code(routed, handle, heads)}```\n\nLoaded by transformers alone, "
        "this folder is the merged model, without experts.\n",
        _layers(routed, held),
    ]
    return "\n".join(parts)


def _code(routed: nn.Module, handle: Routing, heads: Sequence[str]) -> str:
    expert = json.dumps(_in_code(handle.experts[0]), ensure_ascii=False)
    if type(routed).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        call = "routed.generate(**prompt, max_new_tokens=64)"
        imports = "from transformers import AutoTokenizer\n"
        return _CODE.format(imports=imports, use=_GENERATE, expert=expert, again=call)
    use = _PREDICT if heads else "routed(**batch)\n"
    return _CODE.format(imports="", use=use, expert=expert, again="routed(**batch)")


def _in_code(text: str) -> str:
    """Return a name as it may stand in code: on one line, and without the end of the code."""
    return plain(text, kept="").replace("`", "'")


def _experts(handle: Routing, heads: Sequence[str]) -> str:
    quality: Mapping[str, Any] = handle.quality or {}
    known = quality.get("decisions", {})
    head = "| expert | own head |" + (" sent to it of its own samples |" if known else "")
    lines = [head, "|---|---|" + ("---|" if known else "")]
    for name in handle.experts:
        share = f" {known[name]:.1%} |" if name in known else " – |" if known else ""
        lines.append(f"| {as_markdown(name)} | {'yes' if name in heads else 'no'} |{share}")
    text = "\n".join(lines) + "\n"
    if known:
        how = "measured on its own data" if quality["measured"] else "estimated from its statistics"
        text += f"\nThe router's shares are {how}; by chance {quality['chance']:.1%}.\n"
    return text


def _layers(routed: nn.Module, held: Mapping[str, Experts]) -> str:
    def listed(names: Sequence[str]) -> str:
        return "".join(
            f"- `{_in_code(kind)}`" + (f" ({count})" if count > 1 else "") + "\n"
            for kind, count in layer_kinds(names).items()
        )

    others = [site.name for site in routable_sites(routed)]
    text = f"## Layers\n\nRouted:\n\n{listed([experts.name for experts in held.values()])}"
    if others:
        text += (
            f"\nMerged only, whichever expert is chosen, as all other tensors:\n\n{listed(others)}"
        )
    return text
