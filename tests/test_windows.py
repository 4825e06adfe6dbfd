"""Joining windows: the frames of each are made from a known sequence, as a model sees it that errs near the edges."""

from itertools import groupby

import numpy as np
import pytest

from asr_train.windows import Window, find_seam, join_frames, make_windows

STRIDE = 320
BLANK, DELIMITER = 0, 1


def collapse(ids):
    return [int(label) for label, _ in groupby(ids) if label != BLANK]


def speech(rng, num_frames):
    """Frames as a CTC model emits them: characters of 1-2 frames, blanks between, a delimiter after each word."""
    ids = np.zeros(num_frames, dtype=np.int32)
    position = 3
    while position < num_frames - 70:
        for _ in range(rng.integers(2, 9)):  # a word
            length = rng.integers(1, 3)
            ids[position : position + length] = rng.integers(2, 30)
            position += length + rng.integers(3, 6)
        ids[position : position + 2] = DELIMITER
        position += rng.integers(5, 14)
    return ids


def shifted(rng, ids):
    """The same labels, each token up to a frame early or late: what another window sees."""
    seen = np.zeros_like(ids)
    position = 0
    for label, run in groupby(ids):
        length = len(list(run))
        if label != BLANK:
            start = max(position + int(rng.integers(-1, 2)), 0)
            seen[start : start + length] = label
        position += length
    return seen


def see(rng, ids, window, num_edge_frames):
    """A window's view: tokens shifted, garbage where it has no context."""
    start = window.start // STRIDE
    num_frames = (window.num_samples - 400) // STRIDE + 1  # one less than the samples hold, as the convolutions give
    view = shifted(rng, ids)[start : start + num_frames].copy()
    view[:num_edge_frames] = rng.integers(0, 30, num_edge_frames) if window.start else view[:num_edge_frames]
    if start + num_frames < len(ids) - 1:
        view[-num_edge_frames:] = rng.integers(0, 30, num_edge_frames)
    return view


def test_windows_cover_everything_where_the_pipeline_has_them():
    windows = make_windows(100 * 16_000, 30 * 16_000, 10 * 16_000, STRIDE)
    assert windows == [Window(start * 16_000, (start + 30) * 16_000) for start in (0, 20, 40, 60)] + [
        Window(80 * 16_000, 100 * 16_000)
    ]
    assert make_windows(480_000, 480_000, 160_000, STRIDE) == [Window(0, 480_000)]
    assert make_windows(480_001, 480_000, 160_000, STRIDE) == [Window(0, 480_000), Window(320_000, 480_001)]


@pytest.mark.parametrize("seed", range(20))
def test_no_token_is_lost_or_doubled_wherever_the_cuts_fall(seed):
    rng = np.random.default_rng(seed)
    ids = speech(rng, 1500)
    num_samples = 1500 * STRIDE + 80
    windows = make_windows(num_samples, int(rng.integers(200, 400)) * STRIDE, 100 * STRIDE, STRIDE)
    assert len(windows) > 3
    views = [see(rng, ids, window, num_edge_frames=25) for window in windows]
    joined = join_frames(windows, views, (BLANK, DELIMITER), STRIDE)
    assert collapse(joined) == collapse(ids)
    assert len(joined) == 1500


def test_cutting_every_overlap_in_the_middle_would_not_do():
    """The same views, joined as the pipeline joins them: so the test above can fail."""
    num_wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids = speech(rng, 1500)
        windows = make_windows(1500 * STRIDE + 80, int(rng.integers(200, 400)) * STRIDE, 100 * STRIDE, STRIDE)
        views = [see(rng, ids, window, num_edge_frames=25) for window in windows]
        joined = views[0]
        for window, view in zip(windows[1:], views[1:], strict=True):
            start = window.start // STRIDE
            joined = np.concatenate([joined[: start + 50], view[50:]])
        num_wrong += collapse(joined) != collapse(ids)
    assert num_wrong >= 5


def test_seam_prefers_the_longest_agreed_silence_then_agreement_then_the_middle():
    left = np.array([9, 9, 9, 0, 5, 0, 0, 0, 6, 9, 9, 9])
    right = np.array([8, 8, 8, 0, 5, 0, 0, 0, 6, 8, 8, 8])
    assert find_seam(left, right, (BLANK, DELIMITER)) == 6
    assert find_seam(left, np.full(12, 7), (BLANK, DELIMITER)) == 6
    talking = np.array([2, 2, 2, 3, 4, 3, 4, 7, 8, 2, 2, 2])
    other = np.array([2, 2, 2, 5, 6, 5, 6, 7, 8, 2, 2, 2])
    assert find_seam(talking, other, (BLANK, DELIMITER)) == 8


def test_a_character_that_two_windows_put_far_apart_is_not_doubled_or_lost():
    """The longest quiet stretch lies between the two places of the 5: a seam there says it twice, or not at all."""
    early = np.array([7, 7, 7, 2, 0, 3, 0, 5, 0, 0, 0, 0, 0, 0, 6, 0, 0, 4, 9, 9, 9, 9])
    late = np.array([8, 8, 8, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 5, 6, 0, 0, 4, 9, 9, 9, 9])
    for left, right in ((early, late), (late, early)):
        seam = find_seam(left, right, (BLANK, DELIMITER))
        assert seam in (15, 16)
        assert collapse(np.concatenate([left[:seam], right[seam:]])).count(5) == 1
