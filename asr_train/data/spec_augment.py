"""SpecAugment masks, drawn in numpy where batches are made."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Chances, lengths (frames, channels) and least numbers of masked spans, all resolved."""

    time_prob: float
    time_length: int
    time_min_masks: int
    feature_prob: float
    feature_length: int
    feature_min_masks: int


def time_mask(
    generator: np.random.Generator, num_frames: npt.NDArray[np.integer], padded_frames: int, settings: MaskSettings
) -> npt.NDArray[np.bool_] | None:
    """Masked frames, bool [B, padded_frames], in valid frames alone; None where none are wanted."""
    if settings.time_prob <= 0:
        return None
    return _spans(
        generator, num_frames, padded_frames, settings.time_prob, settings.time_length, settings.time_min_masks
    )


def feature_mask(
    generator: np.random.Generator, num_utterances: int, num_channels: int, settings: MaskSettings
) -> npt.NDArray[np.bool_] | None:
    """Masked channels, bool [B, num_channels], the same in all frames of an utterance; None where none are wanted."""
    if settings.feature_prob <= 0:
        return None
    lengths = np.full(num_utterances, num_channels)
    return _spans(
        generator, lengths, num_channels, settings.feature_prob, settings.feature_length, settings.feature_min_masks
    )


def _spans(
    generator: np.random.Generator,
    lengths: npt.NDArray[np.integer],
    width: int,
    prob: float,
    span: int,
    min_masks: int,
) -> npt.NDArray[np.bool_]:
    """Spans at distinct random starts: `prob * length / span` of them, rounded at random, at least `min_masks`.

    Spans may overlap, so that `prob` bounds the masked share from above. A row shorter than a span has none, where
    transformers raises. Source of the distribution: `_compute_mask_indices` in transformers' modeling_wav2vec2, which
    is fairseq's `compute_mask_indices` with `mask_type="static"`; one draw rounds all rows of a batch.
    """
    mask = np.zeros((len(lengths), width), dtype=bool)
    rounding = generator.random()
    offsets = np.arange(span)
    for row, length in enumerate(lengths.tolist()):
        wanted = max(int(prob * length / span + rounding), min_masks)
        num_starts = max(length - span + 1, 0)
        number = min(wanted, width // span, num_starts)
        starts = generator.choice(num_starts, number, replace=False)
        mask[row, (starts[:, None] + offsets).ravel()] = True
    return mask
