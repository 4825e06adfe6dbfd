"""The length index: a corpus's utterances in order of rounded length, built once and read memory-mapped."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asr_train.errors import CorpusError
from asr_train.files import atomic_file, read_json, write_json
from asr_train.geometry import SAMPLE_RATE

Ints = npt.NDArray[np.int64]

_LENGTH_QUANTUM = 160  # samples, 10 ms; all rounded lengths are multiples of it
_LENGTH_STEP = 0.005  # from 2 s on, rounded lengths are half a percent apart; the plan merges them further
_CHUNK = 1 << 22  # utterances sorted at once, so that building needs little memory beside the index
_FORMAT = 1
_MAX_BINS = 24  # of the histogram
_BIN_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_ARRAYS = ("order", "lengths", "starts", "samples")


def rounded_lengths(longest: int) -> Ints:
    """The lengths, in samples, that utterances of up to `longest` are rounded up to: the same for all corpora."""
    lengths = [_LENGTH_QUANTUM]
    while lengths[-1] < longest:
        wanted = int(lengths[-1] * (1 + _LENGTH_STEP))
        lengths.append(max(lengths[-1] + _LENGTH_QUANTUM, -(-wanted // _LENGTH_QUANTUM) * _LENGTH_QUANTUM))
    return np.array(lengths, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthIndex:
    """Utterances by rounded length.

    Utterances of `lengths[j]` are `order[starts[j]:starts[j + 1]]`, ascending, and hold `samples[j]` samples in all.
    """

    order: npt.NDArray[np.integer[Any]]  # [num_utterances]
    lengths: Ints  # [L], samples, ascending; every one has utterances
    starts: Ints  # [L + 1]
    samples: Ints  # [L], true samples in all
    hash: str
    path: Path | None = None  # where it is memory-mapped from

    @property
    def num_utterances(self) -> int:
        """Number of utterances."""
        return len(self.order)

    @classmethod
    def build(cls, num_samples: npt.NDArray[np.integer[Any]]) -> "LengthIndex":
        """Sort utterances by rounded length.

        Args:
            num_samples: samples of each utterance, [num_utterances]; may be memory-mapped.

        Raises:
            CorpusError: there are no utterances.
        """
        if not len(num_samples):
            raise CorpusError("no utterances to plan: the training set is empty")
        lengths = rounded_lengths(int(num_samples.max()))
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(num_samples), _CHUNK)]
        counts, samples = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
        for chunk in chunks:
            length_of = np.searchsorted(lengths, num_samples[chunk])
            counts += np.bincount(length_of, minlength=len(lengths))
            np.add.at(samples, length_of, num_samples[chunk])
        starts = np.concatenate([[0], np.cumsum(counts)])
        narrow = len(num_samples) < 2**31
        order: npt.NDArray[np.integer[Any]] = np.empty(len(num_samples), np.int32 if narrow else np.int64)
        ends = starts[:-1].copy()  # where the next utterance of each length goes
        for chunk in chunks:
            length_of = np.searchsorted(lengths, num_samples[chunk]).astype(np.uint16)
            by_length = np.argsort(length_of, kind="stable")
            found = np.bincount(length_of, minlength=len(lengths))
            before = np.cumsum(found) - found
            order[np.arange(len(by_length)) + np.repeat(ends - before, found)] = by_length + chunk.start
            ends += found
        used = counts > 0
        lengths, starts, samples = lengths[used], np.append(starts[:-1][used], starts[-1]), samples[used]
        digest = _hash([order, lengths, starts, samples])
        return cls(order=order, lengths=lengths, starts=starts, samples=samples, hash=digest)

    def save(self, path: Path) -> None:
        """Write the index into a folder; `index.json` comes last, so that a torn one is not taken for whole."""
        path.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            with atomic_file(path / f"{name}.npy") as stream:
                np.save(stream, getattr(self, name), allow_pickle=False)
        about = {"format": _FORMAT, "num_utterances": self.num_utterances, "hash": self.hash}
        write_json(path / "index.json", about)

    @classmethod
    def open(cls, path: Path) -> "LengthIndex":
        """Open a saved index, memory-mapped.

        Raises:
            CorpusError: it is missing, incomplete, or of another format.
        """
        try:
            about = read_json(path / "index.json")
            arrays: dict[str, Any] = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        except (OSError, EOFError, ValueError) as error:
            raise CorpusError(f"length index {path} cannot be read: {error}; prepare the corpus again") from error
        if about["format"] != _FORMAT:
            raise CorpusError(f"length index {path}: format {about['format']}, expected {_FORMAT}: prepare it again")
        if len(arrays["order"]) != about["num_utterances"]:
            raise CorpusError(f"length index {path} is incomplete: prepare the corpus again")
        return cls(hash=about["hash"], path=path, **arrays)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle a memory-mapped index as its path: a copy for each data worker would hold the whole order."""
        if self.path is not None:
            return LengthIndex.open, (self.path,)
        return _from_fields, ({name: getattr(self, name) for name in (*_ARRAYS, "hash")},)


@dataclass(frozen=True)
class LengthBin:
    """Utterances of `from_s` up to, and without, `to_s` seconds."""

    from_s: float
    to_s: float
    num_utterances: int
    audio_s: float


def histogram(num_samples: npt.NDArray[np.integer]) -> tuple[LengthBin, ...]:
    """Utterances by length, in bins of a round width, from nothing to the longest."""
    longest_s = float(num_samples.max()) / SAMPLE_RATE
    width_s = next((width for width in _BIN_S if longest_s / width < _MAX_BINS), longest_s)
    bins = num_samples // round(width_s * SAMPLE_RATE)
    counts, samples = np.bincount(bins), np.bincount(bins, weights=num_samples)
    return tuple(
        LengthBin(round(number * width_s, 3), round((number + 1) * width_s, 3), int(count), float(held) / SAMPLE_RATE)
        for number, (count, held) in enumerate(zip(counts, samples, strict=True))
    )


def _from_fields(fields: dict[str, Any]) -> LengthIndex:
    return LengthIndex(**fields)


def _hash(arrays: list[npt.NDArray[np.integer[Any]]]) -> str:
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
