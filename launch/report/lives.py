"""The lives of a run on a timeline: each start, the attempt that it made, what of it was kept, how it ended."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from asr_train import lock
from asr_train.checkpoints import order
from launch.ending.starts import Start, starts, verdicts
from launch.jobs.submit import submissions
from launch.report.reading import Record


@dataclass(frozen=True, kw_only=True)
class Life:
    """One start of a run: an attempt, or a start that came to none.

    Times are seconds since the epoch; None where no file says. Steps are counted from the start of the run.

    Attributes:
        attempt: its number; None when the start ended before one began.
        start: the start's name, `123.0`; None when nobody but the user started it.
        queued: since when it waited in a queue; None without a queue.
        first_step: it went on from here; 0 at the very start.
        last_step: the last step that any file says it made.
        kept_step: the run went on from here, or would; what was made beyond it is lost, and made again.
        ending: one word: a verdict's kind, `done`, `stopped`, `failed`, `running`, or `unknown`.
        message: a sentence about it.
        facts: its first line of metrics.jsonl and its file in attempts/.
        lines: its lines of metrics.jsonl.
    """

    attempt: int | None
    start: str | None
    hosts: tuple[str, ...]
    queued: float | None
    began: float | None
    ended: float | None
    first_step: int = 0
    last_step: int = 0
    kept_step: int = 0
    ending: str = "unknown"
    message: str = ""
    facts: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"start {self.start}" if self.attempt is None else f"attempt {self.attempt}"

    @property
    def num_lost_steps(self) -> int:
        """Steps that it made and that are in no checkpoint that the run went on from."""
        return max(0, self.last_step - self.kept_step)

    @property
    def world_size(self) -> int | None:
        """Its processes."""
        size: int | None = self.facts.get("world_size")
        return size

    @property
    def queue_s(self) -> float:
        """How long it waited in a queue."""
        return max(0.0, self.began - self.queued) if self.queued is not None and self.began is not None else 0.0

    @property
    def wall_s(self) -> float:
        """How long it lasted."""
        return max(0.0, self.ended - self.began) if self.began is not None and self.ended is not None else 0.0


def read_lives(record: Record) -> list[Life]:
    """Every life of a run, oldest first."""
    known = {start.name: start for start in starts(record.run)}
    judged = {line["start"]: line for line in verdicts(record.run)}
    found = []
    for number in range(1, record.run.newest_attempt() + 1):
        facts: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # torn by a full disk
            facts = record.run.attempt_record(number)
        start = known.pop(str(facts.get("start")), None)
        found.append(_attempt(record, number, facts, start, judged.get(str(facts.get("start")))))
    found += [_without_attempt(start, judged.get(start.name)) for start in known.values()]
    found.sort(key=lambda life: life.began or 0.0)
    return _queued(record, _kept(record, _running(record, found)))


def _attempt(
    record: Record, number: int, facts: Mapping[str, Any], start: Start | None, verdict: Mapping[str, Any] | None
) -> Life:
    lines = [line for line in record.lines if line.get("attempt") == number]
    outcomes = record.run.outcomes(number)
    times = [line["time"] for line in lines if "time" in line]
    first_step = max(0, order(facts.get("resumed_from") or "")[0])
    begun = record.first_lines.get(number)
    if begun is not None:
        first_step = begun["step"]
    steps = [line["step"] for line in lines] + [outcome["step"] for outcome in outcomes.values() if "step" in outcome]
    ending, message = _ending(outcomes, verdict)
    ends = times + [outcome["time"] for outcome in outcomes.values() if "time" in outcome]
    return Life(
        attempt=number,
        start=facts.get("start"),
        hosts=start.hosts if start else tuple(filter(None, [facts.get("host")])),
        queued=None,
        began=start.time if start else facts.get("started", min(times, default=None)),
        ended=max(ends, default=None),
        first_step=first_step,
        last_step=max(steps, default=first_step),
        ending=ending,
        message=message,
        facts={**facts, **(begun or {})},
        lines=lines,
    )


def _without_attempt(start: Start, verdict: Mapping[str, Any] | None) -> Life:
    """A start whose nodes, network or code kept it from training."""
    ending, message = _ending({}, verdict)
    return Life(
        attempt=None, start=start.name, hosts=start.hosts, queued=None, began=start.time,
        ended=verdict["time"] if verdict else None, ending=ending, message=message,
        facts={"world_size": len(start.hosts) * start.processes_per_node},
    )  # fmt: skip


def _ending(outcomes: Mapping[int, Mapping[str, Any]], verdict: Mapping[str, Any] | None) -> tuple[str, str]:
    """A word and a sentence: the verdict's, or else by what the ranks wrote, of which the first failure counts."""
    if verdict is not None:
        return str(verdict["kind"]), str(verdict.get("message", ""))
    failed = [(rank, outcome) for rank, outcome in outcomes.items() if outcome.get("status") == "failed"]
    if failed:
        rank, first = min(failed, key=lambda pair: (bool(pair[1].get("lost_peer")), pair[1].get("time", 0.0)))
        return "failed", f"rank {rank} on {first.get('host')}: {first.get('message', '')}"
    for outcome in outcomes.values():
        return str(outcome.get("status", "unknown")), str(outcome.get("message", ""))
    return "unknown", "it wrote nothing about its end: killed, or its machine was lost"


def _kept(record: Record, lives: Sequence[Life]) -> list[Life]:
    """Say of each what the run went on from: where the next attempt began, or what the last one has saved."""
    found = []
    after: Life | None = None
    for life in reversed(lives):
        if life.attempt is None:
            kept = life.first_step
        elif after is not None:
            kept = min(life.last_step, after.first_step)
        elif record.done or life.ending == "running":
            kept = life.last_step
        else:
            saved = [line["step"] for line in life.lines if line.get("event") == "saved"]
            kept = max(life.first_step, order(life.facts.get("committed") or "")[0], *saved)
        found.append(replace(life, kept_step=kept))
        after = life if life.attempt is not None else after
    return found[::-1]


def _queued(record: Record, lives: Sequence[Life]) -> list[Life]:
    """Say since when each waited: since its job was submitted, or since the start before it ended, put back."""
    queued_since: dict[str, float] = {entry.job_id: entry.submitted for entry in submissions(record.run)}
    found: list[Life] = []
    for life in lives:
        job = (life.start or "").partition(".")[0]
        found.append(replace(life, queued=queued_since.get(job)))
        if life.ended is not None and job in queued_since:
            queued_since[job] = life.ended
    return found


def _running(record: Record, lives: Sequence[Life]) -> list[Life]:
    """Call the newest one running, where somebody holds the run's lock."""
    if not lives or lives[-1].ending != "unknown" or lock.holder(record.run.path / "lock.json") is None:
        return list(lives)
    message = "it was being trained when this page was made"
    return [*lives[:-1], replace(lives[-1], ending="running", message=message)]
