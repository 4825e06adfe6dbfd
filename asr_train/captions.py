"""Words with times, and subtitle files made of them: SRT and WebVTT."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from asr_train.data.text import Vocabulary

FORMATS: Final = ("text", "jsonl", "srt", "vtt")
"""What a transcript can be written as."""

# A caption is at most two lines of 42 characters and 7 s long: the usual limits of broadcasters and streaming services.
_LINE_CHARACTERS = 42
_CAPTION_LINES = 2
_CAPTION_S = 7.0
_PAUSE_S = 0.8  # a longer silence ends a caption


@dataclass(frozen=True)
class Word:
    """A recognised word, from the first frame of its first character to the end of its last one."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Caption:
    """Lines that are shown together."""

    lines: tuple[str, ...]
    start_s: float
    end_s: float


def words_of_frames(frame_ids: Iterable[int], vocabulary: Vocabulary, frame_s: float) -> list[Word]:
    """The words of the best label of each frame, with times; together they are the text of `decode_frames`."""
    delimiter = vocabulary.tokens.index(vocabulary.word_delimiter)
    words: list[Word] = []
    labels: list[int] = []
    start = end = position = 0
    for label, run in groupby(frame_ids):
        length = sum(1 for _ in run)
        if label == delimiter and labels:
            words.append(Word(vocabulary.decode(labels), start * frame_s, end * frame_s))
            labels = []
        elif label not in (delimiter, vocabulary.blank_id):
            start = start if labels else position
            end = position + length
            labels.append(int(label))
        position += length
    if labels:
        words.append(Word(vocabulary.decode(labels), start * frame_s, end * frame_s))
    return words


def make_captions(words: Sequence[Word]) -> list[Caption]:
    """Words grouped to captions that can be read: short lines, ended by pauses."""
    groups: list[list[Word]] = []
    for word in words:
        if groups and _fits([*groups[-1], word]):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [Caption(_wrap(group), group[0].start_s, group[-1].end_s) for group in groups]


def to_srt(captions: Sequence[Caption]) -> str:
    """A SubRip file."""
    blocks = []
    for number, caption in enumerate(captions, start=1):
        times = f"{_clock(caption.start_s, ',')} --> {_clock(caption.end_s, ',')}"
        blocks.append("\n".join([str(number), times, *caption.lines]) + "\n")
    return "\n".join(blocks)


def to_vtt(captions: Sequence[Caption]) -> str:
    """A WebVTT file; what its syntax reserves is escaped."""
    blocks = ["WEBVTT\n"]
    for caption in captions:
        times = f"{_clock(caption.start_s, '.')} --> {_clock(caption.end_s, '.')}"
        lines = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in caption.lines]
        blocks.append("\n".join([times, *lines]) + "\n")
    return "\n".join(blocks)


def _fits(words: Sequence[Word]) -> bool:
    return (
        words[-1].start_s - words[-2].end_s <= _PAUSE_S
        and words[-1].end_s - words[0].start_s <= _CAPTION_S
        and len(_wrap(words)) <= _CAPTION_LINES
    )


def _wrap(words: Sequence[Word]) -> tuple[str, ...]:
    lines = [words[0].text]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word.text) <= _LINE_CHARACTERS:
            lines[-1] += f" {word.text}"
        else:
            lines.append(word.text)
    return tuple(lines)


def _clock(seconds: float, decimal_mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{decimal_mark}{milliseconds % 1000:03d}"
