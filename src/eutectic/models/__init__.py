"""transformers models from checkpoints: loading, processors, names, heads, linear layers, masks."""
