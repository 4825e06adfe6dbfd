"""Frames of a waveform, and the frames that a text needs."""

from itertools import groupby, product

import numpy as np
import pytest
import torch

from asr_train.geometry import SAMPLE_RATE, WAV2VEC2, FrameGeometry, ctc_min_frames

torch.set_num_threads(1)


def frames_by_convolution(geometry: FrameGeometry, num_samples: int) -> int:
    wave = torch.zeros(1, 1, num_samples)
    for kernel, stride in zip(geometry.kernels, geometry.strides, strict=True):
        wave = torch.nn.functional.conv1d(wave, torch.zeros(1, 1, kernel), stride=stride)
    return wave.shape[-1]


@pytest.mark.parametrize("geometry", [WAV2VEC2, FrameGeometry(kernels=(7, 4, 3), strides=(3, 5, 2))])
def test_frames_are_those_of_the_convolutions(geometry):
    shortest = geometry.receptive_samples
    for num_samples in [*range(shortest, shortest + 60), 16_000, 16_001, 99_999]:
        assert geometry.num_frames(num_samples) == frames_by_convolution(geometry, num_samples)


def test_wav2vec2_figures_of_the_paper():
    # Baevski et al. 2020, section 4.2: a stride of 20 ms and a receptive field of 25 ms
    assert WAV2VEC2.stride_samples == 0.020 * SAMPLE_RATE
    assert WAV2VEC2.receptive_samples == 0.025 * SAMPLE_RATE
    assert WAV2VEC2.num_frames(SAMPLE_RATE) == 49


def test_a_waveform_too_short_has_no_frame():
    assert [WAV2VEC2.num_frames(n) for n in (0, 1, 399, 400)] == [0, 0, 0, 1]


def test_arrays_and_numbers_agree():
    num_samples = np.random.default_rng(0).integers(0, 500_000, 300)
    frames = WAV2VEC2.num_frames(num_samples)
    assert frames.dtype == np.int64
    assert frames.tolist() == [WAV2VEC2.num_frames(int(n)) for n in num_samples]
    assert type(WAV2VEC2.num_frames(16_000)) is int


def test_layers_without_a_stride_are_refused():
    with pytest.raises(ValueError, match="one of each a layer"):
        FrameGeometry(kernels=(10, 3), strides=(5,))


def can_align(labels: tuple[int, ...], num_frames: int) -> bool:
    """Whether any path of so many frames over blank 0 and labels 1, 2 collapses to the labels."""
    paths = product(range(3), repeat=num_frames)
    return any(tuple(label for label, _ in groupby(path) if label) == labels for path in paths)


@pytest.mark.parametrize("labels", [(), (1,), (1, 2), (1, 1), (1, 1, 1), (1, 1, 2, 2), (1, 2, 1)])
def test_ctc_min_frames_is_the_shortest_that_aligns(labels):
    fewest = ctc_min_frames(labels)
    assert can_align(labels, fewest)
    assert fewest == 0 or not can_align(labels, fewest - 1)
