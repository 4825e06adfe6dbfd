"""How many frames a waveform gives, and how many a text needs: the arithmetic between samples, frames and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import overload

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class FrameGeometry:
    """The stack of unpadded convolutions that turns samples into frames: kernel and stride of each, first to last."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.kernels or len(self.kernels) != len(self.strides) or min(self.kernels + self.strides) < 1:
            raise ValueError(
                f"kernels {self.kernels} and strides {self.strides}: expected one of each a layer, all >= 1"
            )

    @overload
    def num_frames(self, num_samples: int) -> int: ...

    @overload
    def num_frames(self, num_samples: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]: ...

    def num_frames(self, num_samples: int | npt.NDArray[np.integer]) -> int | npt.NDArray[np.int64]:
        """Frames of waveforms of so many samples; 0 where a waveform is shorter than `receptive_samples`.

        Each layer gives floor((n - kernel) / stride) + 1, as torch's Conv1d does without padding.
        """
        length = np.asarray(num_samples, dtype=np.int64)
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            length = np.maximum((length - kernel) // stride + 1, 0)
        return int(length) if isinstance(num_samples, int) else length

    @property
    def stride_samples(self) -> int:
        """Samples from one frame to the next."""
        return prod(self.strides)

    @property
    def receptive_samples(self) -> int:
        """Samples that one frame sees: the shortest waveform that has a frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


# conv_kernel and conv_stride of every wav2vec2, hubert, wavlm, unispeech and data2vec-audio config
WAV2VEC2 = FrameGeometry(kernels=(10, 3, 3, 3, 3, 2, 2), strides=(5, 2, 2, 2, 2, 2, 2))


def ctc_min_frames(labels: Sequence[int]) -> int:
    """Fewest frames that CTC can align to these labels: one each, and a blank between adjacent equal ones."""
    return len(labels) + sum(first == second for first, second in pairwise(labels))
