"""What names say of tied tables: which tensors a model shares under several names.

A language model may use one table for the tokens that it reads and those that it writes, and files
keep it under any of its names, or under all. Nothing here knows a file: these are the names that
transformers gives (`_tied_weights_keys`, transformers 5.23), and what it takes for granted where a
configuration does not speak of it.
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, cast

_TOKEN_TABLE = re.compile(
    r"(^|\.)(embed_tokens|shared|wte|word_embeddings?|tok_embeddings|embed_in|tokens_embed"
    r"|token_embedding|embeddings?|emb|w)\.weight$"
)
_OUTPUT_TABLE = re.compile(
    r"(^|\.)(\w*lm_head|embed_out|output_projection|proj_out|vocab_projector|lm_loss|output|head"
    r"|unembedding_projection|pred_layer\.proj|lm_head\.out_proj"
    r"|((lm_head|predictions|ml?m_\w+|head)\.)?decoder)\.weight$"
)
# Heads of masked language models keep their bias beside the layer that it is the bias of.
_HEAD_BIAS = re.compile(
    r"(?P<head>(^|.*\.)(predictions|lm_head|\w*mlm_\w+|mim_head))(\.decoder)?\.bias$"
)
_OWN_BIAS = re.compile(
    r"(?P<layer>(\w+\.)?(decoder|vocab_projector|output|\w*lm_head|lm_loss|pred_layer\.proj))\.bias"
)
# Where one module holds another table of tokens than the model around it.
_STACKS = ("encoder", "decoder", "text_encoder", "text_decoder")
_SHARED = re.compile(rf"(?P<model>(^|.*\.))(shared|({'|'.join(_STACKS)})\.embed_tokens)\.weight")
_OLD_LANGUAGE_MODEL = re.compile(r"(?P<outer>(^|.*\.)language_model\.)model\.")
_OUTPUT_OF_TYPE = {
    "whisper": "proj_out.weight",
    "gpt_neox": "embed_out.weight",
    "gpt_neox_japanese": "embed_out.weight",
    "rwkv": "head.weight",
    "biogpt": "output_projection.weight",
    "trocr": "output_projection.weight",
    "modernbert": "decoder.weight",
}
_HEADLESS = re.compile(
    r"(?<!LMHead)(?<!DoubleHeads)(?<!MT)Model$"
    r"|For(\w*Classification|QuestionAnswering\w*|MultipleChoice|TextEncoding)$"
)


def is_token_table(name: str) -> bool:
    """Tell whether a matrix may be the table of the tokens that a model reads.

    >>> is_token_table("shared.weight"), is_token_table("embeddings.position_embeddings.weight")
    (True, False)
    """
    return _TOKEN_TABLE.search(name) is not None


def is_output_table(name: str) -> bool:
    """Tell whether a matrix may give one logit per token; its shape has to say the rest.

    >>> is_output_table("cls.predictions.decoder.weight"), is_output_table("classifier.weight")
    (True, False)
    """
    return _OUTPUT_TABLE.search(name) is not None


def is_shared_table(name: str) -> bool:
    """Tell whether a table stands for those of encoder and decoder, and is not looked up itself."""
    return re.search(r"(^|\.)shared\.weight$", name) is not None


def may_be_shared(first: str, second: str) -> bool:
    """Tell whether two tables may be one that encoder and decoder share.

    >>> may_be_shared("decoder.embed_tokens.weight", "shared.weight")
    True
    """
    one, two = _SHARED.fullmatch(first), _SHARED.fullmatch(second)
    return one is not None and two is not None and one["model"] == two["model"]


def input_names(table: str, names: Iterable[str]) -> list[str]:
    """Return the names under which the stacks of a model look up a shared table.

    >>> input_names("model.shared.weight", ["model.encoder.layers.0.fc1.weight"])
    ['model.encoder.embed_tokens.weight']
    """
    if not is_shared_table(table):
        return []
    prefix = table.removesuffix("shared.weight")
    held = {n[len(prefix) :].split(".", 1)[0] for n in names if n.startswith(prefix)}
    return [f"{prefix}{stack}.embed_tokens.weight" for stack in _STACKS if stack in held]


def output_name(
    table: str, biases: Iterable[str], names: Container[str], config: Mapping[str, Any]
) -> str:
    """Return the name of the output layer that is tied to a table of tokens.

    `biases` are the vectors that have one entry per token: one is the output layer's, and tells it.

    >>> output_name("model.embed_tokens.weight", [], [], {})
    'lm_head.weight'
    >>> output_name("bert.embeddings.word_embeddings.weight", ["cls.predictions.bias"], [], {})
    'cls.predictions.decoder.weight'
    """
    for bias in biases:
        if (found := _HEAD_BIAS.fullmatch(bias)) is not None:
            head = found["head"]
            plain = head.endswith("lm_head") and f"{head}.dense.weight" not in names
            return f"{head}.weight" if plain else f"{head}.decoder.weight"
        if (found := _OWN_BIAS.fullmatch(bias)) and f"{found['layer']}.weight" not in names:
            return f"{found['layer']}.weight"
    if (inner := _OLD_LANGUAGE_MODEL.match(table)) is not None:
        return f"{inner['outer']}lm_head.weight"
    return _OUTPUT_OF_TYPE.get(str(config.get("model_type")), "lm_head.weight")


def is_layer_stack(path: str) -> bool:
    """Tell whether a stack is of layers, of which equal ones are a deeper model and not one layer.

    >>> is_layer_stack("model.layers"), is_layer_stack("model.decoder.bbox_embed")
    (True, False)
    """
    return re.search(r"(^|\.)(layers?|blocks?|resblocks|h|stages?|experts)$", path) is not None


def places_in_stacks(name: str) -> list[tuple[str, int]]:
    """Return the stacks of layers that a tensor lies in, and its place in each, from outside in.

    >>> places_in_stacks("model.layers.3.mlp.experts.7.w1.weight")
    [('model.layers', 3), ('model.layers.3.mlp.experts', 7)]
    """
    parts = name.split(".")
    places = ((".".join(parts[:i]), parts[i]) for i in range(1, len(parts)))
    return [(s, int(p)) for s, p in places if p.isdecimal() and len(p) < 9 and is_layer_stack(s)]


def bias_names(name: str) -> tuple[str, ...]:
    """Return both names of the bias of a masked language model's head, or nothing.

    >>> bias_names("cls.predictions.decoder.bias")
    ('cls.predictions.bias', 'cls.predictions.decoder.bias')
    """
    found = _HEAD_BIAS.fullmatch(name)
    return () if found is None else (f"{found['head']}.bias", f"{found['head']}.decoder.bias")


# --- Configurations ---

TIE = "tie_word_embeddings"
_PARTS = ("text_config", "decoder", "thinker_config", "llm_config", "language_config")
# Models whose output layer may be another although they say that it is tied: files tell.
_BY_FILE = frozenset({"t5", "mt5", "umt5", "longt5", "udop", "pop2piano"})
# Models that also scale their outputs where tables are tied. Of some, transformers 5 reads that
# from a key of its own; of the others nothing but the tie can say it.
_SCALE = "scale_decoder_outputs"
_SCALED_APART = frozenset({"t5", "longt5", "pop2piano"})
_SCALED = frozenset({"switch_transformers"})

# Types of models whose table is not tied where their configuration does not say.
_UNTIED = frozenset(
    """
    afmoe apertus arcee aria aria_text axk1 axk2 bailing_hybrid bamba beam bitnet blt
    bridgetower chameleon codegen cohere_asr cohere_compass cosmos3_edge cosmos3_edge_text
    cosmos3_omni cwm dbrx deepseek_ocr2 deepseek_ocr2_encoder deepseek_ocr2_text deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note dots3_note_text
    emu3 emu3_text_model esmc eurobert evolla exaone4 exaone4_5 exaone_moe
    falcon_h1 fast_vlm flex_olmo flint fsmt fuyu git glm glm4 glm46v glm4_moe glm4_moe_lite
    glm4v glm4v_moe glm4v_moe_text glm4v_text glm5_next glm5_next_text glm_image
    glm_image_text glm_moe_dsa glm_ocr glm_ocr_text glmga gpt_neox gpt_oss gptj granite
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax idefics idefics2 idefics3
    imagegpt internlm3 iquestcoder jais2 jamba kimi_linear kolibri1 kyutai_speech_to_text
    laguna llama llama4 llama4_text llava llava_next llava_next_video longcat_flash mamba2
    mellum mimo_v2_flash minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl
    minimax_m3_vl_text ministral ministral3 mistral mistral4 mistral_large4
    mistral_large4_text mixtral mllama_text_model modernvbert molmo2 molmo2_text
    moonshine_streaming moshi moshi_depth muse_glimmer_text muse_spark_text musicgen_decoder
    musicgen_melody_decoder nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe
    openai_privacy_filter perception_lm persimmon phi phi3 phi4_multimodal phimoe pix2struct
    pix2struct_text_model pp_formulanet_text qianfan_ocr qwen2 qwen2_5_omni_talker
    qwen2_5_omni_thinker qwen2_5_vl qwen2_5_vl_text qwen2_moe qwen2_vl qwen2_vl_text qwen3
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
    qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_text
    qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen3_vl_text qwen4_exp qwen4_exp_text
    reformer rembert rwkv seed_oss smolvlm solar_open stablelm
    step3p5 ultrabert ultravbert unlimited_ocr unlimited_ocr_text vibevoice video_llama_3
    video_llava vipllava xlstm
    """.split()
)


def has_output_layer(config: Mapping[str, Any]) -> bool:
    """Tell whether a configuration is of a model that writes tokens; True where it names no class.

    >>> has_output_layer({"architectures": ["BertModel"]})
    False
    """
    stated: Any = config.get("architectures")
    classes = cast("list[Any]", stated) if isinstance(stated, list) else []
    return not classes or not all(_HEADLESS.search(str(name)) for name in classes)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Tell whether a model's output layer is its table of tokens; None where nothing is known.

    The configuration says so itself, or of its language model, or takes it for granted.

    >>> is_tied({"model_type": "gpt2"}), is_tied({"model_type": "llama"}), is_tied({})
    (True, False, None)
    """
    parts = [config, *language_parts(config)]
    stated = next((p[TIE] for p in parts if isinstance(p.get(TIE), bool)), None)
    if stated is not None:
        return stated
    types = [str(p["model_type"]) for p in reversed(parts) if p.get("model_type")]
    return types[0] not in _UNTIED if types else None


def with_tie(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return a configuration that says whether tables are tied, wherever it may be asked.

    >>> with_tie({"text_config": {"model_type": "llama"}}, False)["text_config"]
    {'model_type': 'llama', 'tie_word_embeddings': False}
    """
    written = {**config, TIE: tied}
    for part in language_parts(config):
        name = next(key for key in _PARTS if config.get(key) is part)
        written[name] = {**part, TIE: tied}
    scaled = str(config.get("model_type")) in _SCALED_APART and is_tied(config)
    if scaled and not tied:
        written.setdefault(_SCALE, True)
    return written


def ties_with_scale(model_type: str) -> bool:
    """Tell whether a model scales its outputs by the same key that ties its tables."""
    return model_type in _SCALED


def scales_apart(model_type: str) -> bool:
    """Tell whether a tied model scales its outputs, by a key of its own since transformers 5."""
    return model_type in _SCALED_APART


def ties_by_file(model_type: str) -> bool:
    """Tell whether the file decides which tables a model ties, and not its configuration."""
    return model_type in _BY_FILE


def language_parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a composed configuration that are of its language model."""
    held = (config.get(key) for key in _PARTS)
    return [cast("Mapping[str, Any]", part) for part in held if isinstance(part, Mapping)]
