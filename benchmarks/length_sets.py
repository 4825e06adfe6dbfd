"""Lengths of made-up corpora, with the shapes that real ones have: what batching is measured on, without any audio.

Each set is a formula and a seed, made in blocks that have random generators of their own: a set of N utterances is the
beginning of every larger one, and a billion of them need no more memory than a block.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from asr_train.geometry import SAMPLE_RATE

Samples = npt.NDArray[np.int32]

_BLOCK = 1 << 20  # utterances a generator


def _librispeech_like(random: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Read chapters, cut into utterances at about 16 s: a steep end there, and 30 % anywhere from 1.5 s on."""
    cut = 16.3 - random.gamma(2.0, 0.9, size)
    shorter = random.uniform(1.5, 14.5, size)
    return np.clip(np.where(random.random(size) < 0.7, cut, shorter), 1.3, 35)


def _common_voice_like(random: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Single sentences read aloud: log-normal around 4.8 s, 1 to 15 s."""
    return np.clip(random.lognormal(np.log(4.8), 0.36, size), 1, 15)


def _long_tailed(random: np.random.Generator, size: int) -> npt.NDArray[np.float64]:
    """Turns of conversations and lectures: log-normal around 6 s with a long tail, 1 to 30 s."""
    return np.clip(random.lognormal(np.log(6), 0.8, size), 1, 30)


LENGTH_SETS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "LibriSpeech-like": _librispeech_like,
    "Common-Voice-like": _common_voice_like,
    "long tail, 1-30 s": _long_tailed,
}


def length_blocks(name: str, num_utterances: int) -> Iterator[Samples]:
    """The samples of each utterance of a set, at 16 kHz, block after block."""
    seed = list(LENGTH_SETS).index(name)
    for number, start in enumerate(range(0, num_utterances, _BLOCK)):
        seconds = LENGTH_SETS[name](np.random.default_rng((seed, number)), _BLOCK)[: num_utterances - start]
        yield np.rint(seconds * SAMPLE_RATE).astype(np.int32)


def length_set(name: str, num_utterances: int) -> Samples:
    """All samples of a set at once, [num_utterances]."""
    return np.concatenate(list(length_blocks(name, num_utterances)))
