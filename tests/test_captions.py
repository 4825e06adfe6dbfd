import html
import re

import numpy as np
import pytest

from asr_train.captions import Word, make_captions, to_srt, to_vtt, words_of_frames
from asr_train.data.text import Vocabulary

VOCABULARY = Vocabulary.build(["hello world &<>"])


def frames(spelling):
    """`hh_e__ll_lo|` -> labels; _ is the blank."""
    return np.array([VOCABULARY.tokens.index({"_": "[PAD]", "?": "[UNK]"}.get(sign, sign)) for sign in spelling])


def test_words_and_their_times():
    words = words_of_frames(frames("__hh_e_l_loo__||_|w__o??_rld|_"), VOCABULARY, frame_s=0.02)
    assert [(word.text, round(word.start_s, 3), round(word.end_s, 3)) for word in words] == [
        ("hello", 0.04, 0.24),
        ("wo[UNK]rld", 0.36, 0.56),
    ]
    assert words_of_frames(frames("|__|"), VOCABULARY, 0.02) == []
    assert words_of_frames(frames(""), VOCABULARY, 0.02) == []


@pytest.mark.parametrize("seed", range(5))
def test_words_are_the_decoded_text(seed):
    ids = np.random.default_rng(seed).integers(0, VOCABULARY.size, 400)
    words = words_of_frames(ids, VOCABULARY, 0.02)
    assert [word.text for word in words] == VOCABULARY.decode_frames(ids).split()
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times)


def spoken(text, word_s=0.3, gap_s=0.1, start_s=0.0):
    return [
        Word(word, start_s + number * (word_s + gap_s), start_s + number * (word_s + gap_s) + word_s)
        for number, word in enumerate(text.split())
    ]


TEXT = "so i would like to move five hundred pounds from my savings account to my current account please today"


def test_captions_are_readable():
    words = spoken(TEXT) + spoken("and then a pause & <more>", start_s=3600)
    captions = make_captions(words)
    assert " ".join(line for caption in captions for line in caption.lines).split() == [word.text for word in words]
    for caption in captions:
        assert len(caption.lines) <= 2
        assert all(len(line) <= 42 for line in caption.lines)
        assert 0 < caption.end_s - caption.start_s <= 7
    assert [caption.start_s for caption in captions if caption.start_s >= 3600] == [3600]  # a pause ends a caption


def test_a_word_longer_than_a_line_stays_whole():
    captions = make_captions([Word("a" * 60, 0, 1), Word("b", 1.1, 1.2)])
    assert [caption.lines for caption in captions] == [("a" * 60, "b")]


def parse(text, mark):
    """An independent reader of SRT and VTT cues: (start_s, end_s, lines)."""
    clock = rf"(\d\d+):(\d\d):(\d\d){re.escape(mark)}(\d\d\d)"
    cues = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        found = [re.fullmatch(f"{clock} --> {clock}", line) for line in lines[:2]]
        if match := next(filter(None, found), None):
            h1, m1, s1, f1, h2, m2, s2, f2 = map(int, match.groups())
            times = (h1 * 3600 + m1 * 60 + s1 + f1 / 1000, h2 * 3600 + m2 * 60 + s2 + f2 / 1000)
            cues.append((*times, lines[1 + found.index(match) :]))
    return cues


@pytest.mark.parametrize(("write", "mark"), [(to_srt, ","), (to_vtt, ".")])
def test_subtitles_read_back(write, mark):
    captions = make_captions(spoken(TEXT) + spoken("fish & <chips> --> now", start_s=3599.99951))
    text = write(captions)
    cues = parse(text, mark)
    assert len(cues) == len(captions) > 2
    for (start_s, end_s, lines), caption in zip(cues, captions, strict=True):
        assert start_s == pytest.approx(caption.start_s, abs=6e-4)
        assert end_s == pytest.approx(caption.end_s, abs=6e-4)
        if write is to_vtt:
            assert not any("<" in line or "-->" in line for line in lines)
            assert tuple(map(html.unescape, lines)) == caption.lines
        else:
            assert tuple(lines) == caption.lines
    if write is to_srt:
        assert re.findall(r"(?m)^(\d+)\n", text) == [str(number + 1) for number in range(len(cues))]
    else:
        assert text.startswith("WEBVTT\n\n")


def test_no_words_make_valid_empty_files():
    assert to_srt([]) == ""
    assert to_vtt([]).startswith("WEBVTT")
