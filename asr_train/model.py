"""Where a model comes from: pretrained weights, random ones, an exported folder; and what padding does to it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCTC, PretrainedConfig, PreTrainedModel

from asr_train.config import ModelSettings, Recipe, SpecAugmentSettings
from asr_train.data.spec_augment import MaskSettings
from asr_train.data.text import Vocabulary
from asr_train.errors import CorpusError, ModelError
from asr_train.model_config import TAKEN, feature_extractor, load_model_config, load_vocabulary
from asr_train.optim import is_head
from asr_train.speech_model import SpeechModel
from asr_train.trouble import need, remedy

__all__ = ["PADDING_SENSITIVE_OVER", "TAKEN", "SpeechModel", "build_model", "load_exported", "padding_difference"]

PADDING_SENSITIVE_OVER = 1e-4
"""Of `padding_difference`: float32 rounding gives 5e-7, group norm and unmasked convolutions far more than this."""

_MAX_NAMED = 5  # parameters in an error


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
    _check_adapter(config)
    masks = mask_settings(recipe.spec_augment, config)
    layerdrop = settings.layerdrop if settings.layerdrop is not None else getattr(config, "layerdrop", 0.0)
    # the model has a mask vector only where its config asks for masks
    config.mask_time_prob, config.mask_feature_prob = masks.time_prob, masks.feature_prob
    config.ctc_loss_reduction, config.ctc_zero_infinity = "mean", True
    extractor = feature_extractor(settings, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        hf = _load(settings, config, vocabulary, trust_remote_code=recipe.trust_remote_code, say=say)
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
        # the name since transformers 5.2x; the older one takes the same
        enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        say(f"the batch norms of {config.model_type} run on their stored statistics, in training too")
    return model.train()


def mask_settings(settings: SpecAugmentSettings, config: PretrainedConfig) -> MaskSettings:
    """The recipe's masks; the model's own values where the recipe gives none."""
    is_on = getattr(config, "apply_spec_augment", True)
    values = {}
    for name, given in vars(settings).items():
        # wavlm knows no mask_feature_min_masks: transformers' functions then take 0
        own = 0 if name.endswith("_prob") and not is_on else getattr(config, f"mask_{name}", 0)
        values[name] = own if given is None else given
    return MaskSettings(**values)


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
    """A model folder of transformers, or its name on the hub, and its vocabulary; in evaluation mode.

    Raises:
        ModelError: the folder has no CTC model that takes raw audio, or one without a trained head or its vocabulary.
    """

    def refuse(text: str) -> None:
        raise ModelError(f"{text}: it has not been trained to write; fine-tune it first")

    settings = ModelSettings(pretrained=str(path))
    config = load_model_config(settings)
    _check_adapter(config)
    extractor = feature_extractor(settings, config)
    hf = _load(settings, config, None, trust_remote_code=False, say=refuse)
    model = SpeechModel(
        hf, normalize=extractor.do_normalize, takes_attention_mask=bool(extractor.return_attention_mask)
    )
    vocabulary = load_vocabulary(str(path))
    if vocabulary.size < hf.config.vocab_size:
        raise ModelError(
            f"model: {path} writes {hf.config.vocab_size} classes, and its vocabulary has {vocabulary.size} tokens; "
            "is vocab.json that of this model?"
        )
    return model.eval(), vocabulary


def _check_adapter(config: PretrainedConfig) -> None:
    if getattr(config, "add_adapter", False):
        raise ModelError(
            "model: convolutional adapters (add_adapter) behind the encoder are not taken; "
            "set model.config.add_adapter=false"
        )


def _writes_in(pretrained: str, vocabulary: Vocabulary) -> bool:
    """Whether a pretrained head's classes can stand for this vocabulary: False only where its own tokenizer differs."""
    try:
        return load_vocabulary(pretrained).tokens == vocabulary.tokens
    except (ModelError, CorpusError):  # no tokenizer beside the weights: nothing to compare with
        return True


def _renew_head(hf: PreTrainedModel, config: PretrainedConfig) -> None:
    """Random weights for the head, as transformers draws them, from torch's generator."""
    head: Any = hf
    nn.init.normal_(head.lm_head.weight, std=config.initializer_range)
    nn.init.zeros_(head.lm_head.bias)


def _load(
    settings: ModelSettings,
    config: PretrainedConfig,
    vocabulary: Vocabulary | None,
    *,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """Weights: those of `pretrained`, else random ones from torch's generator; the head must write in `vocabulary`."""
    automatic: Any = AutoModelForCTC
    attention: str = settings.attention
    kind = automatic._model_mapping.get(type(config), None)
    if attention == "sdpa" and kind is not None and not kind._supports_sdpa:
        attention = "eager"  # wavlm and sew-d have an attention of their own
    if attention == "flash_attention_2":
        need("flash_attn", "model.attention: flash_attention_2")
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
    except pickle.UnpicklingError as error:  # torch's message advises to load it all the same
        raise ModelError(
            f"model: the weights of {settings.pretrained} are damaged, or a pickle of more than tensors, which may run"
            " anything when it is loaded; it was not. Have them saved as safetensors."
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        name = settings.pretrained or settings.architecture
        raise ModelError(f"model: {name} cannot be made: {remedy(error) or error}") from error
    mismatched = [name for name, *_ in found["mismatched_keys"]]
    new = sorted({*found["missing_keys"], *mismatched})
    strange = [name for name in new if not (is_head(name) or name.endswith("masked_spec_embed"))]
    if strange:
        more = f" and {len(strange) - _MAX_NAMED} more" if len(strange) > _MAX_NAMED else ""
        raise ModelError(
            f"model: the weights of {settings.pretrained} lack or do not fit: {', '.join(strange[:_MAX_NAMED])}{more}; "
            "is it a model of this type, and does model.config keep its shapes?"
        )
    if any(is_head(name) for name in new):
        say(f"the head of {settings.pretrained} is made anew: {config.vocab_size} classes, random weights of the seed")
    elif vocabulary is not None and not _writes_in(settings.pretrained, vocabulary):
        _renew_head(hf, config)
        say(f"the head of {settings.pretrained} is made anew: it was trained for other characters than this corpus's")
    return hf
