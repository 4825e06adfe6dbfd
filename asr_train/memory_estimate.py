"""What training a unit takes in memory, from a transformers config alone: before a run, and to size its units.

Shapes: B utterances of S padded samples are F frames, N = B * F; H channels, I of the feed-forward, A attention heads.

Counted are the tensors that autograd keeps for the backward pass (saved), term by term as transformers' layers save
them, with torch 2.13's kernels on a CPU; `benchmarks/memory.py` holds them against a count by hooks. What differs on a
GPU (dropout keeps one byte an element, autocast runs norms in fp32, attention by kernels that keep no scores) is
taken from torch's lists and derivative formulas and was not run on one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from asr_train.config import Recipe
from asr_train.estimate import num_parameters, positional_weight
from asr_train.geometry import FrameGeometry

FROZEN_CHUNK_BYTES = 1 << 29
"""Bytes that the widest layer of a frozen feature encoder puts out at once; see `chunked_encoder`. A constant, never
a question to the device: how a unit is cut must not depend on where it runs."""

_LABELS_A_FRAME = 0.3  # English: 15 characters a second beside 50 frames
_ADAM_STATES = 2
_FP32 = 4
_ZERO_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size, which the shipped configs leave as it is

Strategy = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class UnitShape:
    """A unit as far as memory is concerned."""

    num_utterances: int
    padded_samples: int


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How the unit is trained."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    feature_encoder_frozen: bool = False
    attention: str = "sdpa"
    device: Literal["cpu", "cuda"] = "cuda"
    strategy: Strategy = "single"
    world_size: int = 1

    @classmethod
    def of(
        cls, recipe: Recipe, *, device: Literal["cpu", "cuda"], strategy: Strategy = "single", world_size: int = 1
    ) -> "MemorySettings":
        """What a recipe says, on a device and over so many ranks."""
        return cls(
            precision=recipe.precision,
            gradient_checkpointing=recipe.model.gradient_checkpointing,
            feature_encoder_frozen=recipe.model.freeze_feature_encoder,
            attention=recipe.model.attention,
            device=device,
            strategy=strategy,
            world_size=world_size,
        )

    @property
    def bytes(self) -> int:
        """Of an element that the model computes."""
        return _FP32 if self.precision == "fp32" else 2

    @property
    def norm_bytes(self) -> int:
        """Of an element that goes into a norm or a softmax: autocast on a GPU runs these in fp32, on a CPU not."""
        return _FP32 if self.device == "cuda" else self.bytes

    @property
    def mask_bytes(self) -> int:
        """Of an element of a dropout's mask: a bool on a GPU; a number of the same kind on a CPU."""
        return 1 if self.device == "cuda" else self.bytes


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank's device at the worst moment of a unit, by what they are for; and of a checkpoint on disk.

    Attributes:
        parameters: fp32 weights, and what the strategy keeps beside them.
        gradients: fp32, of the trained parameters, and the strategy's buckets.
        optimizer: Adam's two moments.
        saved: tensors kept for the backward pass at the end of the forward pass.
        recomputed: what gradient checkpointing computes anew, of one layer at a time.
        working: what comes and goes around that: gradients of activations, low-precision copies of weights,
            or, where these are larger, the frozen feature encoder's chunk or the optimizer's temporaries.
        checkpoint: on disk, all ranks together; weights, frozen ones too, and the optimizer's state.
    """

    parameters: int
    gradients: int
    optimizer: int
    saved: int
    recomputed: int
    working: int
    checkpoint: int

    @property
    def total(self) -> int:
        """Peak on the device; the checkpoint is no part of it."""
        return self.parameters + self.gradients + self.optimizer + self.saved + self.recomputed + self.working


def memory(config: Mapping[str, Any], shape: UnitShape, settings: MemorySettings) -> Memory:
    """Predicted memory of training one unit.

    Args:
        config: a model's transformers config, as `to_dict()` gives it.
        shape: the unit.
        settings: how it is trained.
    """
    size = _Sizes.of(config, shape)
    trained, frozen = num_parameters(config, feature_encoder_frozen=settings.feature_encoder_frozen)
    layer = _saved_by_layer(config, size, settings)
    again = layer - size.frames * size.hidden * settings.bytes + _position_bias(config, size)  # its input is there
    widest = 0 if settings.feature_encoder_frozen else _saved_by_convolutions(config, size, settings)[0]
    saved = saved_bytes(config, shape, settings)
    recomputed = max(again, widest) if settings.gradient_checkpointing else 0
    persistent = _persistent(config, trained, frozen, settings)
    around = _around_backward(config, size, settings)
    if settings.gradient_checkpointing and settings.precision != "fp32":
        # autocast holds its copies of all weights until the forward pass ends; in backward only a layer's
        around = max(around, 2 * trained - recomputed)
    before = 0
    if settings.feature_encoder_frozen:  # output of a norm and of its activation, beside that of the convolution
        one = size.widest_samples * settings.bytes
        before = 3 * max(one, min(one * size.utterances, FROZEN_CHUNK_BYTES))
    sharded = settings.world_size if settings.strategy not in ("single", "ddp") else 1
    after = trained * _FP32 // sharded  # AdamW over lists of tensors keeps denominators for all of them
    return Memory(
        **persistent,
        saved=saved,
        recomputed=recomputed,
        working=max(around, before - saved - recomputed, after - saved - recomputed, 0),
        checkpoint=(trained + frozen) * _FP32 + _ADAM_STATES * trained * _FP32,
    )


def saved_bytes(config: Mapping[str, Any], shape: UnitShape, settings: MemorySettings) -> int:
    """Bytes of the tensors that are kept for the backward pass at the end of the forward pass of a unit."""
    size = _Sizes.of(config, shape)
    num_layers = config["num_hidden_layers"]
    if settings.gradient_checkpointing:
        is_fp32 = settings.device == "cuda" and not config.get("do_stable_layer_norm", False)
        layers = num_layers * size.frames * size.hidden * (_FP32 if is_fp32 else settings.bytes)
    else:
        layers = num_layers * _saved_by_layer(config, size, settings) + _position_bias(config, size)
    convolutions = 0
    if not settings.feature_encoder_frozen:
        convolutions = (size.utterances * size.samples + sum(size.convolution_elements[:-1])) * settings.bytes  # inputs
        if not settings.gradient_checkpointing:
            convolutions += sum(_saved_by_convolutions(config, size, settings))
    return int(layers + convolutions + _saved_around_layers(config, size, settings))


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the terms are made of."""

    utterances: int
    samples: int  # S
    frames: int  # N, of all utterances
    frames_each: int  # F
    hidden: int
    inner: int
    scores: int  # A * F * F, of all utterances
    convolution_elements: tuple[int, ...]  # that each convolution puts out, of all utterances
    widest_samples: int  # the same of the widest, of one utterance

    @classmethod
    def of(cls, config: Mapping[str, Any], shape: UnitShape) -> "_Sizes":
        kernels, strides = tuple(config["conv_kernel"]), tuple(config["conv_stride"])
        outputs = [
            channels
            * FrameGeometry(kernels=kernels[: i + 1], strides=strides[: i + 1]).num_frames(shape.padded_samples)
            for i, channels in enumerate(config["conv_dim"])
        ]
        frames = FrameGeometry(kernels=kernels, strides=strides).num_frames(shape.padded_samples)
        frames = -(-frames // config.get("squeeze_factor", 1))
        return cls(
            utterances=shape.num_utterances,
            samples=shape.padded_samples,
            frames=shape.num_utterances * frames,
            frames_each=frames,
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            scores=shape.num_utterances * config["num_attention_heads"] * frames**2,
            convolution_elements=tuple(shape.num_utterances * each for each in outputs),
            widest_samples=max(outputs),
        )


def _saved_by_layer(config: Mapping[str, Any], size: _Sizes, settings: MemorySettings) -> int:
    """Bytes that one transformer layer keeps, its low-precision copies of weights in them."""
    each = settings.bytes
    is_gpu_autocast = settings.device == "cuda" and each < _FP32
    # inputs of two norms and of the first feed-forward; query, key, value and their weighted sum
    per_frame = size.hidden * (2 * settings.norm_bytes + 5 * each)
    per_frame += size.hidden * each * (3 if is_gpu_autocast else 1)  # autocast casts the input thrice, to q, k and v
    per_frame += 2 * size.inner * each  # around the activation
    if config["hidden_dropout"] > 0:
        per_frame += 2 * size.hidden * settings.mask_bytes
    if config["activation_dropout"] > 0:
        per_frame += size.inner * settings.mask_bytes
    per_frame += 2 * 2 * settings.norm_bytes  # mean and deviation of two norms
    if config["model_type"] == "wavlm":
        per_frame += 3 * size.hidden * each  # copies: time before utterances for torch's attention, heads for the gates
    attention = _saved_by_attention(config, size, settings)
    copies = 0 if each == _FP32 else each * (4 * size.hidden**2 + 2 * size.hidden * size.inner)
    return int(size.frames * per_frame + attention + copies)


def _saved_by_attention(config: Mapping[str, Any], size: _Sizes, settings: MemorySettings) -> int:
    """Bytes of scores that one layer keeps: three for each pair of frames, or none at all."""
    each = settings.bytes
    drops: bool = config["attention_dropout"] > 0
    if config["model_type"] in ("wavlm", "sew-d") or settings.attention == "eager":
        if settings.device == "cuda":  # softmax, its copy for the product, and the mask
            copy = 0 if each == _FP32 and not drops else each
            return size.scores * (_FP32 + copy + drops)
        return size.scores * each * (3 if drops else 1)
    if settings.device == "cuda" or not drops:  # fused: one number a query
        return size.scores // size.frames_each * _FP32 if size.frames_each else 0
    # torch's CPU kernel has no dropout: softmax, mask and product, and its query, key and value, all in fp32
    return size.scores * 3 * _FP32 + 3 * size.frames * size.hidden * (_FP32 - each)


def _position_bias(config: Mapping[str, Any], size: _Sizes) -> int:
    """Bytes of wavlm's bias of the scores, which its first layer makes for all."""
    return size.scores * _FP32 if config["model_type"] == "wavlm" else 0


def _saved_around_layers(config: Mapping[str, Any], size: _Sizes, settings: MemorySettings) -> int:
    """Bytes kept by the projection, the positional convolution, the last norm, the head and the loss."""
    each, mask = settings.bytes, settings.mask_bytes
    channels, vocabulary = config["conv_dim"][-1], config["vocab_size"]
    per_frame = channels * (settings.norm_bytes + each)
    per_frame += size.hidden * (2 * each + settings.norm_bytes + each)  # around the positional convolution; norm; head
    for name in ("feat_proj_dropout", "hidden_dropout", "final_dropout"):
        per_frame += size.hidden * mask * (config[name] > 0)
    if config.get("feat_extract_norm", "layer") == "layer":
        per_frame += size.hidden  # which frames are padding, a bool for each channel
    per_frame += _FP32 * vocabulary + _FP32 * (2 * _LABELS_A_FRAME * size.frames_each + 1)  # CTC's forward variables
    weights = each * positional_weight(config)  # made from magnitude and direction in every forward pass
    if each < _FP32:
        weights += each * (channels * size.hidden + size.hidden * vocabulary)
    return int(size.frames * per_frame + weights)


def _saved_by_convolutions(config: Mapping[str, Any], size: _Sizes, settings: MemorySettings) -> list[int]:
    """Bytes that each layer of a trained feature encoder keeps besides its input."""
    each, norm = settings.bytes, settings.norm_bytes
    is_layer_norm = config.get("feat_extract_norm", "layer") == "layer"
    channels = [1, *config["conv_dim"]]
    found = []
    for i, elements in enumerate(size.convolution_elements):
        normed = is_layer_norm or i == 0
        kept = 2 * norm if normed else each  # a norm's input and its output; else the convolution's output
        copies = 0 if each == _FP32 else each * config["conv_kernel"][i] * channels[i] * channels[i + 1]
        found.append(elements * kept + copies)
    return found


def _around_backward(config: Mapping[str, Any], size: _Sizes, settings: MemorySettings) -> int:
    """Bytes of what the backward pass holds beside what was saved: gradients on both sides of the widest operation."""
    each = settings.bytes
    found = 2 * size.frames * (size.hidden + size.inner) * each
    if config["model_type"] in ("wavlm", "sew-d") or settings.attention == "eager":
        found = max(found, 2 * size.scores * settings.norm_bytes)
    return found


def _persistent(config: Mapping[str, Any], trained: int, frozen: int, settings: MemorySettings) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on one rank."""
    world, strategy = settings.world_size, settings.strategy
    shard_weights = strategy in ("fsdp2", "zero3")
    shard_gradients = strategy in ("fsdp2", "zero2", "zero3")
    shard_optimizer = shard_gradients or strategy == "zero1"
    weights = -(-(trained + frozen) // world) if shard_weights else trained + frozen
    gradients = -(-trained // world) if shard_gradients else trained
    states = -(-trained // world) if shard_optimizer else trained
    if shard_weights:  # two layers are whole at once: one in use, and the next on its way
        layer = 4 * config["hidden_size"] ** 2 + 2 * config["hidden_size"] * config["intermediate_size"]
        weights += 2 * layer
        gradients += layer
    if strategy.startswith("zero"):
        weights += -(-trained // world)  # DeepSpeed's own fp32 copy of a rank's part
        gradients += min(trained, _ZERO_BUCKET_ELEMENTS)
    return {
        "parameters": weights * _FP32,
        "gradients": gradients * _FP32,
        "optimizer": states * _FP32 * _ADAM_STATES,
    }
