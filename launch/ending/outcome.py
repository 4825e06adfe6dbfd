"""How an attempt ended and what follows: a pure function from evidence to verdict. The table is docs/verdicts.md.

What the rules found is held against the attempts before: the same failure again, the budget of failures, the room for
excluded nodes.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CHECKPOINT, EXIT_OUT_OF_MEMORY, EXIT_STOPPED, EXIT_USAGE
from launch.ending.evidence import (
    Attempt,
    as_number,
    failures,
    host_of,
    killed_ranks,
    messages,
    named,
    newest_step,
    num_lost_steps,
    signal_name,
    sort,
)
from launch.ending.rules import RULES, Finding
from launch.verdict import RETRY, Evidence, Exclusion, History, Line, Policy, Verdict

_DEFAULT: Final = Policy()
_MAX_NAMED = 20  # utterances in a message
_LOSS_OF = re.compile(r"step (\d+) \(loss of (.+?)\); checkpoints")  # `training_log.count_skip`


def judge(evidence: Evidence, history: History = (), policy: Policy = _DEFAULT) -> Verdict:
    """The verdict on an attempt.

    Args:
        evidence: what was collected; parts may be missing or torn.
        history: verdicts on the attempts before it, since the run began or a person last retried it.
        policy: how often to try.
    """
    attempt = sort(evidence)
    finding = next(found for rule in RULES if (found := rule(attempt)) is not None)
    finding = replace(
        finding, known_by=_without_numbers(finding.known_by or finding.what), step=_step(finding, attempt)
    )
    for revise in (_backed_off, _repeated, _kept_off, _within_budget):
        finding = revise(finding, attempt, history, policy)
    return _verdict(finding, attempt, history, policy)


def _backed_off(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> Finding:
    """Network: wait longer each time, and not for ever."""
    if finding.kind != "network" or finding.action == "stop":
        return finding
    past = () if attempt.evidence.committed_step is not None else tuple(_since_commit(history))
    tried = sum(verdict.kind == "network" for verdict in past)
    if tried < len(policy.network_waits_s):
        return replace(finding, wait_s=policy.network_waits_s[tried])
    tries = "Another try" if tried == 1 else f"{tried} tries"
    advice = f"{tries} did not help. Look at the network, then {RETRY}"
    return replace(finding, action="stop", advice=advice)


def _repeated(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> Finding:
    """The same failure at the same step stops the run; on disjoint nodes it is not the node."""
    if finding.action not in ("continue", "retry") or finding.kind in ("network", "node_failure"):
        return finding
    alike = [past for past in history if (past.kind, past.cause) == (finding.kind, finding.known_by)]
    if finding.by_itself and any(past.step == finding.step for past in alike):
        at = "before the first step" if finding.step is None else f"at step {finding.step}"
        advice = f"It failed so {at} in an earlier attempt already, and would again.{_named_utterances(attempt)}"
        return replace(finding, action="stop", advice=advice)
    if attempt.evidence.committed_step is not None or finding.kind == "hang":
        return finding
    hosts = set(finding.hosts)
    recent = {id(past) for past in _since_commit(history)}
    elsewhere = next((p for p in alike if id(p) in recent and p.hosts and hosts and not hosts & set(p.hosts)), None)
    if elsewhere is None:
        return finding
    advice = f"It failed so on {', '.join(elsewhere.hosts)} too: it is the code or its settings, not the node."
    return replace(finding, kind="code", action="stop", exclude=(), by_itself=True, advice=advice)


def _kept_off(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> Finding:
    """Exclude as many nodes as there is room for; without room, a node that will fail again stops the run."""
    if finding.action not in ("continue", "retry"):
        return replace(finding, exclude=())
    excluded = set(attempt.evidence.excluded_hosts)
    new = [entry for entry in finding.exclude if entry[0] not in excluded]
    room = max(0, policy.max_excluded_hosts - len(excluded))
    blames = finding.kind in ("hardware", "preflight") or (finding.kind == "node_failure" and finding.is_guess)
    if len(new) > room and blames:
        advice = (
            f"{len(excluded)} nodes are excluded already, and {policy.max_excluded_hosts} may be. Have them looked at"
            if policy.max_excluded_hosts
            else f"There is no other node to go on with. Have it looked at, then {RETRY}"
        )
        return replace(finding, action="stop", exclude=(), advice=advice)
    return replace(finding, exclude=tuple(new[:room]))


def _within_budget(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> Finding:
    """Stop after so many attempts that failed by themselves and saved nothing; those ended from outside don't count."""
    used = _num_failed(finding, attempt, history)
    if finding.action not in ("continue", "retry") or used < policy.max_failed_attempts:
        return finding
    advice = f"{used} attempts failed by themselves with nothing new saved.{_named_utterances(attempt)} {_MEND}"
    return replace(finding, action="stop", exclude=(), wait_s=0.0, advice=advice.strip())


_MEND: Final = f"Mend the cause, then {RETRY}"


def _num_failed(finding: Finding, attempt: Attempt, history: History) -> int:
    """Attempts that failed by themselves since the last commit, this one included."""
    if attempt.evidence.committed_step is not None:
        return 0
    return sum(past.by_itself for past in _since_commit(history)) + finding.by_itself


def _since_commit(history: History) -> Iterator[Verdict]:
    """The attempts after the last one that saved something."""
    last = max((index for index, past in enumerate(history) if past.committed), default=-1)
    yield from history[last + 1 :]


def _verdict(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> Verdict:
    evidence, cause = attempt.evidence, finding.cause
    committed = evidence.committed_step is not None
    goes_on = finding.action in ("continue", "retry")
    return Verdict(
        kind=finding.kind,
        action=finding.action,
        message=_message(finding, attempt, history, policy),
        evidence=tuple(_lines(finding, attempt)),
        rank=cause.rank if cause else None,
        host=cause.host if cause else None,
        step=finding.step,
        cause=finding.known_by,
        hosts=finding.hosts,
        utterances=_utterances(attempt) if finding.by_itself else (),
        by_itself=finding.by_itself,
        committed=committed,
        uses_budget=finding.by_itself and not committed,
        num_lost_steps=0 if finding.kind == "done" else num_lost_steps(evidence),
        exclude_hosts=tuple(
            Exclusion(host=host, until=evidence.time + policy.exclusion_s, reason=reason)
            for host, reason in finding.exclude
        ),
        wait_s=finding.wait_s if goes_on else 0.0,
        exit_code=_exit_code(finding, attempt),
    )


def _message(finding: Finding, attempt: Attempt, history: History, policy: Policy) -> str:
    if finding.action == "done":
        return f"{finding.what}."
    evidence, parts = attempt.evidence, [finding.what]
    newest = newest_step(evidence)
    start = f"from the checkpoint of step {newest}" if newest is not None else "from the start: nothing is saved yet"
    lost = num_lost_steps(evidence)
    made = f"{lost} step{'s' if lost > 1 else ''} made {'since' if newest is not None else 'so far'}"
    again = f"; {made} {'are' if lost > 1 else 'is'} lost" if lost else ""
    if finding.action == "stop":
        parts.append(finding.advice.replace(RETRY, policy.retry_with))
        parts.append("" if finding.kind == "no_checkpoint" else f"It can go on {start}{again}")
    elif finding.action == "continue":
        parts += [f"Going on {start}{again}", _kept_off_text(finding), _fruitless(finding, attempt, history)]
    else:
        used = _num_failed(finding, attempt, history)
        count = f" (failure {used} of {policy.max_failed_attempts} with nothing new saved)" if used else ""
        wait = f"in {finding.wait_s:.0f} s " if finding.wait_s else ""
        parts.append(f"Trying again {wait}{start}{count}{again}")
        parts.append(_kept_off_text(finding))
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)


def _kept_off_text(finding: Finding) -> str:
    return f"Without {', '.join(host for host, _ in finding.exclude)} for now" if finding.exclude else ""


def _fruitless(finding: Finding, attempt: Attempt, history: History) -> str:
    """A hint where attempts are too short to ever save anything; they don't count as failures."""
    past = list(_since_commit(history))
    is_so = finding.kind in ("time_limit", "preempted") and attempt.evidence.committed_step is None
    same = sum(verdict.kind == finding.kind for verdict in past) + 1
    if not is_so or same < 2:
        return ""
    return f"{same} such attempts saved nothing: ask for more time, or save more often (checkpoint.every)"


def _exit_code(finding: Finding, attempt: Attempt) -> int:
    evidence = attempt.evidence
    if finding.kind in ("stopped_by_user", "time_limit", "preempted", "cancelled"):
        is_saved = newest_step(evidence) is not None and num_lost_steps(evidence) == 0
        return EXIT_STOPPED if is_saved else EXIT_FAILED
    codes = {
        "done": EXIT_DONE, "recipe": EXIT_USAGE, "no_checkpoint": EXIT_NO_CHECKPOINT,
        "out_of_memory": EXIT_OUT_OF_MEMORY,
    }  # fmt: skip
    return codes.get(finding.kind, EXIT_FAILED)


def _lines(finding: Finding, attempt: Attempt) -> Iterator[Line]:
    """The evidence, worst first: the cause, what blames nodes, other failures, silence, lost peers, Slurm's word."""
    evidence, first = attempt.evidence, finding.cause
    if first:
        yield Line(text=first.sign.text, rank=first.rank, host=first.host, time=first.time)
    for host, node in evidence.nodes.items():
        yield from (Line(text=text, host=host) for text in (node.preflight, node.hardware) if text)
    own = [(rank, outcome) for rank, outcome in failures(evidence) if not outcome.get("lost_peer")]
    for rank, outcome in sorted(own, key=lambda entry: as_number(entry[1].get("time")) or 0.0):
        if first is None or rank != first.rank:
            text, time = str(outcome.get("message") or "failed"), as_number(outcome.get("time"))
            yield Line(text=text, rank=rank, host=host_of(evidence, rank), time=time)
    yield from _lines_of_silence(attempt)
    lost = sorted({cause.rank for cause in attempt.lost if cause.rank is not None and cause is not first})
    if lost:
        yield Line(text=f"{named('rank', lost)} only lost a peer", time=attempt.lost[0].time)
    if evidence.stop_reason:
        yield Line(text=f"asked to stop: {evidence.stop_reason}", time=evidence.stop_time)
    if evidence.slurm_state not in (None, "", "RUNNING", "COMPLETING"):  # of each job that its own agents judge
        yield Line(text=f"Slurm: {evidence.slurm_state}")


def _lines_of_silence(attempt: Attempt) -> Iterator[Line]:
    evidence, hang = attempt.evidence, attempt.evidence.hang
    if hang:
        yield Line(text=f"hung in phase {hang.phase}", rank=hang.rank, host=hang.host, time=hang.time)
        if hang.stacks:
            yield Line(text=f"stacks of all ranks at that moment: {hang.stacks}/rank-*.txt in the run directory")
    for host in attempt.mute_hosts:
        yield Line(text="the node's agent said nothing at its end", host=host)
    if attempt.mute_ranks and not evidence.is_done:  # a start of a run that is done has nothing to say
        yield Line(text=f"no word from {named('rank', attempt.mute_ranks)}")
    for rank, number in killed_ranks(attempt):
        yield Line(text=f"killed by {signal_name(number)}", rank=rank, host=host_of(evidence, rank))


def _step(finding: Finding, attempt: Attempt) -> int | None:
    """Where it failed: as the finding or the message says, else the last logged step."""
    if finding.step is not None or finding.kind == "hang":
        return finding.step
    named = next((found for found in map(_LOSS_OF.search, messages(attempt)) if found), None)
    return int(named[1]) if named else attempt.evidence.last_step


def _utterances(attempt: Attempt) -> tuple[str, ...]:
    if attempt.evidence.utterances:
        return attempt.evidence.utterances
    named = next((found for found in map(_LOSS_OF.search, messages(attempt)) if found), None)
    return tuple(named[2].split(", ")) if named else ()


def _named_utterances(attempt: Attempt) -> str:
    names = _utterances(attempt)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f" Look at the utterances of that step: {', '.join(names[:_MAX_NAMED])}{more}." if names else ""


def _without_numbers(text: str) -> str:
    """A failure as the same one of another step, process or node."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)[:200]
