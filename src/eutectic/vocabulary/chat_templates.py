"""Chat templates: those of models, known ones by name, and texts in Jinja."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from eutectic.errors import CheckpointError, Fault, suggest
from eutectic.storage.small_files import read_json, read_text
from eutectic.vocabulary.tokens import CONFIG

FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"  # of processors, before they had a Jinja file
AUTO = "auto"

_PROMPT = "{% if add_generation_prompt %}"
# Written from the formats' public descriptions; {{ bos_token }} where the model's training had one.
BUILT_IN: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}" + _PROMPT + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        + _PROMPT
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set system = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set system.text = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + system.text + message['content'] + ' [/INST]' }}"
        "{% set system.text = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ message['content'] + '\\n\\n' }}{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% else %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% endif %}{% endfor %}" + _PROMPT + "{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
        + _PROMPT
        + "{{ '[|assistant|]' }}{% endif %}"
    ),
}


def is_template(text: str) -> bool:
    """Tell whether a text is a template, or the name of a known one; else it may be a folder."""
    return text in BUILT_IN or "{" in text


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model's folder, None where it has none.

    The file of its own wins over the tokenizer's configuration, as in transformers; of several
    templates the one called `default` counts.
    """
    own = folder / FILE
    if own.is_file():
        try:
            return read_text(own)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{own}: cannot be read ({error}).") from error
    for name in (CONFIG, PROCESSOR_FILE):
        if (folder / name).is_file():
            values: dict[str, Any] = read_json(folder / name, CheckpointError)
            found = _default(values.get("chat_template"))
            if found:
                return found
    return None


def _default(value: object) -> str | None:
    if isinstance(value, list):
        pairs = [cast("Mapping[str, Any]", v) for v in value if isinstance(v, Mapping)]
        value = {pair.get("name"): pair.get("template") for pair in pairs}
    if isinstance(value, Mapping):
        value = cast("Mapping[str, object]", value).get("default")
    return value if isinstance(value, str) and value.strip() else None


def most_common(templates: Mapping[str, str | None]) -> tuple[str, list[str]] | None:
    """Return the template that most models have, and which; of equally many, the first one's.

    `templates` are those of the base and the experts in order. Surrounding space does not count.
    """
    having = {name: text for name, text in templates.items() if text}
    counts = Counter(text.strip() for text in having.values())
    if not counts:
        return None
    chosen = counts.most_common(1)[0][0]  # ties in the order in which they came
    owners = [name for name, text in having.items() if text.strip() == chosen]
    return having[owners[0]], owners


def template_fault(asked: str, line: int = 0) -> Fault | None:
    """Return what is wrong with a `chat_template` that is no `auto` and no name of a known one."""
    if asked == AUTO or asked in BUILT_IN:
        return None
    where = "chat_template"
    if "{" not in asked:
        allowed = ", ".join((AUTO, *BUILT_IN))
        what = f"'{asked[:60]}' is no known template, and no Jinja text."
        nearest = suggest(asked, [AUTO, *BUILT_IN])
        return Fault("unknown_template", what, where, line, allowed=allowed, next=nearest)
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:  # nobody renders it here
        return None
    try:
        # `{% generation %}` is transformers' own, and means nothing to the syntax around it.
        text = asked.replace("generation %}", "if true %}").replace("endgeneration", "endif")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
            text.replace("endif true %}", "endif %}")
        )
    except TemplateSyntaxError as error:
        what = f"no valid Jinja: {error.message} (line {error.lineno} of the template)."
        return Fault("template_syntax", what, where, line)
    return None
