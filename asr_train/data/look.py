"""A look at data before anything is prepared: how much, how long, which rates, which script; headers of a sample."""

import io
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import soundfile

from asr_train.config import HubSource, TableSource
from asr_train.data.audio import AudioError
from asr_train.data.rows import AudioRef, BytesAudio, FileAudio, Listing, NoAudio, SourceError, SpokenAudio
from asr_train.data.sources import AnySource, open_source
from asr_train.data.tables import TableAudio
from asr_train.data.text import APOSTROPHES
from asr_train.geometry import SAMPLE_RATE

NUM_SAMPLED: Final = 200
_BLOCKS: Final = 4  # that a sample consists of: a table's audio is read by row groups
_MAX_TEXTS: Final = 50_000
_JOINERS: Final = "\u200c\u200d"  # which Persian and Indic scripts spell with


@dataclass(frozen=True, kw_only=True)
class AudioHeader:
    """What the header of an audio file says; of a segment, the segment's duration."""

    rate_hz: int
    channels: int
    duration_s: float
    format: str


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What transcripts are made of.

    Attributes:
        num_texts: that were looked at.
        characters: how often each occurs.
        scripts: letters by script, by Unicode's names: LATIN, ARABIC, CJK.
        case: of letters that have one: both, upper, lower, or none have.
        examples: a few of them.
    """

    num_texts: int
    characters: Counter[str]
    scripts: Counter[str]
    case: str
    examples: tuple[str, ...]

    @property
    def letters(self) -> set[str]:
        """Letters and marks, in lower case."""
        return {
            character for character in "".join(self.characters).lower() if unicodedata.category(character)[0] in "LM"
        }

    @property
    def signs(self) -> str:
        """Punctuation and symbols, and characters that cannot be seen, most frequent first; apostrophes not."""
        return "".join(key for key, _ in self.characters.most_common() if _is_sign(key))

    @property
    def has_digits(self) -> bool:
        """Whether numbers are written as digits."""
        return any(character.isdigit() for character in self.characters)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen of the sources of a set.

    Attributes:
        sources: those that were looked at, with what had to be said to read them (`audio_root`).
        num_rows: rows in all; of a hub data set those that were looked at.
        is_whole: whether these are all rows.
        num_without_text: of them.
        headers: of the sample's files that can be read.
        unreadable: what is wrong with the others.
        num_sampled: files that were looked into.
        texts: what the transcripts are made of.
    """

    sources: tuple[AnySource, ...]
    num_rows: int
    is_whole: bool
    num_without_text: int
    headers: tuple[AudioHeader, ...]
    unreadable: tuple[str, ...]
    num_sampled: int
    texts: Texts

    @property
    def durations_s(self) -> "np.typing.NDArray[np.float64]":
        """Of the sample, ascending."""
        return np.sort([header.duration_s for header in self.headers])

    @property
    def hours(self) -> float:
        """Of all rows, from the sample's mean."""
        return self.num_rows * float(self.durations_s.mean()) / 3600 if self.headers else 0.0

    def counts(self, what: str) -> Counter[str]:
        """How often each `rate_hz`, number of `channels` or `format` occurs in the sample."""
        return Counter(str(getattr(header, what)) for header in self.headers)


def look_at(sources: Sequence[AnySource]) -> Look:
    """List sources, and read the headers of a sample of their audio.

    Raises:
        SourceError: everything that is wrong with any of them.
    """
    opened, listings, problems = [], [], []
    for source in sources:
        try:
            source, listing = _open(source)  # noqa: PLW2901 - with what had to be said to read it
        except SourceError as error:
            problems += error.problems
        else:
            opened.append(source)
            listings.append(listing)
    if problems:
        raise SourceError(problems)
    headers, unreadable = [], []
    share = -(-NUM_SAMPLED // len(listings))
    for listing in listings:
        for reference in _sample(listing, share):
            try:
                headers.append(read_header(reference))
            except AudioError as error:
                unreadable.append(str(error))
    texts = [text for listing in listings for text in listing.texts()]
    return Look(
        sources=tuple(opened),
        num_rows=sum(map(len, listings)),
        is_whole=not any(isinstance(source, HubSource) for source in opened),
        num_without_text=sum(not (text and text.strip()) for text in texts),
        headers=tuple(headers),
        unreadable=tuple(unreadable),
        num_sampled=len(headers) + len(unreadable),
        texts=look_at_texts([text for text in texts if text and text.strip()]),
    )


def open_all(sets: dict[str, AnySource]) -> dict[str, AnySource]:
    """Evaluation sets, with what had to be said to read them.

    Raises:
        SourceError: everything that is wrong with any of them.
    """
    opened, problems = {}, []
    for name, source in sets.items():
        try:
            opened[name], _ = _open(source)
        except SourceError as error:
            problems += error.problems
    if problems:
        raise SourceError(problems)
    return opened


def look_at_texts(texts: Sequence[str]) -> Texts:
    """Count characters, scripts and letter case of transcripts."""
    some = texts[:: max(1, -(-len(texts) // _MAX_TEXTS))]
    characters = Counter(character for text in some for character in text if not character.isspace())
    scripts: Counter[str] = Counter()
    upper = lower = 0
    for character, count in characters.items():
        if unicodedata.category(character) in ("Lu", "Ll", "Lt", "Lo"):
            scripts[unicodedata.name(character, "UNKNOWN").split()[0]] += count
        upper += count * character.isupper()
        lower += count * character.islower()
    case = "both" if upper and lower else "upper" if upper else "lower" if lower else "none"
    return Texts(
        num_texts=len(some),
        characters=characters,
        scripts=scripts,
        case=case,
        examples=tuple(some[:: max(1, len(some) // 3)][:3]),
    )


def read_header(reference: AudioRef) -> AudioHeader:
    """What an utterance's audio is, without decoding it.

    Raises:
        AudioError: it is not there, or no audio.
    """
    match reference:
        case FileAudio(_, offset_s, duration_s):
            header = _header(reference.checked())
            rest_s = header.duration_s - (offset_s or 0.0)
            return replace(header, duration_s=rest_s if duration_s is None else duration_s)
        case BytesAudio(data):
            return _header(data)
        case TableAudio():
            return _header(reference.encoded())
        case SpokenAudio():
            samples = reference.load()
            return AudioHeader(rate_hz=SAMPLE_RATE, channels=1, duration_s=len(samples) / SAMPLE_RATE, format="made")
        case NoAudio(value):
            raise AudioError("missing file", value)
    raise AssertionError(reference)


def _header(audio: Path | bytes) -> AudioHeader:
    if isinstance(audio, Path) and not audio.is_file():
        raise AudioError("missing file", str(audio))
    try:
        with soundfile.SoundFile(str(audio) if isinstance(audio, Path) else io.BytesIO(audio)) as file:
            duration_s = file.frames / file.samplerate
            return AudioHeader(
                rate_hz=file.samplerate, channels=file.channels, duration_s=duration_s, format=file.format
            )
    except (soundfile.LibsndfileError, OSError) as error:
        name = f"{audio}: " if isinstance(audio, Path) else ""
        raise AudioError("unreadable audio", f"{name}{str(error).rpartition(': ')[2]}") from None


def _open(source: AnySource) -> tuple[AnySource, Listing]:
    """A source and its rows; of a table, with the columns and the folder of its audio where they can be found.

    Raises:
        SourceError: it cannot be read.
    """
    if isinstance(source, HubSource):
        from asr_train.data.hub import open_hub  # noqa: PLC0415 - datasets imports torch, which takes seconds

        return source, open_hub(replace(source, streaming=True), limit=NUM_SAMPLED)
    if not isinstance(source, TableSource):
        return source, open_source(source)
    try:
        listing = open_source(source)
    except SourceError as error:
        if not all("allow_paths_outside_root" in problem for problem in error.problems):
            raise
        source = replace(source, allow_paths_outside_root=True)
        listing = open_source(source)
    return _with_root(source, listing)


def _with_root(source: TableSource, listing: Listing) -> tuple[TableSource, Listing]:
    """A table whose files are not where it says, but in a folder beside it: `audio_root` is that folder."""
    first = next(iter(listing.rows(0, 1)), None)
    if first is None or not isinstance(first.audio, FileAudio) or first.audio.path.is_file():
        return source, listing
    base = Path(source.path).parent if not Path(source.path).is_dir() else Path(source.path)
    if not first.audio.path.is_relative_to(base):
        return source, listing
    name = first.audio.path.relative_to(base)
    for folder in sorted(child for child in base.iterdir() if child.is_dir()):
        if (folder / name).is_file():
            found = replace(source, audio_root=str(folder))
            return found, open_source(found)
    return source, listing


def _sample(listing: Listing, count: int) -> Iterator[AudioRef]:
    """References to audio from several places of a listing."""
    size = max(1, count // _BLOCKS)
    if not listing.random_access or len(listing) <= count:
        starts, size = [0], min(len(listing), count)
    else:
        starts = [round(start) for start in np.linspace(0, len(listing) - size, _BLOCKS)]
    for start in starts:
        yield from (row.audio for row in listing.rows(start, start + size))


def _is_sign(character: str) -> bool:
    category = unicodedata.category(character)
    is_spelling = character in (*APOSTROPHES, *_JOINERS)
    return not is_spelling and (category[0] in "PS" or category in ("Cf", "Cc", "Co"))
