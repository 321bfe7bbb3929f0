"""What is told of adapters that cannot be merged: what each is, and the step that helps.

Recognition goes by the keys of a file, or by an adapter's configuration.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.checkpoint.odd_files import Oddity, command, python
from eutectic.checkpoint.peft_kinds.kinds import KINDS

# --- By a file's keys ---


def by_keys(path: Path, kind: str) -> Oddity:
    """Return what is said of a file whose keys are of `kind`; see `conventions.adapter_keys`."""
    if kind == "kohya":
        words = ("--sd_model", "BASE.safetensors", "--models", path, "--ratios", "1.0")
        merge = command("python", "networks/merge_lora.py", *words, "--save_to", "out.safetensors")
        return Oddity(
            "a LoRA of Kohya's sd-scripts, not a full checkpoint",
            f"Merge it into its base with sd-scripts, and name the result: {merge}",
        )
    if kind == "diffusers":
        return Oddity(
            "a LoRA of diffusers, not a full checkpoint",
            f"Merge it into its base with diffusers: pipe.load_lora_weights({str(path)!r}); "
            "pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained('out/'), and name "
            "the model in out/.",
        )
    if kind == "mlx":
        return mlx_adapter(path.parent)
    return Oddity(
        "factors of a LoRA, not a full checkpoint",
        "As an adapter it needs PEFT's names: adapter_model.safetensors, and beside it "
        "adapter_config.json, which says how strongly the factors act.",
    )


# --- By an adapter's configuration ---

ADAPTER_HUB = Oddity(
    "an adapter of the library 'adapters' (AdapterHub), whose layers stand beside the base's",
    "Where it is a LoRA, merge it there: model.merge_adapter(name), then "
    "model.save_pretrained('out/').",
)
# Kinds of PEFT that change what a model is given, or route, so that there is no merged weight.
_PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
)
_WITHOUT_WEIGHT = {
    **dict.fromkeys(_PROMPTS, "it puts trained vectors before the input and changes no weight"),
    "ADAPTION_PROMPT": "it adds gated prompts inside of attention and changes no weight",
    "XLORA": "it chooses among adapters for every token and has no merged weight",
    "POLY": "it mixes adapters by task and has no merged weight",
}
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def mlx_adapter(folder: Path) -> Oddity:
    """Return what is said of an adapter that mlx-lm trained."""
    words = ("--model", "BASE", "--adapter-path", folder, "--save-path", "fused/")
    return Oddity(
        "a LoRA of MLX, not of PEFT",
        f"Merge it into its base, and name the result: {command('mlx_lm.fuse', *words)}",
    )


def other_adapter(folder: Path, config: Mapping[str, Any]) -> Oddity | None:
    """Return what an adapter is, by its configuration, that cannot be merged; None for others."""
    kind = config.get("peft_type")
    if isinstance(kind, str) and (kind == "LORA" or kind in KINDS):
        return None
    if kind is None:
        if config.keys() & {"lora_parameters", "fine_tune_type", "lora_layers"}:
            return mlx_adapter(folder)
        if isinstance(config.get("config"), Mapping) or config.keys() & {"model_class"}:
            return ADAPTER_HUB
        return Oddity(
            "an adapter that names no kind ('peft_type' is missing in adapter_config.json)",
            "Save it again with PEFT's save_pretrained, or restore the configuration.",
        )
    if why := _WITHOUT_WEIGHT.get(str(kind)):
        return Oddity(
            f"an adapter of the kind '{kind}' cannot be merged: {why}",
            "Keep it beside the model and load it with peft; only fine-tuned weights merge.",
        )
    kinds = ", ".join(sorted({"LORA", *KINDS}))
    what = f"an adapter of the kind {kind!r} cannot be merged as it is; {kinds} can"
    if kind == "IA3":
        what = "an (IA)³ adapter merges with other (IA)³ adapters only, as vectors"
    return Oddity(
        what, f"Merge it into its base first, and name the result: {fold(folder, config)}"
    )


def fold(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the command by which peft merges an adapter into its base."""
    auto = _AUTO_CLASSES.get(str(config.get("task_type")), "AutoPeftModel")
    call = (
        f"from peft import {auto} as M; M.from_pretrained({str(folder)!r})"
        ".merge_and_unload().save_pretrained('merged/')"
    )
    return python(call)
