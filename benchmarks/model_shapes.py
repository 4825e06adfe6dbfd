"""Shapes of published models, as fields of transformers' Wav2Vec2Config, whose defaults are those of base."""

from typing import Any

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": _LARGE,
    "xls-r-300m": _LARGE | _LAYER_NORM,
    "xls-r-1b": {"hidden_size": 1280, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 5120}
    | _LAYER_NORM,
    "xls-r-2b": {"hidden_size": 1920, "num_hidden_layers": 48, "num_attention_heads": 16, "intermediate_size": 7680}
    | _LAYER_NORM,
}
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, **_LAYER_NORM,
}  # fmt: skip
