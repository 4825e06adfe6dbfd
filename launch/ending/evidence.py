"""The evidence, sorted: which ranks failed by themselves, which only lost a peer, who said nothing, what ended it."""

import math
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from launch.ending import signs
from launch.ending.signs import Sign
from launch.verdict import Evidence

NODE_STATES: Final = ("NODE_FAIL", "BOOT_FAIL")

EndedBy = Literal["cancelled", "user", "deadline", "time_limit", "preempted"]


@dataclass(frozen=True)
class Cause:
    """A rank's failure."""

    rank: int | None
    host: str | None
    time: float | None
    sign: Sign

    @property
    def where(self) -> str:
        """`rank 3 on n2`."""
        return where(self.rank, self.host)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The evidence, sorted.

    Attributes:
        causes: failures of their own, the first one first; not those that followed from a stop or a hang.
        lost: failures that only say that a peer is gone.
        mute_ranks: without a word, on nodes whose agent had one.
        mute_hosts: nodes whose agent said nothing.
        stopped: ranks stopped on request, which they do with a committed checkpoint only.
    """

    evidence: Evidence
    causes: tuple[Cause, ...]
    lost: tuple[Cause, ...]
    mute_ranks: tuple[int, ...]
    mute_hosts: tuple[str, ...]
    stopped: bool
    ended_by: EndedBy | None


def sort(evidence: Evidence) -> Attempt:
    """Sort the evidence; parts of it may be missing or torn."""
    causes: list[Cause] = []
    lost: list[Cause] = []
    heard = set()
    for rank, outcome in evidence.ranks.items():
        if outcome.get("status") in ("done", "stopped"):
            heard.add(rank)
            continue
        heard.add(rank)
        sign = signs.read_error(str(outcome.get("message") or ""), outcome.get("exit_code"))
        cause = Cause(rank, host_of(evidence, rank), as_number(outcome.get("time")), sign)
        own = sign.is_certain and sign.kind in ("out_of_memory", "hardware", "network")  # said while losing a peer
        (lost if outcome.get("lost_peer") and not own else causes).append(cause)
    for cause in _from_logs(evidence):
        if cause.sign.is_certain or cause.rank not in heard:
            (causes if cause.sign.is_certain else lost).append(cause)
    named = heard | {cause.rank for cause in (*causes, *lost)}
    mute_hosts = tuple(host for host, node in evidence.nodes.items() if not node.reported and node.preflight is None)
    gone = {rank for host in mute_hosts for rank in evidence.nodes[host].ranks}
    is_refused = any(node.preflight for node in evidence.nodes.values())  # on one node, so no rank of any began
    refused = {rank for node in evidence.nodes.values() for rank in node.ranks} if is_refused else set()
    return Attempt(
        evidence=evidence,
        causes=tuple(sorted((cause for cause in causes if not _follows(cause, evidence)), key=_by_time)),
        lost=tuple(sorted(lost, key=_by_time)),
        mute_ranks=tuple(rank for rank in range(evidence.num_ranks) if rank not in named | gone | refused),
        mute_hosts=mute_hosts,
        stopped=any(outcome.get("status") == "stopped" for outcome in evidence.ranks.values()),
        ended_by=_ended_by(evidence, mute_hosts),
    )


def _from_logs(evidence: Evidence) -> Iterator[Cause]:
    """What logs say of ranks that wrote no outcome, or only that a peer is gone."""
    told = {rank for rank, outcome in evidence.ranks.items() if not outcome.get("lost_peer")}
    for rank, text in evidence.tails.items():
        if rank not in told and (sign := signs.read_log(text)):
            yield Cause(rank, host_of(evidence, rank), None, sign)
    for host, node in evidence.nodes.items():
        mute = [rank for rank in node.ranks if rank not in evidence.ranks]
        if mute and (sign := signs.read_log(node.tail)) and sign.is_certain:
            killed = [rank for rank in signs.worker_exit_codes(node.tail) if rank in mute]
            yield Cause((killed or mute)[0], host, None, sign)


def _follows(cause: Cause, evidence: Evidence) -> bool:
    """Whether a failure may come of the stop, or of the end of a hang, before it; one that names a cause does not."""
    ends = [evidence.stop_time, evidence.hang.time if evidence.hang else None]
    after = [end for end in ends if end is not None and cause.time is not None and cause.time > end]
    return bool(after) and not cause.sign.is_certain


def _by_time(cause: Cause) -> tuple[float, int]:
    """Logs tell no time; one that names a cause of its own comes before all that do."""
    rank = -1 if cause.rank is None else cause.rank
    return (cause.time if cause.time is not None else -math.inf, rank)


def _ended_by(evidence: Evidence, mute_hosts: tuple[str, ...]) -> EndedBy | None:
    """What ended the attempt from outside."""
    state, reason = slurm_state(evidence), evidence.stop_reason or ""
    if state == "CANCELLED" or reason == "cancelled":
        return "cancelled"
    if reason and not reason.startswith("SIG"):
        return _meaning(reason)
    by_state: Mapping[str, EndedBy] = {"TIMEOUT": "time_limit", "PREEMPTED": "preempted", "DEADLINE": "deadline"}
    if state in by_state:
        return by_state[state]
    if state in (*NODE_STATES, "OUT_OF_MEMORY"):  # Slurm sends signals then, too
        return None
    if mute_hosts and reason == "SIGTERM":
        return None  # an agent that dies takes its step along
    if not reason:
        if mute_hosts or any(signal_in(node.exit_code) for node in evidence.nodes.values()):
            return None  # ranks whose launcher dies stop as if they had been asked
        said = (str(outcome.get("message")) for outcome in evidence.ranks.values())
        reason = next((text.removeprefix("stopped by ") for text in said if text.startswith("stopped by ")), "")
    if reason in ("SIGUSR1", "SIGUSR2") and state:
        return "time_limit"  # a job's warning signal
    return _meaning(reason) if reason else None


def _meaning(reason: str) -> EndedBy:
    if reason in ("time limit", "time_limit", "limits.max_time_s"):
        return "time_limit"
    return "preempted" if reason.startswith("preempt") else "user"


def slurm_state(evidence: Evidence) -> str:
    """The state's own word: sacct has `CANCELLED by 1000`."""
    found = re.match(r"[A-Z_]+", evidence.slurm_state or "")
    return found[0] if found else ""


def host_of(evidence: Evidence, rank: int) -> str | None:
    """By the nodes' reports; a rank knows its machine's name, which need not be Slurm's."""
    named = next((host for host, node in evidence.nodes.items() if rank in node.ranks), None)
    own = (evidence.ranks.get(rank) or {}).get("host")
    return named or (str(own) if own else None)


def all_hosts(attempt: Attempt) -> tuple[str, ...]:
    """The nodes of the attempt, by what ranks wrote where no node was reported."""
    ranks = (host_of(attempt.evidence, rank) for rank in attempt.evidence.ranks)
    return tuple(attempt.evidence.nodes) or tuple(sorted({host for host in ranks if host}))


def bad_hosts(attempt: Attempt) -> dict[str, str]:
    """Host -> a hardware error that speaks against it."""
    nodes = attempt.evidence.nodes
    return {host: n.hardware for host, n in nodes.items() if n.hardware and signs.is_fault_of_node(n.hardware)}


def failures(evidence: Evidence) -> list[tuple[int, Mapping[str, Any]]]:
    """(rank, outcome) of the ranks that neither finished nor stopped."""
    good = ("done", "stopped")
    return [(rank, outcome) for rank, outcome in evidence.ranks.items() if outcome.get("status") not in good]


def lost_before_the_end(attempt: Attempt) -> bool:
    """Whether a rank lost a peer before the attempt was asked to end."""
    end = attempt.evidence.stop_time
    return end is not None and any(cause.time is not None and cause.time < end for cause in attempt.lost)


def killed_ranks(attempt: Attempt) -> Iterator[tuple[int, int]]:
    """(rank, signal) of mute ranks that a signal ended, by torchrun's report, or their node's only child."""
    for node in attempt.evidence.nodes.values():
        codes = signs.worker_exit_codes(node.tail)
        if len(node.ranks) == 1 and node.exit_code is not None:
            codes.setdefault(node.ranks[0], node.exit_code)
        for rank, code in codes.items():
            if rank in attempt.mute_ranks and (number := signal_in(code)):
                yield rank, number


def signal_in(code: int | None) -> int | None:
    """The signal in an exit code: -9, or 137 as shells write it."""
    number = 0 if code is None else -code if code < 0 else code - 128
    return number if 0 < number < 65 else None


def signal_name(number: int) -> str:
    """`SIGKILL`."""
    known = {int(entry): entry.name for entry in signal.Signals}
    return known.get(number, f"signal {number}")


def newest_step(evidence: Evidence) -> int | None:
    """Of the newest checkpoint that there is."""
    steps = [step for step in (evidence.committed_step, evidence.resumed_step) if step is not None]
    return max(steps, default=None)


def num_lost_steps(evidence: Evidence) -> int:
    """Steps that this attempt made and that no checkpoint holds."""
    return max(0, (evidence.last_step or 0) - (newest_step(evidence) or 0))


def messages(attempt: Attempt) -> Iterator[str]:
    """What the failed ranks said."""
    yield from (str(outcome.get("message") or "") for _, outcome in failures(attempt.evidence))


def as_number(value: object) -> float | None:
    """A number from JSON, where it is one."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def where(rank: int | None, host: str | None) -> str:
    """`rank 3 on n2`."""
    name = "a rank" if rank is None else f"rank {rank}"
    return f"{name} on {host}" if host else name


def named(word: str, things: Iterable[object]) -> str:
    """`ranks 1, 2`."""
    names = [str(thing) for thing in things]
    return f"{word}{'s' if len(names) > 1 else ''} {', '.join(names)}"


def sentence(text: str) -> str:
    """With a capital, and the rest as it is."""
    return text[:1].upper() + text[1:]
