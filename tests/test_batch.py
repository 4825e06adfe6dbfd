"""Batches: waveforms as the feature extractor makes them, masks as transformers draws them, by the unit's seed."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import Utterances, batch_of, unit
from transformers import Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from asr_train.data.batch import BatchSettings, input_values, make_batch
from asr_train.data.spec_augment import MaskSettings, feature_mask, time_mask
from asr_train.geometry import WAV2VEC2

MASKS = MaskSettings(
    time_prob=0.5, time_length=5, time_min_masks=2, feature_prob=0.25, feature_length=4, feature_min_masks=0
)
SETTINGS = BatchSettings(geometry=WAV2VEC2, normalize=True, masks=MASKS, hidden_size=32, num_layers=12, layerdrop=0.3)


@pytest.mark.parametrize("normalize", [True, False])
def test_waveforms_equal_the_feature_extractor(normalize):
    lengths = [16000, 400, 9999]
    utterances = Utterances(lengths)
    utterances.waves[2] = (utterances.waves[2] // 500 + 1000).astype(np.int16)  # quiet, with an offset
    batch = make_batch(utterances, unit([0, 1, 2], 16500), replace(SETTINGS, normalize=normalize), None)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=True)
    raw = [wave.astype(np.float32) / 32768 for wave in utterances.waves]
    expected = extractor(
        raw, sampling_rate=16000, padding="max_length", max_length=16500, return_tensors="pt"
    ).input_values
    found = input_values(batch)
    assert found.shape == (3, 16500)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (found[1, 400:] == 0).all()


def test_silence_is_taken_as_it_is():
    utterances = Utterances([2000])
    utterances.waves[0][:] = 0
    found = input_values(make_batch(utterances, unit([0], 2000), SETTINGS, None))
    assert (found == 0).all()


def test_what_a_batch_holds():
    utterances = Utterances([9000, 5000, 7000])
    batch = make_batch(utterances, unit([2, 0], 9280), SETTINGS, 7)
    assert batch.ids.tolist() == [2, 0]
    assert batch.num_samples.tolist() == [7000, 9000]
    assert batch.num_frames.tolist() == [WAV2VEC2.num_frames(7000), WAV2VEC2.num_frames(9000)]
    assert batch.waveforms.dtype == torch.int16
    assert batch.waveforms[0, :7000].tolist() == utterances.waves[2].tolist()
    texts = batch.labels.split(batch.num_labels.tolist())
    assert [text.tolist() for text in texts] == [utterances.texts[2].tolist(), utterances.texts[0].tolist()]
    assert batch.time_mask.shape == (2, WAV2VEC2.num_frames(9280))
    assert batch.feature_mask.shape == (2, 32)
    assert batch.keep_layers.shape == (12,)


def test_a_waveform_too_short_for_a_frame_still_makes_a_batch():
    batch = batch_of([100], SETTINGS, seed=3)
    assert batch.num_frames.tolist() == [0]
    assert batch.time_mask.shape == (1, 0)


def test_random_choices_belong_to_the_seed():
    first, again, other = (batch_of([16000, 12000], SETTINGS, seed) for seed in (5, 5, 6))
    for name in ("time_mask", "feature_mask", "keep_layers"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.time_mask, other.time_mask)
    assert not torch.equal(first.feature_mask, other.feature_mask)
    without_time = replace(SETTINGS, masks=replace(MASKS, time_prob=0.0))
    unmoved = batch_of([16000, 12000], without_time, 5)
    assert unmoved.time_mask is None
    assert torch.equal(unmoved.feature_mask, first.feature_mask)
    assert torch.equal(unmoved.keep_layers, first.keep_layers)


def test_masks_of_time_and_of_channels_are_drawn_apart():
    masks = replace(MASKS, feature_prob=0.5, feature_length=5, feature_min_masks=2)
    settings = replace(SETTINGS, masks=masks, hidden_size=49)  # as many channels as frames
    batches = [batch_of([16000], settings, seed) for seed in range(10)]
    assert not any(torch.equal(batch.time_mask, batch.feature_mask) for batch in batches)


def test_evaluation_has_no_random_choices():
    batch = batch_of([16000], SETTINGS, None)
    assert (batch.time_mask, batch.feature_mask, batch.keep_layers) == (None, None, None)


def test_layers_are_dropped_as_often_as_asked():
    kept = torch.stack([batch_of([500], SETTINGS, seed).keep_layers for seed in range(1000)]).double()
    deviation = np.sqrt(0.3 * 0.7 / 1000)
    assert (kept.mean(0) - 0.7).abs().max() < 4 * deviation


def test_a_batch_reaches_another_process_and_device_and_keeps_on_the_host_what_the_loss_wants_there():
    batch = batch_of([16000, 12000], SETTINGS, 5)
    copied = pickle.loads(pickle.dumps(batch))
    assert torch.equal(input_values(copied), input_values(batch))
    moved = batch.to("meta")
    assert moved.waveforms.device.type == "meta"
    assert moved.num_samples.device.type == "meta"
    assert {tensor.device.type for tensor in (moved.num_frames, moved.num_labels)} == {"cpu"}


def test_a_unit_whose_utterances_all_reach_its_last_frame_is_not_padded():
    frame, stride = 400, 320  # samples
    full = [frame + 9 * stride, frame + 9 * stride + stride - 1]  # of the same frames
    assert not batch_of(full, SETTINGS).is_padded
    assert batch_of([*full, full[0] - 1], SETTINGS).is_padded
    assert make_batch(Utterances(full), unit([0, 1], max(full) + 1), SETTINGS, None).is_padded


def test_normalisation_is_exact_at_full_scale():
    utterances = Utterances([2_000_000])
    utterances.waves[0][:] = -32768
    utterances.waves[0][::2] = 32767
    batch = make_batch(utterances, unit([0], 2_000_000), SETTINGS, None)
    wave = utterances.waves[0].astype(np.float64) / 32768
    assert batch.shift.item() == np.float32(wave.mean())
    assert batch.scale.item() == np.float32(1 / np.sqrt(wave.var() + 1e-7))


def test_only_the_waveforms_travel_as_a_tensor():
    """The others would each be a shared file with a connection of its own; see `Batch.__getstate__`."""
    batch = batch_of([16000, 12000], SETTINGS, 5)
    assert [name for name, value in batch.__getstate__().items() if isinstance(value, torch.Tensor)] == ["waveforms"]
    copied = vars(pickle.loads(pickle.dumps(batch)))
    assert list(copied) == list(vars(batch))
    for name, value in vars(batch).items():
        assert type(copied[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            assert copied[name].dtype == value.dtype, name
            assert torch.equal(copied[name], value), name
        else:
            assert np.array_equal(copied[name], value), name


# --- the masks against transformers' ---


def masks_of_both(prob: float, span: int, min_masks: int, lengths: list[int], draws: int):
    """Many masks of ours and of transformers', bool [draws, B, F], padding left out of both."""
    settings = replace(MASKS, time_prob=prob, time_length=span, time_min_masks=min_masks)
    width = max(lengths)
    generator = np.random.default_rng(0)
    ours = np.stack([time_mask(generator, np.array(lengths), width, settings) for _ in range(draws)])
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    np.random.seed(0)
    theirs = np.stack(
        [_compute_mask_indices((len(lengths), width), prob, span, valid.long(), min_masks) for _ in range(draws)]
    )
    return ours, theirs & valid.numpy(), valid.numpy()


@pytest.mark.parametrize(
    ("prob", "span", "min_masks", "lengths"),
    [
        (0.5, 5, 2, [60, 37, 6]),
        (0.05, 10, 2, [80, 30]),
        (0.65, 10, 0, [100, 12]),
        (0.02, 4, 0, [50, 20]),
        (0.05, 10, 4, [30, 25]),
    ],
)
def test_masks_are_distributed_as_in_transformers(prob, span, min_masks, lengths):
    draws = 3000
    ours, theirs, valid = masks_of_both(prob, span, min_masks, lengths, draws)
    assert not (ours & ~valid).any()
    # how often each frame is masked: two samples of a share differ by at most 5 standard deviations of the difference
    share = (ours.mean(0) + theirs.mean(0)) / 2
    deviation = np.sqrt(2 * share * (1 - share) / draws) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / deviation).max() < 5
    # how many frames of a row are masked: mean, and spread
    for row in range(len(lengths)):
        a, b = ours[:, row].sum(-1), theirs[:, row].sum(-1)
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt((a.var() + b.var()) / draws) + 1e-9
        assert a.std() == pytest.approx(b.std(), rel=0.1, abs=0.05)
    # rows of a batch are rounded by one draw
    if len(lengths) > 1 and ours[:, 0].std() > 0:
        together = [np.corrcoef(side[:, 0].sum(-1), side[:, 1].sum(-1))[0, 1] for side in (ours, theirs)]
        assert together[0] == pytest.approx(together[1], abs=0.1, nan_ok=True)


def test_channels_are_masked_as_in_transformers():
    draws = 3000
    generator = np.random.default_rng(0)
    ours = np.stack([feature_mask(generator, 2, 32, MASKS) for _ in range(draws)])
    np.random.seed(0)
    theirs = np.stack([_compute_mask_indices((2, 32), 0.25, 4) for _ in range(draws)])
    deviation = np.sqrt(2 * theirs.mean(0) * (1 - theirs.mean(0)) / draws)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) / deviation).max() < 5


@pytest.mark.parametrize("min_masks", [0, 2])
def test_fewer_frames_than_a_span_are_left_unmasked(min_masks):
    settings = replace(MASKS, time_length=10, time_min_masks=min_masks)
    mask = time_mask(np.random.default_rng(0), np.array([9, 0, 1]), 9, settings)
    assert mask.shape == (3, 9)
    assert not mask.any()


def test_spans_of_one_frame_and_of_all_frames():
    generator = np.random.default_rng(0)
    all_frames = time_mask(generator, np.array([10]), 10, replace(MASKS, time_length=10, time_min_masks=1))
    assert all_frames.all()
    single = time_mask(generator, np.array([10]), 10, replace(MASKS, time_prob=1.0, time_length=1))
    assert single.all()
