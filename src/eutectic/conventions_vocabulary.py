"""What a tensor's name says of a vocabulary: tables, output layers and biases with a row per token.

Beside `conventions.py`, by the same rule: each function answers one question about one name.
"""

import re

from eutectic.conventions import is_output_vocabulary, is_token_embedding

# Wide, since the number of rows tells too: a table counts where it has as many as the table of
# tokens. `embeddings.weight` is that of Mamba and RWKV, `w.weight` CTRL's, `tokens_embed` GPT's.
_TABLE = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|\w*word_embeddings?|wte|shared|tok_embeddings|embed_in"
    r"|token_embeddings?|tokens_embed|embeddings?|embed|emb|w)\.weight$"
)
_OUTPUT = re.compile(
    r"(^|\.)(\w*lm_head|embed_out|output_projection|decoder|predictions|vocab_projector|lm_loss"
    r"|proj_out|output_layer|output|head|mlm_head|pred_layer\.proj|generator_lm_head"
    r"|out_proj|final_proj|logits)\.(weight|bias)$"
    r"|(^|\.)final_logits_bias$"
)


def may_have_rows_of_tokens(name: str) -> bool:
    """Tell whether a tensor may have a row per token, going by its name; its shape decides.

    >>> may_have_rows_of_tokens("cls.predictions.bias")
    True
    >>> may_have_rows_of_tokens("model.layers.0.mlp.up_proj.weight")
    False
    """
    return _TABLE.search(name) is not None or _OUTPUT.search(name) is not None


def is_table_of_tokens(name: str) -> bool:
    """Tell whether a name is a model's table of tokens, or its output layer, beyond doubt."""
    return is_token_embedding(name) or is_output_vocabulary(name)


def is_input_table(name: str) -> bool:
    """Tell whether a tensor may be a table of tokens that are read, going by its name."""
    return _TABLE.search(name) is not None
