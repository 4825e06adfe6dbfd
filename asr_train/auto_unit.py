"""`unit_audio_s: auto`: which unit sizes are tried, in which order, and what is remembered of earlier tries.

Nothing here knows a device: whether a size fits is a function that is asked (`unit_probe` on a GPU, an estimate here).
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import Plan, PlanSettings
from asr_train.files import read_json, write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.memory_estimate import MemorySettings, UnitShape, memory

ESTIMATE_HEADROOM = 0.15  # the estimate's own error, and what an allocator cannot use
CPU_HEADROOM = 0.5  # a host has other work, and data workers
CPU_MOST_S = 100.0  # a processor gains nothing from larger units
# ISO 3's R20 series: twenty a decade, 12 % apart, each short to write
_R20 = (1, 1.12, 1.25, 1.4, 1.6, 1.8, 2, 2.24, 2.5, 2.8, 3.15, 3.55, 4, 4.5, 5, 5.6, 6.3, 7.1, 8, 9)
_LEAST_S, _MOST_S = 5.0, 1000.0  # beyond it no GPU gains anything, and a step would hold hours


def candidates(index: LengthIndex, units_per_step: int, most_s: float = _MOST_S) -> list[float]:
    """Unit sizes to choose from, in seconds, ascending: so large at most that the corpus has a whole step of them."""
    available_s = float(index.samples.sum()) / SAMPLE_RATE / units_per_step
    sizes = [round(digit * 10**power, 2) for power in range(4) for digit in _R20]
    found = [size for size in sizes if _LEAST_S <= size <= min(most_s, available_s)]
    return found or [_LEAST_S]


def largest(sizes: Sequence[float], fits: Callable[[float], bool], guess: float | None = None) -> float | None:
    """The largest of ascending sizes that fits, by bisection; None if not even the smallest does.

    Args:
        sizes: what to choose from; where one fits, all smaller ones do.
        fits: asked of few of them.
        guess: which to ask about first, and then its neighbour; a good one saves questions.
    """
    low, high = -1, len(sizes)  # what is sought lies at `low` or over it, and under `high`
    guessed = sum(size <= guess for size in sizes) - 1 if guess is not None else -1
    ask = guessed
    while high - low > 1:
        middle = ask if low < ask < high else (low + high) // 2
        is_small = fits(sizes[middle])
        low, high = (middle, high) if is_small else (low, middle)
        ask = (middle + 1 if is_small else middle - 1) if middle == guessed else -1
    return None if low < 0 else sizes[low]


def worst_shapes(
    index: LengthIndex, settings: PlanSettings, seed: int, bytes_of: Callable[[UnitShape], int]
) -> list[UnitShape]:
    """The units of a plan that take most memory, each once: by prediction, the longest, and the most utterances."""
    shapes = [UnitShape(*pair) for pair in Plan(index, settings, seed).unit_shapes]
    orders: Iterable[Callable[[UnitShape], Any]] = (
        bytes_of,
        lambda shape: (shape.padded_samples, shape.num_utterances),
        lambda shape: (shape.num_utterances, shape.padded_samples),
    )
    return list(dict.fromkeys(max(shapes, key=order) for order in orders))


def estimated_unit_audio_s(
    config: Mapping[str, Any],
    index: LengthIndex,
    plan: PlanSettings,
    settings: MemorySettings,
    *,
    limit_bytes: float,
    headroom: float = ESTIMATE_HEADROOM,
    most_s: float = _MOST_S,
) -> float | None:
    """The largest unit size, in seconds of audio, whose units are predicted to fit; None if none does.

    Args:
        config: a model's transformers config, as `to_dict()` gives it.
        index: the corpus's utterances by length.
        plan: how they are batched; its own `unit_audio_s` does not matter.
        settings: how the units are trained.
        limit_bytes: memory that there is.
        headroom: share of it that is left free.
        most_s: no larger unit is considered.
    """

    def bytes_of(shape: UnitShape) -> int:
        return memory(config, shape, settings).total

    def fits(unit_audio_s: float) -> bool:
        shapes = worst_shapes(index, replace(plan, unit_audio_s=unit_audio_s), 0, bytes_of)
        return max(map(bytes_of, shapes)) <= limit_bytes * (1 - headroom)

    return largest(candidates(index, plan.units_per_step, most_s), fits)


def cache_file() -> Path:
    """Where sizes that were found by trying are remembered: in the user's cache folder, as XDG names it."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "wavefleet" / "unit_audio_s.json"


def recall(key: str) -> float | None:
    """The size remembered under a key, if there is any that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(read_json(cache_file())[key]["unit_audio_s"])
    return None


def remember(key: str, unit_audio_s: float, about: Mapping[str, Any]) -> None:
    """Keep a size under a key, with what it was found for; where nothing can be written, it is found anew."""
    path = cache_file()
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = dict(read_json(path))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**known, key: {"unit_audio_s": unit_audio_s, **about}})
