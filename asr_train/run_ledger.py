"""Where the time of a whole run went: its lives, what was lost of them, and their time in queues.

`status`, `watch` and `report` read it. A life is one start of a run: an attempt, or a start that came to none. Seconds
are means over the ranks of a life, so that its parts add up to its wall time, and those of all lives to the run's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from asr_train.ledger import PARTS

RUN_PARTS: Final[tuple[str, ...]] = (*PARTS, "lost", "queue", "unaccounted")
"""`ledger.PARTS`, and across lives: lost, all that was done after the step that the run went on from; queue, a job
waiting to start; unaccounted, what no line says, the end of a process for one."""


@dataclass(frozen=True, kw_only=True)
class LifeLedger:
    """One life.

    Attributes:
        spent_s: part -> seconds, those that took any, in the order of `RUN_PARTS`; they add up to `wall_s`.
        wall_s: from the queue to the last sign of life, by the clock.
        world_size: its ranks.
        ranks: the last ledger line's, of each rank; none where it came to no step.
    """

    spent_s: Mapping[str, float]
    wall_s: float
    world_size: int
    ranks: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunLedger:
    """All lives of a run. Time between two lives that no job waited in, a night say, is none of it."""

    lives: Sequence[LifeLedger]

    @cached_property
    def spent_s(self) -> dict[str, float]:
        """Part -> seconds of wall time, those that took any, in the order of `RUN_PARTS`."""
        return _summed(life.spent_s for life in self.lives)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Part -> share of the wall time."""
        return {part: spent_s / self.wall_s for part, spent_s in self.spent_s.items()}

    @cached_property
    def rank_s(self) -> dict[str, float]:
        """The same times the ranks of each life: what was paid for; a queue costs nothing."""
        paid = _summed(
            {part: spent_s * life.world_size for part, spent_s in life.spent_s.items()} for life in self.lives
        )
        return {part: 0.0 if part == "queue" else paid[part] for part in self.spent_s}

    @property
    def wall_s(self) -> float:
        """By the clock."""
        return sum(life.wall_s for life in self.lives)


def life_ledger(
    lines: Sequence[Mapping[str, Any]],
    *,
    began: float | None,
    ended: float | None,
    queue_s: float,
    kept_step: int,
    is_cut: bool,
    world_size: int,
) -> LifeLedger:
    """The account of one life.

    Args:
        lines: its lines of metrics.jsonl.
        began: unix time, at or before `process_began`; None where nothing says it.
        ended: unix time of its last sign of life; likewise.
        queue_s: what it waited in a queue before.
        kept_step: the run went on from this step; what came after it is lost.
        is_cut: it ended without a checkpoint of its last step, so that what it did after its last line is lost too.
        world_size: its ranks, where no line says it.
    """
    ledger = _ledger_lines(lines)
    wall_s = max(0.0, ended - began) if began is not None and ended is not None else 0.0
    spent_s = dict.fromkeys(RUN_PARTS, 0.0)
    spent_s |= _by_ledger(ledger, lines, kept_step, began) if ledger else {"startup": _startup_s(lines, wall_s, began)}
    spent_s["lost" if ledger and is_cut else "unaccounted"] += max(0.0, wall_s - sum(spent_s.values()))
    spent_s["queue"] = queue_s
    ranks = ledger[-1]["ranks"] if ledger else ()
    return LifeLedger(
        spent_s=_summed([spent_s]), wall_s=wall_s + queue_s, world_size=len(ranks) or world_size, ranks=ranks
    )


def process_began(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Unix time at which the ranks of a life began, by its ledger lines; None without one."""
    ledger = _ledger_lines(lines)
    return ledger[-1]["time"] - sum(_mean(ledger[-1]).values()) if ledger else None


def _ledger_lines(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that name ranks, oldest first; each holds sums since a rank's beginning."""
    return [line for line in lines if line.get("event") == "ledger" and line.get("ranks")]


def _by_ledger(
    ledger: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], kept_step: int, began: float | None
) -> dict[str, float]:
    """The last line's sums; what came after the step that the run went on from is lost, whatever it was spent on."""
    spent_s = _mean(ledger[-1])
    if kept_step < max(line["step"] for line in lines if "step" in line):
        before = _at_step(ledger, kept_step)
        kept_s = {part: min(part_s, before[part]) for part, part_s in spent_s.items()}
        spent_s = {**kept_s, "lost": sum(spent_s.values()) - sum(kept_s.values())}
    begun = process_began(ledger)
    if began is not None and begun is not None:  # a rank counts from its own beginning; what came before it started it
        spent_s["startup"] += max(0.0, begun - began)
    return spent_s


def _at_step(ledger: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The sums when a step was made: between two lines in proportion to the steps; before the first, the start-up."""
    after = next((number for number, line in enumerate(ledger) if line["step"] > step), None)
    if after is None:
        return _mean(ledger[-1])
    if after == 0:
        return {**dict.fromkeys(PARTS, 0.0), "startup": _mean(ledger[0])["startup"]}
    low, high = _mean(ledger[after - 1]), _mean(ledger[after])
    share = (step - ledger[after - 1]["step"]) / (ledger[after]["step"] - ledger[after - 1]["step"])
    return {part: low[part] + share * (high[part] - low[part]) for part in PARTS}


def _mean(line: Mapping[str, Any]) -> dict[str, float]:
    """Part -> seconds, the mean over the ranks of a ledger line."""
    ranks = line["ranks"]
    return {part: sum(rank[f"{part}_s"] for rank in ranks) / len(ranks) for part in PARTS}


def _startup_s(lines: Sequence[Mapping[str, Any]], wall_s: float, began: float | None) -> float:
    """Of a life without ledger lines: until its first training line; all of it where it made none."""
    first = next((line["time"] for line in lines if "loss" in line and "time" in line), None)
    return wall_s if first is None or began is None else min(wall_s, max(0.0, first - began))


def _summed(parts_s: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Part -> sum, those that took any time, in the order of `RUN_PARTS`."""
    entries = list(parts_s)
    totals = {part: sum(entry.get(part, 0.0) for entry in entries) for part in RUN_PARTS}
    return {part: total for part, total in totals.items() if total > 0}
