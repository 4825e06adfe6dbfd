"""What a model costs, from its transformers config alone: FLOPs, how they grow with an utterance, and parameters.

A multiplication with its addition counts as two. Norms, activations and softmax are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from asr_train.errors import ModelError
from asr_train.geometry import SAMPLE_RATE


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of a forward pass, for each frame that the feature encoder puts out."""

    feature_encoder: float
    transformer: float  # projections, positional convolution, layers and head, without attention's scores
    attention: float  # scores and their weighted sum, for each frame of the utterance that is attended to

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ForwardFlops":
        """Count from a config as `to_dict()` gives it: wav2vec2 and the models built like it."""
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        squeeze = config.get("squeeze_factor", 1)  # sew and sew-d: frames that one frame of the transformer stands for
        layer = 8 * hidden**2 + 4 * hidden * config["intermediate_size"]  # query, key, value, output; two of ff
        attention = 4 * hidden
        if config["model_type"] == "wav2vec2-conformer":  # a second feed-forward and a convolution module
            layer += 4 * hidden * config["intermediate_size"] + 6 * hidden**2
            layer += 2 * hidden * config["conv_depthwise_kernel_size"]
            if config["position_embeddings_type"] == "relative":  # 2F - 1 distances, projected and scored
                layer += 4 * hidden**2
                attention += 4 * hidden
        elif config["model_type"] == "sew-d":  # content to position and back, over bucketed distances
            layer += 8 * hidden * config["position_buckets"]
        positions = 2 * _positional_kernel(config) * hidden * (hidden // config["num_conv_pos_embedding_groups"])
        projection = 2 * config["conv_dim"][-1] * hidden
        upsampling = 2 * hidden**2 if squeeze > 1 else 0  # from one frame to `squeeze` frames, each of hidden channels
        head = 2 * hidden * config["vocab_size"]
        return cls(
            feature_encoder=_feature_encoder(config),
            transformer=(num_layers * layer + positions) / squeeze + projection + upsampling + head,
            attention=num_layers * attention / squeeze**2,
        )


def quadratic_share(config: Mapping[str, Any], *, feature_encoder_frozen: bool = True) -> float:
    """How much one more frame to attend to adds to the cost of a frame in training, relative to its other cost: q.

    Training an utterance of F frames costs as much as F + q * F**2 frames of no attention.

    Raises:
        ModelError: the FLOPs of a model like this cannot be counted.
    """
    fixed, attention = _training_flops(_counted(config), feature_encoder_frozen)
    return attention / fixed


def frame_flops(config: Mapping[str, Any], *, feature_encoder_frozen: bool) -> float:
    """FLOPs of training on a frame, without attention's scores; an utterance of F frames costs F + q * F**2 of them.

    Raises:
        ModelError: those of a model like this cannot be counted.
    """
    return _training_flops(_counted(config), feature_encoder_frozen)[0]


def training_flops_per_s(
    config: Mapping[str, Any], *, utterance_s: float, feature_encoder_frozen: bool = True
) -> float:
    """FLOPs of training on a second of audio, in utterances of `utterance_s` seconds."""
    stride_samples: int = prod(config["conv_stride"])
    frames_per_s = SAMPLE_RATE / stride_samples
    fixed, attention = _training_flops(_counted(config), feature_encoder_frozen)
    return frames_per_s * (fixed + attention * frames_per_s * utterance_s)


def num_parameters(config: Mapping[str, Any], *, feature_encoder_frozen: bool) -> tuple[int, int]:
    """Parameters that are trained, and those that are frozen."""
    hidden, inner, num_layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    channels = [1, *config["conv_dim"]]
    encoder = sum(k * a * b for k, a, b in zip(config["conv_kernel"], channels, channels[1:], strict=False))
    encoder += sum(channels[1:]) if config["conv_bias"] else 0
    is_layer_norm = config.get("feat_extract_norm", "layer") == "layer"
    encoder += 2 * sum(channels[1:]) if is_layer_norm else 2 * channels[1]
    projection = channels[-1] * hidden + hidden + 2 * channels[-1] * config.get("feat_proj_layer_norm", True)
    rest = projection + positional_weight(config) + hidden + config["num_conv_pos_embeddings"]
    rest += hidden * (config.get("mask_time_prob", 0) > 0 or config.get("mask_feature_prob", 0) > 0)
    rest += 2 * hidden + hidden * config["vocab_size"] + config["vocab_size"]
    layer = 4 * (hidden**2 + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    if config["model_type"] == "wavlm":
        heads = config["num_attention_heads"]
        layer += heads + 8 * (hidden // heads) + 8  # how much of the position's bias each head takes
        rest += config["num_buckets"] * heads
    rest += num_layers * layer
    return (rest, encoder) if feature_encoder_frozen else (rest + encoder, 0)


def positional_weight(config: Mapping[str, Any]) -> int:
    """Elements of the positional convolution's kernel."""
    hidden = config["hidden_size"]
    return int(hidden * (hidden // config["num_conv_pos_embedding_groups"]) * config["num_conv_pos_embeddings"])


def _counted(config: Mapping[str, Any]) -> ForwardFlops:
    """FLOPs of a forward pass; a config that they cannot be counted from is an error of the model."""
    try:
        return ForwardFlops.of(config)
    except KeyError as error:
        raise ModelError(
            f"model: FLOPs of {config.get('model_type')!r} cannot be counted, for its config has no {error}; they are"
            " counted for wav2vec2 and the models built like it"
        ) from None


def _training_flops(forward: ForwardFlops, feature_encoder_frozen: bool) -> tuple[float, float]:
    """FLOPs of a frame without attention's scores, and of each frame attended to; backward costs two forward."""
    feature_encoder = forward.feature_encoder * (1 if feature_encoder_frozen else 3)
    return feature_encoder + 3 * forward.transformer, 3 * forward.attention


def _feature_encoder(config: Mapping[str, Any]) -> float:
    """FLOPs of all convolutions for one frame that the last of them puts out."""
    channels = [1, *config["conv_dim"]]
    strides = config["conv_stride"]
    per_frame = [prod(strides[i + 1 :]) for i in range(len(strides))]  # outputs of each layer a final frame
    kernels = config["conv_kernel"]
    each = zip(per_frame, pairwise(channels), kernels, strict=True)
    return float(sum(2 * outputs * kernel * before * after for outputs, (before, after), kernel in each))


def _positional_kernel(config: Mapping[str, Any]) -> int:
    """Taps of the positional convolutions; data2vec-audio has several small ones."""
    if config["model_type"] == "data2vec-audio":
        return int(config["num_conv_pos_embeddings"] * config["conv_pos_kernel_size"])
    if config["model_type"] == "wav2vec2-conformer":
        return 0
    return int(config["num_conv_pos_embeddings"])
