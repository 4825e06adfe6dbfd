"""The rows of one evaluation, from its file, read once: the worst, WER by length, confusions, how sure the WER is."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir

_CONFIDENCE = 1.96  # standard errors on either side hold 95 % of a normal distribution
_NUM_BINS = 10
_NUM_CONFUSIONS = 20
_ROUND_WIDTHS_S = (0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0)


@dataclass(frozen=True)
class LengthBin:
    """The utterances of a range of durations."""

    from_s: float
    to_s: float
    num_rows: int
    num_errors: int
    num_reference: int

    @property
    def wer(self) -> float | None:
        """Of all its words; None where it has none."""
        return self.num_errors / self.num_reference if self.num_reference else None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a report shows of an evaluation's rows.

    Attributes:
        worst: the first rows of the file, which is ordered worst first; as `asr_train.score` writes them.
        durations_s: of all rows.
        errors: id -> (word errors, reference words), of all rows.
        confusions: reference word, hypothesis word, count; None stands for no word.
    """

    set_name: str
    step: int
    num_rows: int
    worst: Sequence[Mapping[str, Any]]
    durations_s: Sequence[float]
    bins: Sequence[LengthBin]
    errors: Mapping[str, tuple[int, int]]
    confusions: Sequence[tuple[str | None, str | None, int]]


def read_rows(run: RunDir, set_name: str, step: int, num_worst: int) -> Rows | None:
    """The rows of an evaluation; None when their file is not there, or holds none."""
    worst: list[dict[str, Any]] = []
    durations_s: list[float] = []
    errors: dict[str, tuple[int, int]] = {}
    confusions: Counter[tuple[str | None, str | None]] = Counter()
    for row in read_jsonl(run.evaluation(step, set_name)):
        if not isinstance(row, dict) or not row.keys() >= {"id", "alignment"} or row["id"] in errors:
            continue
        if len(worst) < num_worst and row.get("num_errors"):
            worst.append(row)
        counts = Counter(kind for kind, _, _ in row["alignment"])
        errors[row["id"]] = counts["S"] + counts["D"] + counts["I"], counts["="] + counts["S"] + counts["D"]
        durations_s.append(float(row.get("duration_s") or 0.0))
        confusions.update((expected, heard) for kind, expected, heard in row["alignment"] if kind != "=")
    if not errors:
        return None
    return Rows(
        set_name=set_name, step=step, num_rows=len(errors), worst=worst, durations_s=durations_s, errors=errors,
        bins=_bins(durations_s, list(errors.values())),
        confusions=[(expected, heard, count) for (expected, heard), count in confusions.most_common(_NUM_CONFUSIONS)],
    )  # fmt: skip


def half_width(errors: Iterable[tuple[int, int]]) -> float | None:
    """Half the width of the WER's 95 % interval, had other utterances like these been scored; None for too few.

    The WER is a ratio of two sums over utterances; its variance is that of `errors - WER * words`, linearised
    (Cochran, Sampling Techniques, 1977, section 6.3). Words of one utterance are not independent, utterances are.
    """
    pairs = list(errors)
    return _half_width([(num_errors, num_words) for num_errors, num_words in pairs]) if len(pairs) > 1 else None


def difference(
    first: Mapping[str, tuple[int, int]], second: Mapping[str, tuple[int, int]]
) -> tuple[float, float] | None:
    """WER of `second` minus that of `first`, and half the width of its 95 % interval, over utterances of both.

    None where they are not scores of the same utterances. Compared utterance by utterance, for what is hard for one
    model is hard for another.
    """
    shared = first.keys() & second.keys()
    if len(shared) < 2 or len(shared) < max(len(first), len(second)):
        return None
    if any(first[key][1] != second[key][1] for key in shared):
        return None
    pairs = [(second[key][0] - first[key][0], first[key][1]) for key in sorted(shared)]
    width = _half_width(pairs)
    num_words = sum(words for _, words in pairs)
    return None if width is None else (sum(errors for errors, _ in pairs) / num_words, width)


def _half_width(pairs: Sequence[tuple[int, int]]) -> float | None:
    num_words = sum(words for _, words in pairs)
    if not num_words:
        return None
    rate = sum(errors for errors, _ in pairs) / num_words
    squares = sum((errors - rate * words) ** 2 for errors, words in pairs)
    return _CONFIDENCE * math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / num_words


def _bins(durations_s: Sequence[float], errors: Sequence[tuple[int, int]]) -> list[LengthBin]:
    """About ten ranges of one round width, over all durations; empty ones at the end are left out."""
    longest_s = max(durations_s)
    width_s = next((width for width in _ROUND_WIDTHS_S if width * _NUM_BINS >= longest_s), _ROUND_WIDTHS_S[-1])
    num_bins = max(1, math.ceil(longest_s / width_s + 1e-9))
    totals = [[0, 0, 0] for _ in range(num_bins)]
    for duration_s, (num_errors, num_words) in zip(durations_s, errors, strict=True):
        total = totals[min(num_bins - 1, int(duration_s / width_s))]
        total[0] += 1
        total[1] += num_errors
        total[2] += num_words
    edges = pairwise(number * width_s for number in range(num_bins + 1))
    return [LengthBin(start, end, *total) for (start, end), total in zip(edges, totals, strict=True) if total[0]]
