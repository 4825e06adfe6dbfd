"""The lives of a run on a timeline: each start, the attempt that it made, what of it was kept, how it ended."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from asr_train import lock
from asr_train.checkpoints import order
from asr_train.run_dir import RunDir
from asr_train.run_ledger import LifeLedger, RunLedger, life_ledger, process_began
from launch.ending.starts import Start, starts, verdicts
from launch.jobs.submit import submissions


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
        is_cut: it ended without a checkpoint of its last step.
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
    is_cut: bool = False
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

    @cached_property
    def ledger(self) -> LifeLedger:
        """Where its time went."""
        return life_ledger(
            self.lines, began=self.began, ended=self.ended, queue_s=self.queue_s, kept_step=self.kept_step,
            is_cut=self.is_cut, world_size=self.world_size or 1,
        )  # fmt: skip


def read_lives(run: RunDir, lines: Sequence[Mapping[str, Any]]) -> list[Life]:
    """Every life of a run, oldest first; `lines` are those of metrics.jsonl that name a step."""
    known = {start.name: start for start in starts(run)}
    judged = {line["start"]: line for line in verdicts(run)}
    of_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        of_attempt.setdefault(line.get("attempt", 0), []).append(line)
    found = []
    for number in range(1, run.newest_attempt() + 1):
        facts: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # torn by a full disk
            facts = run.attempt_record(number)
        start = known.pop(str(facts.get("start")), None)
        verdict = judged.get(str(facts.get("start")))
        found.append(_attempt(run, number, facts, of_attempt.get(number, []), start, verdict))
    found += [_without_attempt(run, start, judged.get(start.name)) for start in known.values()]
    found.sort(key=lambda life: life.began or 0.0)
    return _queued(run, _kept(run, _running(run, found)))


def run_ledger(lives: Sequence[Life]) -> RunLedger:
    """Where the time of a run went, by all its lives."""
    return RunLedger([life.ledger for life in lives])


def _attempt(
    run: RunDir, number: int, facts: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], start: Start | None,
    verdict: Mapping[str, Any] | None,
) -> Life:  # fmt: skip
    outcomes = run.outcomes(number)
    times = [line["time"] for line in lines if "time" in line]
    begins = (facts.get("started", min(times, default=None)), process_began(lines))
    first_step = max(0, order(facts.get("resumed_from") or "")[0])
    begun = next((line for line in lines if line.get("event") in ("started", "restored")), None)
    if begun is not None:
        first_step = begun["step"]
    steps = [line["step"] for line in lines] + [outcome["step"] for outcome in outcomes.values() if "step" in outcome]
    ending, message = _ending(outcomes, verdict)
    ends = times + [outcome["time"] for outcome in outcomes.values() if "time" in outcome] + _ends(run, start)
    return Life(
        attempt=number,
        start=facts.get("start"),
        hosts=start.hosts if start else tuple(filter(None, [facts.get("host")])),
        queued=None,
        began=start.time if start else min((when for when in begins if when is not None), default=None),
        ended=max(ends, default=None),
        first_step=first_step,
        last_step=max(steps, default=first_step),
        is_cut=not {"done", "stopped"} & {outcome.get("status") for outcome in outcomes.values()},
        ending=ending,
        message=message,
        facts={**facts, **(begun or {})},
        lines=lines,
    )


def _without_attempt(run: RunDir, start: Start, verdict: Mapping[str, Any] | None) -> Life:
    """A start whose nodes, network or code kept it from training."""
    ending, message = _ending({}, verdict)
    return Life(
        attempt=None, start=start.name, hosts=start.hosts, queued=None, began=start.time,
        ended=max(_ends(run, start), default=verdict["time"] if verdict else None), ending=ending, message=message,
        facts={"world_size": len(start.hosts) * start.processes_per_node},
    )  # fmt: skip


def _ends(run: RunDir, start: Start | None) -> list[float]:
    """When the agents of a start's nodes saw its ranks end; of those that lived to say it."""
    reports = {} if start is None else start.meeting(run, 0).reports(timeout_s=0)
    return [report["time"] for report in reports.values()]


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


def _kept(run: RunDir, lives: Sequence[Life]) -> list[Life]:
    """Say of each what the run went on from: where a later attempt began, or what the last one has saved.

    An attempt that ended before it chose a checkpoint says nothing of those before it; one that went back to an old
    checkpoint, the newer being damaged, takes steps from all of them.
    """
    found = []
    after: int | None = None  # where the attempts after this one have begun, the earliest
    for life in reversed(lives):
        has_begun = "event" in life.facts  # its first line of metrics.jsonl
        if after is not None:
            kept = min(life.last_step, max(life.first_step, after))
        elif not has_begun or run.done.exists() or life.ending == "running":
            kept = life.last_step
        else:
            saved = [line["step"] for line in life.lines if line.get("event") == "saved"]
            kept = max(life.first_step, order(life.facts.get("committed") or "")[0], *saved)
        found.append(replace(life, kept_step=kept))
        if has_begun:
            after = life.first_step if after is None else min(after, life.first_step)
    return found[::-1]


def _queued(run: RunDir, lives: Sequence[Life]) -> list[Life]:
    """Say since when each waited: since its job was submitted, or since the start before it ended, put back.

    A job that was submitted while another trained the run waited for that one, until its end.
    """
    submitted: dict[str, float] = {entry.job_id: entry.submitted for entry in submissions(run)}
    found: list[Life] = []
    free = 0.0  # since when nobody trains the run
    for life in lives:
        since = submitted.get((life.start or "").partition(".")[0])
        found.append(life if since is None else replace(life, queued=max(since, free)))
        free = max(free, life.ended or life.began or 0.0)
    return found


def _running(run: RunDir, lives: Sequence[Life]) -> list[Life]:
    """Call the newest one running, where somebody holds the run's lock."""
    if not lives or lives[-1].ending != "unknown" or lock.holder(run.path / "lock.json") is None:
        return list(lives)
    message = "it was being trained when this page was made"
    return [*lives[:-1], replace(lives[-1], ending="running", message=message, is_cut=False)]
