"""What a model's config says before the model is built: geometry, feature extractor, processor (transformers)."""

import difflib
import os
import tempfile
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)
from transformers.configuration_utils import PretrainedConfig

from asr_train.config import ModelSettings
from asr_train.data.text import Vocabulary
from asr_train.errors import ModelError
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE, FrameGeometry
from asr_train.trouble import remedy

TAKEN = (
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer",
    "wavlm",
)  # fmt: skip
"""Model types of AutoModelForCTC that take raw audio."""

_TAKEN_ARE = f"these model types are taken: {', '.join(TAKEN)}"


def load_model_config(
    settings: ModelSettings, trust_remote_code: bool = False, vocabulary: Vocabulary | None = None
) -> PretrainedConfig:
    """The transformers config of a recipe's model, with the recipe's changes and the vocabulary's ids.

    Raises:
        ModelError: no such model or model type, an unknown field, a value of the wrong kind.
    """
    changes = dict(settings.config)
    if vocabulary is not None:
        changes |= {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.blank_id}
        for key, token in (("bos_token_id", vocabulary.bos), ("eos_token_id", vocabulary.eos)):
            if token is not None:  # some families' configs want a number, None is refused
                changes[key] = vocabulary.tokens.index(token)
    if settings.pretrained is None:
        _check_type(settings.architecture)
    try:
        if settings.pretrained is None:
            known = AutoConfig.for_model(settings.architecture)
        else:
            known = AutoConfig.from_pretrained(
                settings.pretrained, revision=settings.revision, trust_remote_code=trust_remote_code
            )
        _check_type(known.model_type)
        unknown = [_unknown(key, known) for key in settings.config if not hasattr(known, key)]
        if unknown:
            raise ModelError(f"model.config: {known.model_type} has no field {', '.join(unknown)}")
        merged = {**known.to_dict(), **changes}
        if "conv_dim" in changes:
            merged.pop("num_feat_extract_layers", None)  # transformers counts conv_dim anew
        return type(known).from_dict(merged)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds: OSError, ValueError, KeyError, its own strict ones
        name = settings.pretrained or settings.architecture
        why = remedy(error) or (error if settings.pretrained is None else f"{error}\n{_TAKEN_ARE}")
        raise ModelError(f"model: the config of {name!r} cannot be made: {why}") from error


def _unknown(key: str, config: PretrainedConfig) -> str:
    near = difflib.get_close_matches(key, config.to_dict(), n=1)
    return f"{key} (did you mean {near[0]}?)" if near else key


def _check_type(model_type: str) -> None:
    """Refuse, by name, what takes something else than raw audio, or has no CTC head."""
    if model_type not in TAKEN:
        raise ModelError(f"model: {model_type!r} is no CTC model that takes raw audio; {_TAKEN_ARE}")


def frame_geometry(config: PretrainedConfig) -> FrameGeometry:
    """The convolutions of a raw-audio model."""
    return FrameGeometry(kernels=tuple(config.conv_kernel), strides=tuple(config.conv_stride))


def feature_extractor(settings: ModelSettings, config: PretrainedConfig) -> Wav2Vec2FeatureExtractor:
    """The pretrained model's own feature extractor; else one that normalises, with a mask for layer-norm models.

    Raises:
        ModelError: the pretrained model wants audio at another rate.
    """
    if settings.pretrained is not None:
        try:
            found: Wav2Vec2FeatureExtractor = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
                settings.pretrained, revision=settings.revision or "main"
            )
        except (OSError, ValueError):  # a model saved without one
            pass
        else:
            if found.sampling_rate != SAMPLE_RATE:
                raise ModelError(
                    f"model: {settings.pretrained} wants audio at {found.sampling_rate} Hz; only {SAMPLE_RATE} is taken"
                )
            return found
    return Wav2Vec2FeatureExtractor(  # type: ignore[no-untyped-call]
        feature_size=1,
        sampling_rate=SAMPLE_RATE,
        padding_value=0.0,
        do_normalize=True,
        return_attention_mask=getattr(config, "feat_extract_norm", "layer") == "layer",
    )


def build_processor(vocabulary: Vocabulary, extractor: Wav2Vec2FeatureExtractor) -> Wav2Vec2Processor:
    """The processor that transformers' pipeline uses: this vocabulary's tokenizer, and the feature extractor."""
    with tempfile.TemporaryDirectory() as folder:
        vocab_file = Path(folder) / "vocab.json"
        write_json(vocab_file, {token: number for number, token in enumerate(vocabulary.tokens)})
        tokenizer = Wav2Vec2CTCTokenizer(  # type: ignore[no-untyped-call]
            os.fspath(vocab_file),
            pad_token=vocabulary.pad,
            unk_token=vocabulary.unk,
            word_delimiter_token=vocabulary.word_delimiter,
            bos_token=vocabulary.bos,
            eos_token=vocabulary.eos,
            do_lower_case=vocabulary.do_lower_case,
            clean_up_tokenization_spaces=False,
        )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)  # type: ignore[no-untyped-call]


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a pretrained processor or tokenizer: a folder, or a name on the hub.

    Raises:
        CorpusError: a folder without one.
        ModelError: nothing of that name can be loaded, or it is no character tokenizer for CTC.
    """
    if Path(name).is_dir():
        return Vocabulary.from_tokenizer_dir(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"text.processor: {name!r} cannot be loaded: {remedy(error) or error}") from error
    if not isinstance(tokenizer, Wav2Vec2CTCTokenizer):
        raise ModelError(f"text.processor: {name!r} has a {type(tokenizer).__name__}, not a Wav2Vec2CTCTokenizer")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Vocabulary.from_tokenizer_dir(Path(folder))
