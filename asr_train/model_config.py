"""What a model's config says before the model is built: geometry, feature extractor, processor (transformers)."""

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


def load_model_config(
    settings: ModelSettings, trust_remote_code: bool = False, vocabulary: Vocabulary | None = None
) -> PretrainedConfig:
    """The transformers config of a recipe's model, with the recipe's changes and the vocabulary's ids.

    Raises:
        ModelError: no such model or model type, an unknown field, a value of the wrong kind.
    """
    changes = dict(settings.config)
    if vocabulary is not None:
        changes |= {
            "vocab_size": vocabulary.size,
            "pad_token_id": vocabulary.blank_id,
            "bos_token_id": None if vocabulary.bos is None else vocabulary.tokens.index(vocabulary.bos),
            "eos_token_id": None if vocabulary.eos is None else vocabulary.tokens.index(vocabulary.eos),
        }
    try:
        if settings.pretrained is None:
            known = AutoConfig.for_model(settings.architecture)
        else:
            known = AutoConfig.from_pretrained(
                settings.pretrained, revision=settings.revision, trust_remote_code=trust_remote_code
            )
        unknown = sorted(key for key in settings.config if not hasattr(known, key))
        if unknown:
            raise ModelError(f"model.config: {known.model_type} has no field {', '.join(unknown)}")
        merged = {**known.to_dict(), **changes}
        return type(known).from_dict(merged)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds: OSError, ValueError, KeyError, its own strict ones
        name = settings.pretrained or settings.architecture
        raise ModelError(f"model: the config of {name!r} cannot be made: {error}") from error


def frame_geometry(config: PretrainedConfig) -> FrameGeometry:
    """The convolutions of a raw-audio model.

    Raises:
        ModelError: the model takes no raw audio.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels is None or strides is None:
        raise ModelError(
            f"model: {config.model_type!r} takes no raw audio (its config has no conv_kernel and conv_stride); "
            "choose wav2vec2, hubert, wavlm, data2vec-audio, sew, sew-d, unispeech, unispeech-sat or wav2vec2-conformer"
        )
    return FrameGeometry(kernels=tuple(kernels), strides=tuple(strides))


def feature_extractor(settings: ModelSettings, config: PretrainedConfig) -> Wav2Vec2FeatureExtractor:
    """The pretrained model's own feature extractor; else one that normalises, with a mask for layer-norm models."""
    if settings.pretrained is not None:
        try:
            found: Wav2Vec2FeatureExtractor = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
                settings.pretrained, revision=settings.revision or "main"
            )
            return found
        except (OSError, ValueError):  # a model saved without one
            pass
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
    if (Path(name) / "vocab.json").exists():
        return Vocabulary.from_tokenizer_dir(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"text.processor: {name!r} cannot be loaded: {error}") from error
    if not isinstance(tokenizer, Wav2Vec2CTCTokenizer):
        raise ModelError(f"text.processor: {name!r} has a {type(tokenizer).__name__}, not a Wav2Vec2CTCTokenizer")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return Vocabulary.from_tokenizer_dir(Path(folder))
