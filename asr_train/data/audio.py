"""Audio in: any file or bytes that libsndfile reads, to mono 16 kHz. Decoding by soundfile, resampling by soxr HQ."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from asr_train.errors import CorpusError
from asr_train.geometry import SAMPLE_RATE

_FULL_SCALE = (
    32768  # of int16; soundfile reads a 16-bit sample s as s / 32768, so 16-bit audio at 16 kHz is kept exactly
)
_SILENCE_SPAN = 6  # +-3 of 32768, -80 dBFS: dithered digital silence
_STREAMED_SIZE = 0x7FFF_0000  # programs that write WAV to a pipe put a size at or over this into the header
_MP3_MISSING_S, _MP3_MISSING_SHARE = 0.25, 0.02  # without a Xing header mpg123 only estimates a length
MISSING_FILE = "missing file"  # a refusal that may be mended while a corpus is being prepared
OUTSIDE = "path outside its root"
_SEGMENT_SLACK_S = 0.1  # manifests round their durations


class AudioError(CorpusError):
    """A row's audio cannot be used; `reason` is one of a few fixed phrases, `value` says what was found."""

    def __init__(self, reason: str, value: str) -> None:
        self.reason = reason
        self.value = value
        super().__init__(f"{reason}: {value}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return AudioError, (self.reason, self.value)


def decode(
    audio: Path | bytes, offset_s: float | None = None, duration_s: float | None = None
) -> npt.NDArray[np.int16]:
    """Mono 16 kHz samples of a file, of a file's bytes, or of a segment of it.

    Without `offset_s`, a `duration_s` that differs from the file's by rounding only is the whole file.

    Returns:
        int16 [num_samples], num_samples >= 1.

    Raises:
        AudioError: missing file, unreadable audio, truncated audio, no samples, NaN.
    """
    return to_int16(_mono_16k(audio, offset_s, duration_s))


def load_audio(path: Path) -> npt.NDArray[np.float32]:
    """Mono 16 kHz samples of a file, float32 [num_samples] in -1..1.

    Raises:
        AudioError: as `decode`.
    """
    return _mono_16k(path, None, None)


def to_int16(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Round to 16 bits; what lies outside -1..1 is clipped."""
    return np.clip(np.rint(waveform * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def is_silent(waveform: npt.NDArray[np.int16]) -> bool:
    """Whether nothing can be heard: no sample over -80 dBFS once a constant offset is taken away."""
    return int(waveform.max()) - int(waveform.min()) <= _SILENCE_SPAN


def to_flac(waveform: npt.NDArray[np.int16]) -> bytes:
    """FLAC bytes of 16 kHz samples; lossless."""
    stream = io.BytesIO()
    soundfile.write(stream, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def from_flac(data: bytes | memoryview) -> npt.NDArray[np.int16]:
    """The samples that `to_flac` was given."""
    waveform: npt.NDArray[np.int16] = soundfile.read(io.BytesIO(data), dtype="int16")[0]
    return waveform


def _mono_16k(audio: Path | bytes, offset_s: float | None, duration_s: float | None) -> npt.NDArray[np.float32]:
    channels, rate = _read(audio, offset_s, duration_s)  # [num_samples, num_channels]
    if not len(channels):
        raise AudioError("no samples", "0 samples")
    if not np.isfinite(channels).all():
        raise AudioError("NaN", f"{int((~np.isfinite(channels)).sum())} samples are NaN or infinite")
    mono = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1, dtype=np.float32)
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(mono)
    resampled: npt.NDArray[np.float32] = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    if not len(resampled):
        raise AudioError("no samples", f"{len(mono)} samples at {rate} Hz")
    return resampled


def _read(audio: Path | bytes, offset_s: float | None, duration_s: float | None) -> tuple[npt.NDArray[np.float32], int]:
    """Decoded samples, float32 [num_samples, num_channels], and their rate."""
    try:
        if isinstance(audio, Path) and not audio.is_file():
            raise AudioError(MISSING_FILE, str(audio))
        with audio.open("rb") if isinstance(audio, Path) else io.BytesIO(audio) as stream:
            if cut := _cut_short(stream):
                raise AudioError("truncated audio", cut)
        with soundfile.SoundFile(str(audio) if isinstance(audio, Path) else io.BytesIO(audio)) as file:
            start, stop = _segment(file, offset_s, duration_s)
            if start:
                file.seek(start)
            samples: npt.NDArray[np.float32] = file.read(stop - start, dtype="float32", always_2d=True)
            _check_length(file, stop - start, len(samples))
            return samples, int(file.samplerate)
    except (soundfile.LibsndfileError, OSError) as error:
        found = getattr(error, "strerror", None) or str(error).rpartition(": ")[2] or type(error).__name__
        reason = "truncated audio" if "lost sync" in found else "unreadable audio"  # libsndfile's words for a cut FLAC
        raise AudioError(reason, found) from None


def _segment(file: soundfile.SoundFile, offset_s: float | None, duration_s: float | None) -> tuple[int, int]:
    """First and last sample to read, in the file's own rate."""
    length = int(file.frames)
    start = round((offset_s or 0.0) * file.samplerate)
    if duration_s is None:
        stop = max(length, start)
    else:
        stop = start + round(duration_s * file.samplerate)
        slack = round(_SEGMENT_SLACK_S * file.samplerate)
        if offset_s is None and abs(stop - length) <= slack:
            stop = length
        if stop > length + slack:
            found = f"{length / file.samplerate:.2f} s, the manifest says {stop / file.samplerate:.2f} s"
            raise AudioError("truncated audio", found)
    return min(start, length), min(stop, length)


def _check_length(file: soundfile.SoundFile, expected: int, found: int) -> None:
    """Compare what was decoded with what the file's header promised."""
    missing = expected - found
    if file.format == "MP3" and missing <= max(_MP3_MISSING_S * file.samplerate, _MP3_MISSING_SHARE * expected):
        return
    if missing > 0:
        raise AudioError("truncated audio", f"{found} of {expected} samples")


def _cut_short(stream: BinaryIO) -> str | None:
    """How a WAV, Ogg or MP3 file ends too early, which libsndfile passes over in silence; None when it does not."""
    head = stream.read(12)
    size = stream.seek(0, io.SEEK_END)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return _cut_wav(stream, size)
    if head[:4] == b"OggS":
        return _cut_ogg(stream, size)
    return _cut_mp3(stream, size) if head[:3] == b"ID3" or head[:1] == b"\xff" else None


def _cut_wav(stream: BinaryIO, size: int) -> str | None:
    """Compare the size of the data chunk with the bytes that follow (RIFF: id, size, body padded to even)."""
    position = 12
    while position + 8 <= size:
        stream.seek(position)
        name, length = stream.read(4), int.from_bytes(stream.read(4), "little")
        if name == b"data":
            found = size - position - 8
            whole = found >= length or length >= _STREAMED_SIZE
            return None if whole else f"{found} of {length} bytes"
        position += 8 + length + length % 2
    return None


def _cut_mp3(stream: BinaryIO, size: int) -> str | None:
    """Compare the byte count of a Xing or Info header, where the encoder wrote one, with the bytes there are."""
    stream.seek(0)
    head = stream.read(10)
    start = 0
    if head[:3] == b"ID3":  # its size has 7 bits a byte
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=False))
    stream.seek(start)
    frame = stream.read(200)
    position = max(frame.find(b"Xing"), frame.find(b"Info"))
    if position < 0 or len(frame) < position + 16:
        return None
    flags = int.from_bytes(frame[position + 4 : position + 8])
    if flags & 3 != 3:  # no frame count and byte count
        return None
    num_frames, length = int.from_bytes(frame[position + 8 : position + 12]), int.from_bytes(frame[position + 12 :][:4])
    found = size - start
    one_frame = length // max(1, num_frames)  # some encoders count the header's own frame, some do not
    return f"{found} of {length} bytes" if found < length - one_frame else None


def _cut_ogg(stream: BinaryIO, size: int) -> str | None:
    """Compare the last page's segment table with the bytes that follow (RFC 3533, section 6)."""
    start = max(0, size - 65_307)  # the longest page
    stream.seek(start)
    tail = stream.read()
    page = tail.rfind(b"OggS")
    if page < 0:
        return "no page in the last 65,307 bytes"
    table = tail[page + 27 : page + 27 + tail[page + 26]] if len(tail) > page + 26 else b""
    length = 27 + len(table) + sum(table) if table else 28
    found = len(tail) - page
    return f"the last page has {found} of {length} bytes" if found < length else None
