"""The rules: each says what it makes of an attempt, or None; the first that applies decides. See docs/verdicts.md."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from asr_train import lock
from launch.ending import signs
from launch.ending.evidence import (
    NODE_STATES,
    Attempt,
    Cause,
    all_hosts,
    bad_hosts,
    host_of,
    killed_ranks,
    lost_before_the_end,
    named,
    sentence,
    signal_in,
    signal_name,
    slurm_state,
    where,
)
from launch.ending.signs import Sign
from launch.verdict import RETRY, Action, Kind

_STOP_AT_ONCE: Final = ("out_of_memory", "recipe", "data", "code", "no_checkpoint")
_STATES: Final = {"T": "stopped by a signal", "t": "held by a debugger", "D": "waiting for a disk or a driver",
                  "Z": "dead, and not yet collected"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says, before the past is looked at."""

    kind: Kind
    action: Action
    what: str
    advice: str = ""
    cause: Cause | None = None
    known_by: str = ""  # what makes it the same failure as another
    hosts: tuple[str, ...] = ()
    exclude: tuple[tuple[str, str], ...] = ()  # host, reason
    is_guess: bool = False  # of a node's failure: Slurm has not said so
    by_itself: bool = False
    wait_s: float = 0.0
    step: int | None = None


def _done(attempt: Attempt) -> Finding | None:
    evidence = attempt.evidence
    if evidence.is_done or (evidence.ranks.get(0) or {}).get("status") == "done":
        return Finding(kind="done", action="done", what="The run is done")
    return None


def _asked_to_end(attempt: Attempt) -> Finding | None:
    """By a person, or a deadline: nothing goes on by itself."""
    first = attempt.causes[0] if attempt.causes else None
    before = f"; before that, {first.where} failed: {first.sign.text}" if first and not attempt.stopped else ""
    if attempt.ended_by == "cancelled":
        by = f" by {attempt.evidence.cancelled_by}" if attempt.evidence.cancelled_by else ""
        return Finding(kind="cancelled", action="stop", what=f"The job was cancelled{by}{before}", advice=_BY_HAND)
    if attempt.ended_by == "deadline":
        what = f"The job's deadline passed{before}"
        return Finding(kind="time_limit", action="stop", what=what, advice=_BY_HAND)
    if attempt.ended_by == "user":
        if first and not attempt.stopped:
            return replace(_of_cause(first, attempt), action="stop", advice=first.sign.advice or _BY_HAND)
        reason = attempt.evidence.stop_reason
        by = f" ({reason})" if reason and reason != "user" else ""
        return Finding(kind="stopped_by_user", action="stop", what=f"Stopped on request{by}", advice=_BY_HAND)
    return None


def _stopped(attempt: Attempt) -> Finding | None:
    """The ranks stopped and saved: what any of them did afterwards loses nothing."""
    return _ended_outside(attempt) if attempt.stopped else None


def _preflight(attempt: Attempt) -> Finding | None:
    nodes = attempt.evidence.nodes
    refused = {host: node.preflight for host, node in nodes.items() if node.preflight}
    if not refused:
        return None
    host, problem = next(iter(refused.items()))
    others = f" (and on {', '.join(list(refused)[1:])})" if len(refused) > 1 else ""
    finding = Finding(
        kind="preflight",
        action="continue",
        what=f"The check of the node failed on {host}{others}: {problem}",
        known_by=str(problem),
        hosts=tuple(refused),
        exclude=tuple((name, str(text)) for name, text in refused.items()),
    )
    if len(refused) == len(nodes) > 1:
        return replace(finding, action="stop", advice=f"It is so on all nodes: mend it, then {RETRY}")
    return finding


def _hardware(attempt: Attempt) -> Finding | None:
    bad = bad_hosts(attempt)
    first = attempt.causes[0] if attempt.causes else None
    if first and first.sign.kind == "hardware":
        return _of_cause(first, attempt)
    if not bad or (first and first.sign.is_certain and first.host not in bad):
        return None
    host, text = next(iter(bad.items()))
    on_host = next((cause for cause in (*attempt.causes, *attempt.lost) if cause.host == host), None)
    return Finding(
        kind="hardware",
        action="continue",
        what=f"Hardware error on {host}: {text}",
        cause=on_host,
        known_by=text,
        hosts=tuple(bad),
        exclude=tuple(bad.items()),
    )


def _named_cause(attempt: Attempt) -> Finding | None:
    """A failure that says its cause."""
    first = attempt.causes[0] if attempt.causes else None
    return _of_cause(first, attempt) if first and first.sign.is_certain else None


def _slurm_saw_memory(attempt: Attempt) -> Finding | None:
    if slurm_state(attempt.evidence) != "OUT_OF_MEMORY":
        return None
    killed = next(killed_ranks(attempt), None)
    rank = killed[0] if killed else attempt.mute_ranks[0] if attempt.mute_ranks else None
    host = None if rank is None else host_of(attempt.evidence, rank)
    sign = signs.read_error("Slurm: OUT_OF_MEMORY, oom-kill")
    who = "" if rank is None else f": {where(rank, host)} was killed"
    what = f"Out of memory of the host{who}. Slurm ended a process that took more than the job had asked for"
    return Finding(
        kind="out_of_memory", action="stop", what=what, advice=sign.advice, cause=Cause(rank, host, None, sign),
        by_itself=True, hosts=all_hosts(attempt),
    )  # fmt: skip


def _node_failure(attempt: Attempt) -> Finding | None:
    evidence, state = attempt.evidence, slurm_state(attempt.evidence)
    is_said = state in NODE_STATES
    is_alone = len(attempt.mute_hosts) == len(evidence.nodes) and not evidence.ranks
    if not is_said and (not attempt.mute_hosts or is_alone):
        return None
    if attempt.ended_by is not None and not is_said and not lost_before_the_end(attempt):
        return None  # agents that are ended with their job say nothing
    hosts = evidence.down_hosts or attempt.mute_hosts
    is_known = len(hosts) < len(evidence.nodes) or len(evidence.nodes) == 1  # agents that end with their job are mute
    reason = f"Slurm: {state}" if is_said else "its agent said nothing at its end"
    return Finding(
        kind="node_failure",
        action="continue",
        what=f"Lost {named('node', hosts) if hosts and is_known else 'a node'}: {reason}",
        hosts=hosts,
        exclude=tuple((host, reason) for host in hosts) if is_known else (),
        is_guess=not is_said,
    )


def _own_failure(attempt: Attempt) -> Finding | None:
    """A failure that may be anything."""
    return _of_cause(attempt.causes[0], attempt) if attempt.causes else None


def _hang(attempt: Attempt) -> Finding | None:
    hang, evidence = attempt.evidence.hang, attempt.evidence
    timed_out = next((cause for cause in attempt.lost if signs.says_timeout(cause.sign.text)), None)
    if hang is None:
        if timed_out is None or attempt.ended_by is not None or attempt.mute_ranks:
            return None
        what = f"The ranks waited in vain for one of them: {timed_out.sign.text}"
        return Finding(kind="hang", action="retry", what=what, known_by="hang", by_itself=True)
    ends = (hang.time, evidence.stop_time)
    if attempt.ended_by and ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        return None  # what was being ended anyway
    state = f" (its process is {_STATES[hang.state]})" if hang.state in _STATES else ""
    who = where(hang.rank, hang.host) if hang.rank is not None or hang.host else "the attempt"
    at = "" if hang.step is None else f" at step {hang.step}"
    sign = Sign("failed", f"hung in phase {hang.phase}{at}{state}")
    return Finding(
        kind="hang",
        action="retry",
        what=f"{sentence(who)} hung in phase {hang.phase}{at}{state}",
        cause=Cause(hang.rank, hang.host, hang.time, sign),
        known_by=f"hang in {hang.phase}",
        hosts=all_hosts(attempt),
        by_itself=True,
        step=hang.step,
    )


def _ended_outside(attempt: Attempt) -> Finding | None:
    texts: Mapping[str, tuple[Kind, str]] = {
        "time_limit": ("time_limit", "The time limit came"),
        "preempted": ("preempted", "The job was preempted"),
    }
    if attempt.ended_by is None or attempt.ended_by not in texts:
        return None
    kind, what = texts[attempt.ended_by]
    return Finding(kind=kind, action="continue", what=what, exclude=tuple(bad_hosts(attempt).items()))


def _without_word(attempt: Attempt) -> Finding | None:
    """A rank that was killed, or that ended before it could say anything."""
    evidence = attempt.evidence
    killed = dict(killed_ranks(attempt))
    launchers = {host: number for host, node in evidence.nodes.items() if (number := signal_in(node.exit_code))}
    if not attempt.mute_ranks and launchers:
        where_it_was, number = next(iter(launchers.items()))
        what = f"The launcher on {where_it_was} was killed by {signal_name(number)}"
        return Finding(kind="failed", action="retry", what=what, hosts=all_hosts(attempt), by_itself=True)
    if not attempt.mute_ranks or not (killed or attempt.lost or evidence.ranks or any(evidence.tails.values())):
        return None
    spoke = [mute for mute in attempt.mute_ranks if signs.last_error(evidence.tails.get(mute, ""))]
    rank: int = next(iter(killed), (spoke or list(attempt.mute_ranks))[0])
    host = host_of(evidence, rank)
    text = signs.last_error(evidence.tails.get(rank, "")) or "it was killed, for want of memory perhaps"
    if rank in killed:
        text = f"killed by {signal_name(killed[rank])}"
    is_locked = "is being trained by" in text  # by an attempt that died; its heartbeat has to grow cold
    return Finding(
        kind="failed",
        action="retry",
        what=f"No word from {where(rank, host)}: {text}",
        cause=Cause(rank, host, None, Sign("failed", text)),
        known_by=text,
        hosts=all_hosts(attempt),
        by_itself=True,
        wait_s=lock.STALE_S if is_locked else 0.0,
    )


def _network(attempt: Attempt) -> Finding | None:
    """All that is known is that nodes did not meet, or that ranks lost one another."""
    if not attempt.lost:
        nodes = attempt.evidence.nodes
        host, text = next(((host, node.network) for host, node in nodes.items() if node.network), (None, None))
        if host is None:
            return None
        return Finding(
            kind="network", action="retry", what=f"The nodes did not meet: {host}: {text}", known_by=str(text)
        )
    first = attempt.lost[0]
    what = f"{sentence(first.where)} lost the others, and none of them failed: {first.sign.text}"
    return Finding(kind="network", action="retry", what=what, cause=first, known_by=first.sign.text)


def _anything(attempt: Attempt) -> Finding:
    evidence = attempt.evidence
    if attempt.stopped:
        return Finding(kind="stopped_by_user", action="stop", what="Stopped, it is not known by whom", advice=_BY_HAND)
    state = f"; Slurm says {slurm_state(evidence)}" if slurm_state(evidence) else ""
    codes = [f"{host}: exit code {node.exit_code}" for host, node in evidence.nodes.items() if node.exit_code]
    what = f"The attempt ended without a word from any rank{state}{'; ' if codes else ''}{', '.join(codes)}"
    return Finding(kind="unknown", action="retry", what=what, hosts=all_hosts(attempt), by_itself=True)


_BY_HAND: Final = f"Only {RETRY} goes on with it"
RULES: Final[tuple[Callable[[Attempt], Finding | None], ...]] = (
    _done, _asked_to_end, _stopped, _preflight, _hardware, _named_cause, _slurm_saw_memory, _node_failure,
    _own_failure, _hang, _ended_outside, _without_word, _network, _anything,
)  # fmt: skip


def _of_cause(cause: Cause, attempt: Attempt) -> Finding:
    """The finding that a rank's own failure makes."""
    kind = cause.sign.kind
    action: Action = "stop" if kind in _STOP_AT_ONCE else "continue" if kind == "hardware" else "retry"
    blamed = (cause.host,) if kind == "hardware" and cause.host else all_hosts(attempt)
    return Finding(
        kind=kind,
        action=action,
        what=f"{sentence(cause.where)} failed: {cause.sign.text}",
        advice=cause.sign.advice,
        cause=cause,
        known_by=cause.sign.text,
        hosts=blamed,
        exclude=tuple((host, cause.sign.text) for host in blamed) if kind == "hardware" else (),
        by_itself=kind not in ("hardware", "network"),
    )
