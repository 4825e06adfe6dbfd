import io

import numpy as np
import pytest
import soundfile
from conftest import RATE, encoded

from asr_train.data.audio import AudioError, decode, from_flac, is_silent, load_audio, to_flac

FORMS = {
    "wav": ("WAV", "PCM_16", 1e-4),
    "wav24": ("WAV", "PCM_24", 1e-4),
    "wav-float": ("WAV", "FLOAT", 1e-4),
    "wav-u8": ("WAV", "PCM_U8", 0.01),
    "mu-law": ("WAV", "ULAW", 0.02),
    "flac": ("FLAC", "PCM_16", 1e-4),
    "mp3": ("MP3", None, 0.02),
    "vorbis": ("OGG", "VORBIS", 0.05),
    "opus": ("OGG", "OPUS", 0.05),
}


def tone(hz, seconds=1.0, rate=RATE, level=0.5):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def spectrum_peak_hz(waveform):
    windowed = waveform * np.hanning(len(waveform))
    return np.argmax(np.abs(np.fft.rfft(windowed))) * RATE / len(waveform)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_any_format_rate_and_channel_count_gives_the_same_sound(form, rate, num_channels):
    container, subtype, tolerance = FORMS[form]
    mono = tone(440, rate=rate)
    data = encoded(np.stack([mono] * num_channels, axis=1), rate, container, subtype)
    waveform = decode(data)
    assert waveform.dtype == np.int16
    assert abs(len(waveform) - RATE) <= RATE * 0.02
    middle = waveform[4_000:12_000] / 32768
    assert abs(spectrum_peak_hz(middle) - 440) <= 2
    assert abs(np.sqrt(2 * np.mean(middle**2)) - 0.5) <= tolerance + 0.005


def test_16_bit_audio_at_16_khz_is_kept_exactly(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 5_000).astype(np.int16)
    for form in ("WAV", "FLAC"):
        data = encoded(samples, form=form, subtype="PCM_16")
        assert np.array_equal(decode(data), samples)
    (tmp_path / "a.wav").write_bytes(data)
    assert np.array_equal(decode(tmp_path / "a.wav"), samples)
    assert np.array_equal(load_audio(tmp_path / "a.wav"), samples.astype(np.float32) / 32768)
    assert np.array_equal(from_flac(to_flac(samples)), samples)


def test_channels_are_averaged():
    left, right = tone(300, level=0.4), tone(300, level=0.2)
    waveform = decode(encoded(np.stack([left, right], axis=1)))
    assert np.abs(waveform / 32768 - 0.75 * left).max() < 1e-4


def test_float_audio_over_full_scale_is_clipped():
    waveform = decode(encoded(np.array([2.0, -2.0, 0.5], np.float32), subtype="FLOAT"))
    assert waveform.tolist() == [32767, -32768, 16384]


def test_resampling_does_not_alias():
    """A tone over the new Nyquist frequency must vanish, to under -90 dB; linear interpolation would keep it."""
    waveform = decode(encoded(tone(11_000, rate=44_100), 44_100, subtype="FLOAT"))
    assert np.abs(waveform[1_000:-1_000]).max() <= 1


@pytest.mark.parametrize("form", ["wav", "flac", "vorbis", "opus", "mp3"])
@pytest.mark.parametrize("share", [0.95, 0.5])
def test_a_truncated_file_is_refused(form, share):
    container, subtype, _ = FORMS[form]
    noise = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32) * 0.1
    data = encoded(noise, form=container, subtype=subtype)
    with pytest.raises(AudioError) as caught:
        decode(data[: int(len(data) * share)])
    assert caught.value.reason in ("truncated audio", "unreadable audio")
    assert caught.value.reason == "truncated audio" or form == "opus" or form == "vorbis"


def test_a_wav_written_to_a_pipe_is_whole():
    """Programs that cannot seek back leave the largest size in the header."""
    data = bytearray(encoded(tone(300)))
    position = data.index(b"data") + 4
    data[position : position + 4] = b"\xff\xff\xff\xff"
    assert len(decode(bytes(data))) == RATE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable audio"),
        (b"not audio at all" * 10, "unreadable audio"),
        (encoded(np.zeros(0, np.float32)), "no samples"),
        (encoded(np.array([0.1, np.nan, 0.2], np.float32), subtype="FLOAT"), "NaN"),
        (encoded(np.array([0.1, np.inf, 0.2], np.float32), subtype="FLOAT"), "NaN"),
    ],
)
def test_unusable_audio_is_refused_with_its_reason(data, reason):
    with pytest.raises(AudioError) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AudioError) as caught:
        decode(tmp_path / "gone.wav")
    assert (caught.value.reason, caught.value.value) == ("missing file", str(tmp_path / "gone.wav"))


@pytest.mark.parametrize("form", ["wav", "flac", "mp3", "vorbis"])
def test_a_segment_is_cut_out(form):
    container, subtype, _ = FORMS[form]
    waveform = np.concatenate([tone(300), tone(600), tone(900)])
    segment = decode(encoded(waveform, form=container, subtype=subtype), offset_s=1.1, duration_s=0.8)
    assert len(segment) == round(0.8 * RATE)
    assert abs(spectrum_peak_hz(segment) - 600) <= 3


def test_durations_of_a_manifest():
    data = encoded(tone(300, 2.0))
    assert len(decode(data, duration_s=1.96)) == 2 * RATE  # rounded in the manifest
    assert len(decode(data, duration_s=1.0)) == RATE  # a segment from the start
    with pytest.raises(AudioError, match="truncated audio"):
        decode(data, duration_s=3.0)
    with pytest.raises(AudioError, match="truncated audio"):
        decode(data, offset_s=1.5, duration_s=1.0)
    assert len(decode(data, offset_s=1.5)) == RATE // 2


def test_silence():
    dither = np.random.default_rng(0).integers(-2, 3, RATE).astype(np.int16)
    assert is_silent(dither)
    assert is_silent(np.full(100, 500, np.int16))  # a constant offset cannot be heard
    assert not is_silent(decode(encoded(tone(300, level=0.001))))


def test_headers_of_every_length_end_in_our_error():
    for form in ("WAV", "FLAC", "OGG"):
        data = encoded(tone(300, 0.3), form=form)
        for length in (*range(0, 120, 7), len(data) // 2):
            try:
                decode(data[:length])
            except AudioError as error:
                assert error.reason in ("truncated audio", "unreadable audio", "no samples")


def test_soundfile_agrees_on_the_sample_count():
    data = encoded(tone(300, 0.7), form="FLAC")
    assert len(decode(data)) == soundfile.info(io.BytesIO(data)).frames
