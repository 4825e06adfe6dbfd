"""Where a model comes from: pretrained weights, random ones, an exported folder; and what padding does to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCTC, PretrainedConfig, PreTrainedModel

from asr_train.config import ModelSettings, Recipe, SpecAugmentSettings
from asr_train.data.spec_augment import MaskSettings
from asr_train.data.text import Vocabulary
from asr_train.errors import ModelError
from asr_train.model_config import feature_extractor, load_model_config
from asr_train.optim import is_head
from asr_train.speech_model import SpeechModel

__all__ = ["PADDING_SENSITIVE_OVER", "TAKEN", "SpeechModel", "build_model", "load_exported", "padding_difference"]

TAKEN = (
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer",
    "wavlm",
)  # fmt: skip
"""Model types of AutoModelForCTC that take raw audio."""

PADDING_SENSITIVE_OVER = 1e-4
"""Of `padding_difference`: float32 rounding gives 5e-7, group norm and unmasked convolutions far more than this."""


def build_model(recipe: Recipe, vocabulary: Vocabulary, *, say: Callable[[str], None] = print) -> SpeechModel:
    """The recipe's model in float32, in training mode, on the CPU: pretrained weights, or random ones of its seed.

    Args:
        recipe: what to build.
        vocabulary: its size is the head's, its blank the model's `pad_token_id`.
        say: is told what the weights alone do not show, a new head say.

    Raises:
        ModelError: no such model, not a CTC model that takes raw audio, weights that do not fit its config.
    """
    settings = recipe.model
    config = load_model_config(settings, recipe.trust_remote_code, vocabulary)
    _check_type(config)
    masks = mask_settings(recipe.spec_augment, config)
    layerdrop = settings.layerdrop if settings.layerdrop is not None else getattr(config, "layerdrop", 0.0)
    # the model has a mask vector only where its config asks for masks
    config.mask_time_prob, config.mask_feature_prob = masks.time_prob, masks.feature_prob
    config.ctc_loss_reduction, config.ctc_zero_infinity = "mean", True
    extractor = feature_extractor(settings, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        hf = _load(settings, config, recipe.trust_remote_code, say)
    model = SpeechModel(
        hf,
        normalize=extractor.do_normalize,
        takes_attention_mask=bool(extractor.return_attention_mask),
        masks=masks,
        layerdrop=layerdrop,
    )
    if settings.freeze_feature_encoder:
        model.freeze_feature_encoder()
    if settings.gradient_checkpointing:
        hf.activation_checkpointing_enable({"use_reentrant": False})
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        say(f"the batch norms of {config.model_type} run on their stored statistics, in training too")
    return model.train()


def mask_settings(settings: SpecAugmentSettings, config: PretrainedConfig) -> MaskSettings:
    """The recipe's masks; the model's own values where the recipe gives none."""
    on = getattr(config, "apply_spec_augment", True)

    def value(name: str, given: Any) -> Any:
        own = getattr(config, f"mask_{name}", None)
        if name.endswith("prob") and not on:
            own = 0.0
        return own if given is None else given

    return MaskSettings(
        time_prob=value("time_prob", settings.time_prob),
        time_length=value("time_length", settings.time_length),
        time_min_masks=value("time_min_masks", settings.time_min_masks),
        feature_prob=value("feature_prob", settings.feature_prob),
        feature_length=value("feature_length", settings.feature_length),
        feature_min_masks=value("feature_min_masks", settings.feature_min_masks),
    )


def padding_difference(model: SpeechModel) -> float:
    """Largest difference of valid logits between utterances padded together and each alone; best on the CPU.

    Over `PADDING_SENSITIVE_OVER` a model is to be evaluated in batches of equal length.
    """
    lengths = [16_000, 10_960, 7_200]
    noise = np.random.default_rng(0).standard_normal((len(lengths), max(lengths))).astype(np.float32)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for row, length in enumerate(lengths):
                noise[row, length:] = 0.0
            waveforms = torch.from_numpy(noise).to(device)
            together = model(waveforms, torch.tensor(lengths))
            largest = 0.0
            for row, length in enumerate(lengths):
                alone = model(waveforms[row : row + 1, :length], torch.tensor([length]))[0]
                valid = model.geometry.num_frames(length)
                largest = max(largest, float((together[row, :valid] - alone[:valid]).abs().max()))
    finally:
        model.train(was_training)
    return largest


def load_exported(path: Path | str) -> tuple[SpeechModel, Vocabulary]:
    """A model folder of transformers, and its vocabulary, in evaluation mode.

    Raises:
        ModelError: the folder has no CTC model that takes raw audio.
    """
    settings = ModelSettings(pretrained=str(path))
    config = load_model_config(settings)
    _check_type(config)
    extractor = feature_extractor(settings, config)
    hf = _load(settings, config, False, print)
    model = SpeechModel(
        hf, normalize=extractor.do_normalize, takes_attention_mask=bool(extractor.return_attention_mask)
    )
    return model.eval(), Vocabulary.from_tokenizer_dir(Path(path))


def _check_type(config: PretrainedConfig) -> None:
    if config.model_type not in TAKEN:
        raise ModelError(
            f"model: {config.model_type!r} is no CTC model that takes raw audio; these are: {', '.join(TAKEN)}"
        )
    if getattr(config, "add_adapter", False):
        raise ModelError(
            "model: convolutional adapters (add_adapter) behind the encoder are not taken; "
            "set model.config.add_adapter=false"
        )


def _load(
    settings: ModelSettings, config: PretrainedConfig, trust_remote_code: bool, say: Callable[[str], None]
) -> PreTrainedModel:
    """Weights: those of `pretrained`, else random ones from torch's generator."""
    automatic: Any = AutoModelForCTC
    attention: str = settings.attention
    if attention == "sdpa" and not automatic._model_mapping[type(config)]._supports_sdpa:
        attention = "eager"
    try:
        if settings.pretrained is None:
            hf: PreTrainedModel = automatic.from_config(config, dtype=torch.float32, attn_implementation=attention)
            return hf
        hf, found = automatic.from_pretrained(
            settings.pretrained,
            revision=settings.revision,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"model: {settings.pretrained or settings.architecture} cannot be made: {error}") from error
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    new = sorted({*found["missing_keys"], *mismatched})
    strange = [name for name in new if not (is_head(name) or name.endswith("masked_spec_embed"))]
    if strange:
        raise ModelError(f"model: the weights of {settings.pretrained} lack or do not fit: {', '.join(strange)}")
    if any(is_head(name) for name in new):
        say(f"the head of {settings.pretrained} is new: {config.vocab_size} classes, random weights")
    return hf
