"""Where the hours of a run went: each life's time sorted into kinds that add up to its wall time.

The ledger lines of metrics.jsonl say it for every rank. Runs without them, of older versions, are sorted by rank 0's
training lines, more coarsely; whatever no line accounts for is `unaccounted`, so that the sum is the wall time again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from launch.report.lives import Life

# kind -> its name on the page, in the order of the bar: useful first, then what was spent beside it.
KINDS: Final[dict[str, str]] = {
    "compute_s": "useful compute",
    "padding_s": "padding",
    "data_wait_s": "waiting for data",
    "peer_wait_s": "waiting for other ranks",
    "checkpoint_s": "checkpoints",
    "evaluation_s": "evaluation",
    "startup_s": "start-up",
    "other_s": "other",
    "lost_s": "lost steps",
    "queue_s": "queue",
    "unaccounted_s": "unaccounted",
}


@dataclass(frozen=True, kw_only=True)
class LifeHours:
    """One life's wall time, as the mean over its ranks.

    Attributes:
        spent_s: kind -> seconds; they add up to `wall_s` and the queue.
        wall_s: from its start to its end by the clock, the queue left out.
        has_ledger: sorted by ledger lines, and not by rank 0's training lines.
    """

    life: Life
    spent_s: Mapping[str, float]
    wall_s: float
    has_ledger: bool


@dataclass(frozen=True)
class Hours:
    """All lives of a run."""

    lives: Sequence[LifeHours]

    @cached_property
    def spent_s(self) -> dict[str, float]:
        """Kind -> seconds of wall time, kinds that took any, in the order of `KINDS`."""
        totals: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        for entry in self.lives:
            for kind, spent_s in entry.spent_s.items():
                totals[kind] = totals.get(kind, 0.0) + spent_s
        return {kind: spent_s for kind, spent_s in totals.items() if spent_s > 0}

    @cached_property
    def rank_s(self) -> dict[str, float]:
        """The same times the ranks of each life: what a cluster would count; the queue costs none."""
        totals: dict[str, float] = {}
        for kind in self.spent_s:
            sizes = ((entry.spent_s.get(kind, 0.0), entry.life.world_size or 1) for entry in self.lives)
            totals[kind] = 0.0 if kind == "queue_s" else sum(spent_s * size for spent_s, size in sizes)
        return totals

    @property
    def wall_s(self) -> float:
        """By the clock: from each life's start to its end, and its time in the queue."""
        return sum(entry.wall_s + entry.life.queue_s for entry in self.lives)

    @property
    def has_ledger(self) -> bool:
        """Whether ledger lines say it of all attempts that trained."""
        return any(entry.has_ledger for entry in self.lives) and all(
            entry.has_ledger for entry in self.lives if entry.life.last_step > entry.life.first_step
        )


def name_of(kind: str) -> str:
    """A kind's name on the page; kinds of later versions keep their own."""
    return KINDS.get(kind, kind.removesuffix("_s").replace("_", " "))


def sort_hours(lives: Sequence[Life]) -> Hours:
    """Sort the time of every life."""
    return Hours([_sorted(life) for life in lives])


def ledger_lines(life: Life) -> list[Mapping[str, Any]]:
    """A life's ledger lines that name ranks, oldest first; each holds sums since the life's start."""
    return [line for line in life.lines if line.get("event") == "ledger" and line.get("ranks")]


def _sorted(life: Life) -> LifeHours:
    ledger = ledger_lines(life)
    parts = _by_ledger(life, ledger) if ledger else _by_training_lines(life)
    if ledger and life.began is not None:  # a rank counts from its own beginning; what came before it started it
        begun = ledger[-1]["time"] - sum(mean_over_ranks(ledger[-1]).values())
        parts["startup_s"] = parts.get("startup_s", 0.0) + max(0.0, begun - life.began)
    recorded_s = sum(parts.values())
    wall_s = max(life.wall_s, recorded_s) if ledger else life.wall_s
    parts["unaccounted_s"] = max(0.0, wall_s - recorded_s)
    parts["queue_s"] = life.queue_s
    return LifeHours(
        life=life, spent_s={kind: spent_s for kind, spent_s in parts.items() if spent_s > 0}, wall_s=wall_s,
        has_ledger=bool(ledger),
    )  # fmt: skip


def _by_ledger(life: Life, ledger: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last line's sums; what came after the step that the run went on from is lost, whatever it was spent on."""
    final = mean_over_ranks(ledger[-1])
    if not life.num_lost_steps:
        return final
    before = _at_step(ledger, life.kept_step)
    parts = {kind: min(spent_s, before.get(kind, 0.0)) for kind, spent_s in final.items()}
    parts["lost_s"] = sum(final.values()) - sum(parts.values())
    return parts


def _at_step(ledger: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The sums when a step was made: between two lines in proportion to the steps; before the first, the start-up."""
    after = next((number for number, line in enumerate(ledger) if line["step"] > step), None)
    if after is None:
        return mean_over_ranks(ledger[-1])
    if after == 0:
        return {"startup_s": mean_over_ranks(ledger[0]).get("startup_s", 0.0)}
    low, high = mean_over_ranks(ledger[after - 1]), mean_over_ranks(ledger[after])
    share = (step - ledger[after - 1]["step"]) / (ledger[after]["step"] - ledger[after - 1]["step"])
    return {kind: low.get(kind, 0.0) + share * (high[kind] - low.get(kind, 0.0)) for kind in high}


def mean_over_ranks(line: Mapping[str, Any]) -> dict[str, float]:
    """Kind -> seconds, the mean over the ranks of a ledger line."""
    ranks = line["ranks"]
    kinds = [kind for kind in ranks[0] if kind.endswith("_s") and kind != "wall_s"]
    return {kind: sum(rank.get(kind, 0.0) for rank in ranks) / len(ranks) for kind in kinds}


def _by_training_lines(life: Life) -> dict[str, float]:
    """By what rank 0 wrote: times of steps, waits for data, evaluations, saves that training stood still for."""
    parts = dict.fromkeys(("compute_s", "padding_s", "data_wait_s", "checkpoint_s", "evaluation_s", "lost_s"), 0.0)
    parts["startup_s"] = _startup_s(life)
    before = life.first_step
    for line in life.lines:
        is_lost = line["step"] > life.kept_step
        if "loss" in line and line.get("step_time_s") is not None:
            num_steps = max(0, line["step"] - before)
            before = line["step"]
            step_s = num_steps * line["step_time_s"]
            wait_s = min(step_s, num_steps * (line.get("data_wait_s") or 0.0))
            if is_lost:
                parts["lost_s"] += step_s
                continue
            useful = _useful_share(line)
            parts["data_wait_s"] += wait_s
            parts["compute_s"] += (step_s - wait_s) * useful
            parts["padding_s"] += (step_s - wait_s) * (1 - useful)
        elif "set" in line:
            parts["lost_s" if is_lost else "evaluation_s"] += line.get("seconds") or 0.0
        elif line.get("event") == "saved":
            parts["checkpoint_s"] += line.get("blocked_s") or 0.0
    return _fitted(parts, life.wall_s)


def _startup_s(life: Life) -> float:
    """From the start to the first line; all of it, when nothing was trained."""
    first = next((line["time"] for line in life.lines if "time" in line), life.ended)
    return max(0.0, first - life.began) if first is not None and life.began is not None else 0.0


def _useful_share(line: Mapping[str, Any]) -> float:
    """Of a step's audio, the share that is no padding."""
    padded_s = line.get("padded_audio_s")
    return min(1.0, line["audio_s"] / padded_s) if padded_s and line.get("audio_s") else 1.0


def _fitted(parts: dict[str, float], wall_s: float) -> dict[str, float]:
    """No more than the wall time in all: means a step, times steps, may count a moment twice."""
    total_s = sum(parts.values())
    share = wall_s / total_s if total_s > wall_s > 0 else 1.0
    return {kind: spent_s * share for kind, spent_s in parts.items()}
