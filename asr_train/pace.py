"""How fast a training gets on: what a forecast of its time is made from. Assumed of a GPU, or read from a run's ledger.

A step is forecast to take

    max over ranks of (training FLOPs of its units, padding in them) / flops_per_s + step_s

with FLOPs as `estimate` counts them, of frames as `FrameGeometry.num_frames` counts them. Evaluations and checkpoints
are no part of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final, NamedTuple

from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir

ASSUMED_SHARE: Final = 0.3
"""Of a GPU's peak; of a training that nobody has measured, for lack of anything better."""

_WORK = ("compute", "padding")  # parts of the ledger; what is in `_REST` a step takes besides its units
_REST = ("data_wait", "peer_wait", "other")


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a training gets on.

    Attributes:
        flops_per_s: training FLOPs of padded audio that one rank gets through in a second while it computes.
        step_s: seconds of a step besides: exchange, waiting, logging.
        source: where the figures are from, a sentence for people.
    """

    flops_per_s: float
    step_s: float
    source: str


def assumed(gpu_name: str, peak_flops_per_s: float) -> Pace:
    """A share of a GPU's peak.

    Args:
        gpu_name: for people.
        peak_flops_per_s: dense products in the recipe's precision.
    """
    return Pace(
        flops_per_s=ASSUMED_SHARE * peak_flops_per_s,
        step_s=0.0,
        source=f"assumed: {ASSUMED_SHARE:.0%} of the peak of {gpu_name}, {peak_flops_per_s / 1e12:,.0f} TFLOP/s",
    )


def of_run(run: RunDir, *, place: str | None = None) -> Pace | None:
    """The pace that a run was measured at; None where its metrics.jsonl has no two ledger lines to measure between.

    Each pair of lines gives both figures: FLOPs by seconds of computing, padding in both, and seconds of a step that
    were no computing. Of several ranks those of the one that waited least, which the others waited for: so the two give
    back the time that the steps took. A fit of two figures to the times of steps would not tell them apart, for the
    plan makes steps of equal cost; the ledger measures both. What an optimizer's update takes is in the first one, as
    the ledger counts it as computing. Pairs count alike, and the medians stand, so that a minute in which the machine
    was busy elsewhere does no harm. Left out are an attempt's first pair, in which libraries warm up, steps that train
    the head alone, and attempts that ran otherwise than the newest measured one: another number of processes,
    strategy, device or recipe.

    Args:
        run: its directory.
        place: what people are told of where it was measured; the run's path when None.

    Raises:
        RunError: the folder is no run directory.
    """
    frozen_steps = run.recipe().model.freeze_transformer_steps
    measured = [window for window in _windows(read_jsonl(run.metrics)) if window.start >= frozen_steps]
    if not measured:
        return None
    newest = measured[-1].setting
    chosen = [window for window in measured if window.setting == newest]
    num_steps = sum(window.num_steps for window in chosen)
    processes = f"{newest.world_size} process{'es' if newest.world_size > 1 else ''}"
    return Pace(
        flops_per_s=median(window.flops_per_s for window in chosen),
        step_s=median(window.step_s for window in chosen),
        source=f"measured in {place or run.path}, {num_steps} steps: {processes}, {newest.strategy}, {newest.device}",
    )


class _Setting(NamedTuple):
    """How an attempt ran."""

    world_size: int
    strategy: str
    device: str
    recipe_hash: str
    frame_flops: float


class _Window(NamedTuple):
    """The steps between two ledger lines."""

    start: int  # steps of the run before it
    num_steps: int
    flops_per_s: float
    step_s: float
    setting: _Setting


def _windows(lines: Iterable[Mapping[str, Any]]) -> Iterator[_Window]:
    """What was measured between any two ledger lines of one attempt, but for each attempt's first two."""
    settings: dict[int, _Setting] = {}
    ledgers: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        attempt = line.get("attempt", 0)
        if line.get("event") in ("started", "restored") and "frame_flops" in line:
            settings[attempt] = _Setting(*(line[name] for name in _Setting._fields))
        elif line.get("event") == "ledger":
            ledgers.setdefault(attempt, []).append(line)
    for attempt, setting in settings.items():
        for before, after in list(pairwise(ledgers.get(attempt, [])))[1:]:
            if after["step"] > before["step"]:
                yield _window(before, after, setting)


def _window(before: Mapping[str, Any], after: Mapping[str, Any], setting: _Setting) -> _Window:
    num_steps = after["step"] - before["step"]
    ranks = []
    for old, new in zip(before["ranks"], after["ranks"], strict=True):
        work_s, rest_s = (sum(new[f"{part}_s"] - old[f"{part}_s"] for part in parts) for parts in (_WORK, _REST))
        if new["cost"] > old["cost"] and work_s > 0:  # else it had idle turns alone
            ranks.append((rest_s, setting.frame_flops * (new["cost"] - old["cost"]) / work_s))
    rest_s, flops_per_s = min(ranks)
    return _Window(before["step"], num_steps, flops_per_s, rest_s / num_steps, setting)
