"""The built-in demo corpus: spoken banking requests, synthesised here, in three sets.

`train` and `heldout_sentences` share their voices and no sentence; `heldout_voices` has sentences and voices of its
own. A hash of the sentence says which set it may be in, so that no sentence is ever in two. The sentences are made
of the same words and phrases (see `demo_grammar`): the demo shows new sentences of a narrow domain, not open speech.
The speech is eSpeak NG's, from the wheel `espeakng-loader`; every row is a function of its numbers alone.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import soxr

from asr_train.data.demo_grammar import PATTERNS, digest, sentences
from asr_train.errors import CorpusError
from asr_train.geometry import SAMPLE_RATE

Split = Literal["train", "heldout_sentences", "heldout_voices"]

NUM_ROWS: Final[dict[Split, int]] = {"train": 4000, "heldout_sentences": 420, "heldout_voices": 420}
_MAX_TRIES = 20_000  # in a row without a new sentence: an intent has run out of them
_SEED = "wavefleet demo 1"
_HELDOUT_SHARES: Final[dict[Split, range]] = {"heldout_sentences": range(10), "heldout_voices": range(10, 20)}  # of 100

# Accent, then the variants that speak with it: of eSpeak NG's about 100 variants, ones that people understand and
# that differ in spectrum (robots, whispers and near copies are left out).
_TRAIN_VARIANTS = {
    "en-US": ("m1", "f2", "Alex", "Mario", "adam", "linda", "Gene", "f5", "boris", "croak"),
    "en": ("m2", "f1", "m6", "benjamin", "ed", "belinda", "klatt3", "max", "Diogo", "Denis"),
    "en-GB-x-rp": ("m3", "f4", "pablo", "michel", "grandma", "john"),
    "en-GB-scotland": ("m8", "aunty", "paul", "edward", "grandpa"),
}
_HELDOUT_VARIANTS = {
    "en-US": ("m7", "Annie", "klatt5"),
    "en": ("f3", "Michael"),
    "en-GB-x-rp": ("robert",),
    "en-GB-scotland": ("m5", "victor"),
}
TRAIN_VOICES = tuple(f"gmw/{accent}+{variant}" for accent, names in _TRAIN_VARIANTS.items() for variant in names)
HELDOUT_VOICES = tuple(f"gmw/{accent}+{variant}" for accent, names in _HELDOUT_VARIANTS.items() for variant in names)

_WORDS_PER_MINUTE = (165, 225)
_PITCH = (30, 70)  # of 0..99, 50 is the voice's own
_SNR_DB = (15.0, 40.0)
_EDGE_S = (0.04, 0.15)  # silence before and after


@dataclass(frozen=True)
class DemoRow:
    """One utterance of the demo corpus, not spoken yet."""

    id: str
    text: str
    voice: str  # an eSpeak NG voice and its variant
    words_per_minute: int
    pitch: int  # 0..99
    noise_seed: int
    snr_db: float

    def synthesise(self) -> npt.NDArray[np.int16]:
        """The utterance, [samples], mono, 16 kHz; the same samples at every call, in every process.

        Raises:
            CorpusError: the wheel espeakng-loader is not installed, or does not know the voice.
        """
        spoken = _speak(self.text, self.voice, self.words_per_minute, self.pitch)
        return _record(spoken, self.noise_seed, self.snr_db)


@cache
def demo_rows(split: Split) -> Sequence[DemoRow]:
    """The rows of one set, in a fixed order, the intents in turn.

    Raises:
        KeyError: no such set.
        CorpusError: an intent has no new sentences left for so many rows.
    """
    voices = HELDOUT_VOICES if split == "heldout_voices" else TRAIN_VOICES
    streams = {intent: sentences(intent, f"{_SEED}/{split}") for intent in PATTERNS}
    said: set[str] = set()
    rows: list[DemoRow] = []
    for number in range(NUM_ROWS[split]):
        intent = list(PATTERNS)[number % len(PATTERNS)]
        tries = islice(streams[intent], _MAX_TRIES)
        text = next((text for text in tries if split_of(text) == split and text not in said), None)
        if text is None:
            raise CorpusError(
                f"demo, {split}: the intent {intent!r} has no new sentence for row {number} of {NUM_ROWS[split]}:"
                " ask for fewer rows, or add phrases to demo_grammar.PATTERNS"
            )
        said.add(text)
        rows.append(_row(split, number, intent, text, voices))
    return tuple(rows)


def split_of(text: str) -> Split:
    """The only set that a sentence may be in."""
    share = digest(f"{_SEED}/set/{text}") % 100
    return next((split for split, shares in _HELDOUT_SHARES.items() if share in shares), "train")


def _row(split: Split, number: int, intent: str, text: str, voices: Sequence[str]) -> DemoRow:
    """Choose how a sentence is spoken: voices in turn, the rest by hash."""
    keys = (f"{_SEED}/{split}/{number}/{part}" for part in count())

    def between(low: float, high: float) -> float:
        return low + (high - low) * digest(next(keys)) / 2**64

    return DemoRow(
        id=f"{split}-{number:05d}-{intent}",
        text=text,
        voice=voices[digest(next(keys)) % len(voices)],
        words_per_minute=round(between(*_WORDS_PER_MINUTE)),
        pitch=round(between(*_PITCH)),
        noise_seed=digest(next(keys)),
        snr_db=round(between(*_SNR_DB), 1),
    )


def _record(spoken: npt.NDArray[np.float32], noise_seed: int, snr_db: float) -> npt.NDArray[np.int16]:
    """Speech as a microphone might give it: edges of silence, coloured noise, some level. Full scale is 1."""
    generator = np.random.Generator(np.random.Philox(noise_seed))
    edges = (generator.uniform(*_EDGE_S, size=2) * SAMPLE_RATE).astype(int)
    speech = np.pad(spoken, tuple(edges.tolist()))
    noise = generator.standard_normal(len(speech) + 1).astype(np.float32)
    noise = noise[1:] + generator.uniform(-0.9, 0.9) * noise[:-1]  # from hiss to rumble
    noise *= speech.std() / noise.std() * 10 ** (-snr_db / 20)
    mixed = speech + noise
    mixed *= generator.uniform(0.2, 0.9) / np.abs(mixed).max()
    return (mixed * 32767).astype(np.int16)


# --- eSpeak NG --------------------------------------------------------------------------------------------------
# Names and numbers of speak_lib.h, https://github.com/espeak-ng/espeak-ng/blob/1.52.0/src/include/espeak-ng/speak_lib.h

_RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL: samples go to the callback, which a thread of the library's own calls
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: a folder without its data is no reason to end this process
_POS_CHARACTER, _CHARS_UTF8 = 1, 1
_RATE, _VOLUME, _PITCH_PARAMETER = 1, 2, 3
_QUIETER = 60  # of 100: at 100 many variants clip
_AUDIBLE = 0.01  # of full scale; what is quieter at both ends is cut off
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _speak(text: str, voice: str, words_per_minute: int, pitch: int) -> npt.NDArray[np.float32]:
    """Synthesise one text: [samples] at 16 kHz, full scale 1, without silence at its ends.

    The library is loaded anew for each text (1 ms): it keeps the phase of its pitch flutter from one text to the
    next, even over espeak_Terminate, and an utterance would depend on what was said before it. It also starts a
    thread each time, which only espeak_Terminate ends; if the library went first, that thread would wake up in
    memory that is no longer mapped, or is another's, and kill the process some time later.
    """
    chunks: list[npt.NDArray[np.int16]] = []

    def collect(samples: Any, num_samples: int, _events: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    library_path, data_path = _espeak_paths()
    callback = _Callback(collect)  # referred to as long as the library may call it
    library = ctypes.CDLL(library_path)
    try:
        rate_hz = library.espeak_Initialize(_RETRIEVAL, 0, data_path.encode(), _DONT_EXIT)
        if rate_hz <= 0:
            raise CorpusError(f"eSpeak NG cannot use its data in {data_path}; reinstall it: {_INSTALL}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of breath noise; the default is the time of day
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise CorpusError(f"eSpeak NG in {data_path} has no voice {voice!r}; reinstall it: {_INSTALL}")
        for parameter, value in ((_RATE, words_per_minute), (_VOLUME, _QUIETER), (_PITCH_PARAMETER, pitch)):
            library.espeak_SetParameter(parameter, value, 0)
        data = text.encode() + b"\0"
        library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))
    samples = np.concatenate(chunks).astype(np.float32) / 32768
    audible = np.flatnonzero(np.abs(samples) > _AUDIBLE)
    spoken = soxr.resample(samples[audible[0] : audible[-1] + 1], rate_hz, SAMPLE_RATE, quality="HQ")
    return np.asarray(spoken, dtype=np.float32)


_INSTALL = "pip install 'wavefleet[demo]'"


def _espeak_paths() -> tuple[str, str]:
    """The shared library and its data folder."""
    try:
        import espeakng_loader  # noqa: PLC0415 - an extra; only the demo needs it
    except ImportError:
        raise CorpusError(
            f"the demo corpus is synthesised by eSpeak NG, which is not installed here: {_INSTALL}"
        ) from None
    return str(espeakng_loader.get_library_path()), str(espeakng_loader.get_data_path())
