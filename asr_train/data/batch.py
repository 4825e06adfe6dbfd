"""A unit as padded tensors: waveforms, labels, and the random choices that belong to it.

Shapes: B utterances, S samples (padded), F frames (padded), H channels of the encoder, L transformer layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from asr_train.data.spec_augment import MaskSettings, feature_mask, time_mask
from asr_train.geometry import FrameGeometry

if TYPE_CHECKING:
    from asr_train.data.plan import Unit


class Utterances(Protocol):
    """What is needed of `data.corpus.CorpusSet`."""

    def waveform(self, i: int) -> npt.NDArray[np.int16]:
        """Samples of utterance `i`, int16 at 16 kHz."""
        ...

    def labels(self, i: int) -> npt.NDArray[np.int32]:
        """Label ids of utterance `i`."""
        ...


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What a model needs of its batches."""

    geometry: FrameGeometry
    normalize: bool  # each waveform to mean 0 and variance 1
    masks: MaskSettings | None
    hidden_size: int
    num_layers: int
    layerdrop: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One unit as tensors. What the loss wants on the host stays there, also after `to`."""

    ids: npt.NDArray[np.int64]  # [B]
    waveforms: torch.Tensor  # int16 [B, S]
    shift: torch.Tensor  # float32 [B]; a waveform is (int16 / 32768 - shift) * scale
    scale: torch.Tensor  # float32 [B]
    num_samples: torch.Tensor  # int64 [B]
    num_frames: torch.Tensor  # int64 [B], host
    labels: torch.Tensor  # int64 [sum of num_labels]
    num_labels: torch.Tensor  # int64 [B], host
    time_mask: torch.Tensor | None  # bool [B, F]
    feature_mask: torch.Tensor | None  # bool [B, H]
    keep_layers: torch.Tensor | None  # bool [L]
    seed: int  # of everything random in this unit; 0 in evaluation
    padded_samples: int  # S
    audio_samples: int  # of all utterances, without their padding
    is_padded: bool  # whether any utterance has fewer frames than F; known here, so that no device is asked

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on a device, all but what stays on the host."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking), but=_ON_HOST)

    def pin_memory(self) -> Self:
        """The batch in page-locked host memory, from where copies to a GPU do not block."""
        return self._each(lambda tensor: tensor.pin_memory())

    def __getstate__(self) -> dict[str, Any]:
        """What goes from a loader's worker to the training: one tensor, and small arrays.

        Each tensor would be shared memory with a file, and a connection of its own that hands the file over: 1 ms each.
        """
        return {
            name: value.numpy() if isinstance(value, torch.Tensor) and name != "waveforms" else value
            for name, value in vars(self).items()
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            is_tensor = isinstance(value, np.ndarray) and name != "ids"
            object.__setattr__(self, name, torch.from_numpy(value) if is_tensor else value)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], *, but: Sequence[str] = ()) -> Self:
        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, torch.Tensor) and entry.name not in but:
                changed[entry.name] = change(value)
        return replace(self, **changed)


_ON_HOST = ("num_frames", "num_labels")


def make_batch(utterances: Utterances, unit: "Unit", settings: BatchSettings, seed: int | None) -> Batch:
    """Read a unit's utterances and draw its masks and dropped layers from its seed; without a seed there are none."""
    ids = np.asarray(unit.ids, dtype=np.int64)
    waves = [utterances.waveform(i) for i in ids.tolist()]
    labels = [utterances.labels(i) for i in ids.tolist()]
    num_samples = np.array([len(wave) for wave in waves], dtype=np.int64)
    num_frames = settings.geometry.num_frames(num_samples)
    waveforms = np.zeros((len(ids), unit.padded_samples), dtype=np.int16)
    for row, wave in enumerate(waves):
        waveforms[row, : len(wave)] = wave
    shift, scale = _normalisation(waves) if settings.normalize else (np.zeros(len(ids)), np.ones(len(ids)))
    padded_frames = settings.geometry.num_frames(unit.padded_samples)
    masks = _random_choices(settings, num_frames, padded_frames, seed)
    return Batch(
        ids=ids,
        waveforms=torch.from_numpy(waveforms),
        shift=torch.from_numpy(shift.astype(np.float32)),
        scale=torch.from_numpy(scale.astype(np.float32)),
        num_samples=torch.from_numpy(num_samples),
        num_frames=torch.from_numpy(num_frames),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        num_labels=torch.tensor([len(ids_) for ids_ in labels], dtype=torch.int64),
        **masks,
        seed=seed or 0,
        padded_samples=unit.padded_samples,
        audio_samples=int(num_samples.sum()),
        is_padded=bool((num_frames < padded_frames).any()),
    )


def input_values(batch: Batch) -> torch.Tensor:
    """The model's input, float32 [B, S], made on the batch's device: normalised where wanted, padding zero.

    Equal to transformers' Wav2Vec2FeatureExtractor on each utterance by itself.
    """
    values = batch.waveforms.to(torch.float32).mul_(1 / 32768)
    values = values.sub_(batch.shift[:, None]).mul_(batch.scale[:, None])
    padding = torch.arange(values.shape[1], device=values.device) >= batch.num_samples[:, None]
    return values.masked_fill_(padding, 0.0)


def _normalisation(waves: list[npt.NDArray[np.int16]]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean, and one over the standard deviation, of each waveform; transformers adds 1e-7 to the variance.

    From sums of integers, which are exact, and take a quarter of the time of numpy's mean() and var().
    """
    means, scales = np.zeros(len(waves)), np.zeros(len(waves))
    for row, wave in enumerate(waves):
        values = wave.astype(np.int32)
        mean = values.sum(dtype=np.int64) / len(values)
        np.multiply(values, values, out=values)  # at most 2 ** 30; a product of vectors would start BLAS's threads
        variance = values.sum(dtype=np.int64) / len(values) - mean * mean
        means[row] = mean / 32768
        scales[row] = 1 / np.sqrt(variance / 32768**2 + 1e-7)
    return means, scales


def _random_choices(
    settings: BatchSettings, num_frames: npt.NDArray[np.int64], padded_frames: int, seed: int | None
) -> dict[str, torch.Tensor | None]:
    """Masks and kept layers of a unit. Each kind has its own stream: one setting never moves another's draws."""
    choices: dict[str, npt.NDArray[np.bool_] | None] = dict.fromkeys(("time_mask", "feature_mask", "keep_layers"))
    if seed is not None:
        time, feature, layers = (np.random.default_rng([seed, stream]) for stream in range(3))
        if settings.masks is not None:
            choices["time_mask"] = time_mask(time, num_frames, padded_frames, settings.masks)
            choices["feature_mask"] = feature_mask(feature, len(num_frames), settings.hidden_size, settings.masks)
        if settings.layerdrop > 0:
            choices["keep_layers"] = layers.random(settings.num_layers) >= settings.layerdrop
    return {name: None if choice is None else torch.from_numpy(choice) for name, choice in choices.items()}
