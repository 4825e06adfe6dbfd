"""The ledger of a whole run, from its files: all attempts, what they lost, and the time between them.

Seconds are means over an attempt's ranks, so that its parts add up to its life, and all parts to the run's.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from asr_train.files import read_jsonl
from asr_train.ledger import PARTS
from asr_train.run_dir import RunDir

LOST: Final = "lost_steps"
BETWEEN: Final = "between_attempts"
ALL_PARTS: Final[tuple[str, ...]] = (*PARTS, LOST, BETWEEN)
"""`ledger.PARTS`, and across attempts: lost_steps, all that was done after the checkpoint that the next attempt started
from; between_attempts, in the queue or not started."""


@dataclass(frozen=True, kw_only=True)
class AttemptLedger:
    """One attempt.

    Attributes:
        number: of the attempt.
        begun, ended: unix time; `ended` is the last sign of life that it wrote.
        parts: part -> seconds, mean over ranks; they add up to ended - begun.
        num_lost_steps: steps made beyond the checkpoint that the next attempt started from.
        ranks: the last ledger line's, of each rank.
    """

    number: int
    begun: float
    ended: float
    parts: Mapping[str, float]
    num_lost_steps: int
    ranks: Sequence[Mapping[str, Any]]

    @property
    def world_size(self) -> int:
        """Number of ranks; 0 when it did not come to its first step."""
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class RunLedger:
    """A run's attempts and where its time went: part -> seconds of wall time, which `parts` adds up to."""

    attempts: tuple[AttemptLedger, ...]
    parts: Mapping[str, float]
    wall_s: float
    rank_seconds: float  # of all ranks of all attempts: what was paid for

    @property
    def shares(self) -> dict[str, float]:
        """Part -> share of the wall time; parts that took none are left out."""
        return {part: seconds / self.wall_s for part, seconds in self.parts.items() if seconds > 0 and self.wall_s > 0}


def read_run_ledger(run: RunDir) -> RunLedger | None:
    """The ledger of a run as far as its files tell; None before its first attempt."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for line in read_jsonl(run.metrics):
        lines.setdefault(line.get("attempt", 0), []).append(line)
    numbers = range(1, run.newest_attempt() + 1)
    records = {}
    for number in numbers:
        with suppress(OSError, ValueError):  # torn by a full disk
            record = run.attempt_record(number)
            if "started" in record:
                records[number] = record
    found: list[AttemptLedger] = []
    for number, record in records.items():
        later = [next_ for next_ in records if next_ > number]
        restart = _started_from(lines.get(later[0], [])) if later else None
        found.append(_attempt(run, number, record, lines.get(number, []), restart))
    if not found:
        return None
    parts = dict.fromkeys(ALL_PARTS, 0.0)
    for attempt in found:
        for part, seconds in attempt.parts.items():
            parts[part] += seconds
    ends = [found[0].begun]
    for attempt in found:
        parts[BETWEEN] += max(0.0, attempt.begun - ends[-1])
        ends.append(max(ends[-1], attempt.ended))
    return RunLedger(
        attempts=tuple(found),
        parts=parts,
        wall_s=sum(parts.values()),
        rank_seconds=sum((a.ended - a.begun) * max(1, a.world_size) for a in found),
    )


def _attempt(
    run: RunDir, number: int, record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], restart: int | None
) -> AttemptLedger:
    """One attempt; `restart` is the step that the next one started from, where there is a next one."""
    ledgers = [line for line in lines if line.get("event") == "ledger"]
    ends = [line["time"] for line in lines if "time" in line]
    ends += [outcome["time"] for outcome in run.outcomes(number).values() if "time" in outcome]
    parts = dict.fromkeys(ALL_PARTS, 0.0)
    if not ledgers:
        begun = float(record["started"])
        ended = max([begun, *ends])
        parts["startup"] = ended - begun
        return AttemptLedger(number=number, begun=begun, ended=ended, parts=parts, num_lost_steps=0, ranks=())
    last = ledgers[-1]
    begun = last["time"] - _mean(last)["wall"]
    ended = max([last["time"], *ends])
    for part, seconds in _mean(last).items():
        if part in parts:
            parts[part] = seconds
    parts["other"] += max(0.0, ended - begun - sum(parts.values()))  # what came after its last line
    made = max([line["step"] for line in lines if "step" in line], default=0)
    num_lost = 0 if restart is None else max(0, made - restart)
    if num_lost and restart is not None:
        kept = _at(ledgers, restart)
        for part in PARTS:
            kept_s = min(parts[part], kept.get(part, 0.0))
            parts[LOST] += parts[part] - kept_s
            parts[part] = kept_s
    return AttemptLedger(
        number=number, begun=begun, ended=ended, parts=parts, num_lost_steps=num_lost, ranks=last["ranks"]
    )


def _started_from(lines: Sequence[Mapping[str, Any]]) -> int | None:
    """Step that an attempt started from; None when it did not come so far."""
    return next((line["step"] for line in lines if line.get("event") in ("started", "restored")), None)


def _mean(line: Mapping[str, Any]) -> dict[str, float]:
    """Part -> seconds, mean over the ranks of a ledger line; `wall` too."""
    ranks = line["ranks"]
    return {part: sum(rank[f"{part}_s"] for rank in ranks) / len(ranks) for part in (*PARTS, "wall")}


def _at(ledgers: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The parts when `step` was made, between two lines in proportion to the steps."""
    before = [line for line in ledgers if line["step"] <= step]
    after = [line for line in ledgers if line["step"] > step]
    if not after:
        return _mean(ledgers[-1])
    if not before:
        return {}
    low, high = _mean(before[-1]), _mean(after[0])
    share = (step - before[-1]["step"]) / (after[0]["step"] - before[-1]["step"])
    return {part: low[part] + share * (high[part] - low[part]) for part in low}
