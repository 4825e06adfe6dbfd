"""Long audio in overlapping windows, and their frames joined without seams. numpy only.

Windows lie where `transformers.pipeline(chunk_length_s=window, stride_length_s=overlap / 2)` has them, so both see the
same audio: starts are multiples of window - overlap, in whole frames, and the last window ends with the audio. What
differs is the seam. The pipeline cuts in the middle of an overlap, where a character that one window puts a frame
earlier than the other is lost or doubled. Here both windows' best labels are compared over the inner half of the
overlap, where each has context on both sides, and the seam is put into the longest stretch in which both say the same
nothing, blanks and word delimiters, between the same two characters. So it lies in a pause, or between two characters,
never inside of one; and no character comes before it in one window and after it in the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

FrameIds = npt.NDArray[np.integer]

WINDOW_S: Final = 30.0
OVERLAP_S: Final = 10.0  # the pipeline's own choice: a sixth of the window on each side


@dataclass(frozen=True)
class Window:
    """Samples [start, end) of a waveform; `start` is a whole number of frames."""

    start: int
    end: int

    @property
    def num_samples(self) -> int:
        """Its length."""
        return self.end - self.start


def make_windows(num_samples: int, window_samples: int, overlap_samples: int, stride_samples: int) -> list[Window]:
    """Windows that cover a waveform; lengths are rounded to whole frames, as the pipeline rounds them."""
    half = round(overlap_samples / 2 / stride_samples) * stride_samples
    length = round(window_samples / stride_samples) * stride_samples
    windows = [Window(0, min(length, num_samples))]
    while windows[-1].end < num_samples:
        start = windows[-1].start + length - 2 * half
        windows.append(Window(start, min(start + length, num_samples)))
    return windows


def join_frames(
    windows: Sequence[Window], frame_ids: Sequence[FrameIds], quiet: Sequence[int], stride: int
) -> FrameIds:
    """The frames of the whole waveform from those of its windows.

    Args:
        windows: from `make_windows`.
        frame_ids: best label of each frame, window by window.
        quiet: labels that say nothing: the blank and the word delimiter.
        stride: samples from one frame to the next.
    """
    joined = frame_ids[0]
    for window, following in zip(windows[1:], frame_ids[1:], strict=True):
        start = window.start // stride  # frames before the window; `joined` ends inside of it
        seam = find_seam(joined[start:], following[: len(joined) - start], quiet)
        joined = np.concatenate([joined[: start + seam], following[seam:]])
    return joined


def find_seam(left: FrameIds, right: FrameIds, quiet: Sequence[int]) -> int:
    """Where to go over from one window to the next: the seam is before this frame of their overlap.

    The middle of the longest stretch of equal, quiet frames in the inner half that have the same characters before
    and after them; where there is none, of equal, quiet frames; then of equal frames; where the windows agree on
    nothing, the middle of the overlap. Of stretches of equal length the one nearest to the middle is taken.
    """
    num_frames = min(len(left), len(right))
    left, right = left[:num_frames], right[:num_frames]
    inner = slice(num_frames // 4, num_frames - num_frames // 4)
    agree = left == right
    both_quiet = agree & np.isin(left, quiet)
    between_the_same = (_neighbours(left, quiet) == _neighbours(right, quiet)).all(axis=0)
    for wanted in (both_quiet & between_the_same, both_quiet, agree):
        if wanted[inner].any():
            return inner.start + _middle_of_longest(wanted[inner])
    return num_frames // 2


def _neighbours(ids: FrameIds, quiet: Sequence[int]) -> FrameIds:
    """The characters nearest to each frame, before and after it, [2, F]; -1 where there is none."""
    frames = np.arange(len(ids))
    loud = ~np.isin(ids, quiet)
    before = np.maximum.accumulate(np.where(loud, frames, -1))
    after = np.minimum.accumulate(np.where(loud, frames, len(ids))[::-1])[::-1]
    neighbours: FrameIds = np.append(ids, -1)[np.stack([before, after])]
    return neighbours


def _middle_of_longest(wanted: npt.NDArray[np.bool_]) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    off_centre = np.abs(starts + ends - len(wanted))
    best = np.lexsort((off_centre, starts - ends))[0]
    return int(starts[best] + ends[best]) // 2
