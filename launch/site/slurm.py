"""What Slurm says of jobs and nodes, and what we ask of it: its own commands, and nothing of Python's heavy libraries.

squeue first; sacct where the job is forgotten there; neither may be reachable, and then our own files must do.
"""

import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from asr_train.errors import WavefleetError

_TIMEOUT_S = 30
_SILENCE = re.compile(
    r"unable to contact slurm controller|connection refused|did not answer|socket timed out|connect failure", re.I
)
_UNUSABLE = re.compile("down|drain|fail|boot", re.IGNORECASE)  # states of nodes, which may end with * and the like
_LIVE = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STAGE_OUT",
    "SIGNALING",
)  # fmt: skip

HELD = "JobHeldUser"  # the reason of a job that waits for whoever submitted it

# Signals that the shell ignores, what it starts ignores too.
_REQUEUE = (
    'trap "" TERM INT HUP USR1 USR2 CONT; job=$1; shift; scontrol requeue "$job" && scontrol update "JobId=$job" "$@"'
)


class SlurmError(WavefleetError):
    """A Slurm command failed; the text is its own message."""

    @property
    def is_silence(self) -> bool:
        """Whether Slurm did not answer, rather than refuse."""
        return _SILENCE.search(str(self)) is not None


@dataclass(frozen=True)
class JobState:
    """What Slurm knows of a job.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, TIMEOUT, ...; UNKNOWN when nobody knows it any more.
        reason: why it is pending, or why it ended.
        start: when it is expected to start, or started; None when that is not known.
        nodes: hosts, in Slurm's short form.
        restarts: how often it was requeued.
        is_preempted: it is being ended for a more urgent one.
        is_overdue: it ran as long as it may.
    """

    state: str
    reason: str = ""
    start: str | None = None
    nodes: str = ""
    restarts: int = 0
    is_preempted: bool = False
    is_overdue: bool = False

    @property
    def is_live(self) -> bool:
        """Whether it runs or will run."""
        return self.state in _LIVE


def run(*command: str) -> str:
    """Run a Slurm command; its output.

    Raises:
        SlurmError: it is missing, failed, or did not answer.
    """
    return _call(command).stdout


def sbatch(text: str, *options: str) -> str:
    """Submit a script; the job's id.

    Raises:
        SlurmError: Slurm refused it.
    """
    return _sbatch(text, "--parsable", *options).stdout.strip().partition(";")[0]


def expected_start(text: str) -> str:
    """When a script would start if it were submitted now, and where, in sbatch's own words; nothing is submitted.

    Raises:
        SlurmError: Slurm would refuse it.
    """
    return _sbatch(text, "--test-only").stderr.strip().removeprefix("sbatch: ")


def job_state(job_id: str) -> JobState:
    """What Slurm says of a job now.

    Raises:
        SlurmError: slurmctld does not answer, and there is no accounting.
    """
    try:
        lines = run("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%S|%N").splitlines()
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            return _from_accounting(job_id, error)
        lines = []
    if not lines:
        return _from_accounting(job_id, None)
    state, reason, start, nodes = lines[0].strip().split("|")
    more: dict[str, str] = {}
    with suppress(SlurmError):  # squeue remembers longer
        more = details(job_id)
    return JobState(
        state,
        reason,
        None if start == "N/A" else start,
        nodes,
        restarts=int(more.get("Restarts", 0)),
        is_preempted=more.get("PreemptTime", "None") != "None",
        is_overdue=_is_overdue(more),
    )


def _is_overdue(job: Mapping[str, str]) -> bool:
    """Whether a job has run for its whole time; a state that is COMPLETING does not say why."""
    ran_s, limit_s = (_seconds(job.get(name, "")) for name in ("RunTime", "TimeLimit"))
    return ran_s is not None and limit_s is not None and ran_s >= limit_s


def _seconds(text: str) -> int | None:
    """`1-02:03:04` in seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def details(job_id: str) -> dict[str, str]:
    """What squeue does not say, by scontrol's names: Restarts, PreemptTime, BatchFlag, ...

    Raises:
        SlurmError: it does not know the job any more.
    """
    return dict(re.findall(r"(\w+)=(\S+)", run("scontrol", "--oneliner", "show", "job", job_id)))


def hostnames(nodes: str) -> list[str]:
    """`n[1-3]` -> n1, n2, n3."""
    return run("scontrol", "show", "hostnames", nodes).split()


def node_address(node: str) -> str:
    """An address that other nodes reach a node by: its name where that resolves, else the one that Slurm uses."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        found = re.search(r"NodeAddr=(\S+)", run("scontrol", "show", "node", node))
        if found is None:
            raise SlurmError(f"the name {node} does not resolve, and Slurm names no address for it") from None
        return found[1]
    return node


def release(job_id: str) -> None:
    """Let a held job start."""
    run("scontrol", "release", job_id)


def requeue(job_id: str, *, exclude: Sequence[str] = (), begin_in_s: float = 0.0) -> None:
    """Put a running job back into the queue under its own id; ends it here, with SIGTERM first.

    Only a job in the queue may be given other nodes or another time. One that is being requeued is in the queue, and
    does not start before its credentials have expired, seconds later. The commands are a shell's that ignores the
    signals which the first of them brings. Should the others never run, the job comes back as it was: nothing holds it.

    Args:
        job_id: the job.
        exclude: nodes that it shall not come back on; replaces those that it was kept off before.
        begin_in_s: not before so many seconds.

    Raises:
        SlurmError: too few other nodes, so that it would never start; nothing was done. Or Slurm refused.
    """
    if exclude:
        job = details(job_id)
        constraint = job.get("Features", "(null)")
        check_room(
            job["Partition"],
            int(job["NumNodes"].partition("-")[0]),
            exclude,
            constraint=None if constraint == "(null)" else constraint,
        )
    changes = [f"ExcNodeList={','.join(exclude)}"]
    changes += [f"StartTime=now+{begin_in_s:.0f}"] if begin_in_s else []
    command = ("sh", "-c", _REQUEUE, "sh", job_id, *changes)
    try:
        run(*command)
    except SlurmError as error:
        said = str(error).removeprefix(f"{' '.join(command)}: ")
        raise SlurmError(f"job {job_id} was not put back into the queue with {' '.join(changes)}: {said}") from None


def unusable(hosts: Sequence[str]) -> list[str]:
    """Those of the nodes that Slurm calls down, drained or failed; none where it does not say."""
    try:
        lines = run("sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T").splitlines()
    except SlurmError:
        return []
    states = dict(line.split() for line in lines)
    return [host for host, state in states.items() if _UNUSABLE.match(state)]


def node_states(partition: str | None = None) -> dict[str, str]:
    """Node -> Slurm's state of it and, after a colon, the reason that was given; of some partitions, of all for None.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    which = [] if partition is None else [f"--partition={partition}"]
    lines = run("sinfo", "--noheader", "--Node", *which, "--format=%N|%T|%E").splitlines()
    found = {}
    for line in lines:
        name, state, reason = line.split("|", 2)
        found[name.strip()] = state if reason in ("", "none") else f"{state}: {reason}"
    return found


def default_partition() -> str | None:
    """Where jobs go that name no partition; None where the cluster has no default."""
    names = run("sinfo", "--noheader", "--format=%P").split()
    return next((name.removesuffix("*") for name in names if name.endswith("*")), None)


def usable_nodes(partition: str | None, constraint: str | None = None) -> set[str]:
    """Nodes of some partitions, or of all, that a job may get: not down or drained, and with the features it asks for.

    Of a constraint with brackets, parentheses or counts any one of its features will do.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    which = [] if partition is None else [f"--partition={partition}"]
    lines = run("sinfo", "--noheader", "--Node", *which, "--format=%N|%T|%f").splitlines()
    rows = (line.strip().split("|") for line in lines)
    return {
        name for name, state, features in rows if not _UNUSABLE.match(state) and _has(features.split(","), constraint)
    }


def _has(features: Sequence[str], constraint: str | None) -> bool:
    """Whether a node with these features is one that a constraint asks for."""
    if constraint is None:
        return True
    if re.search(r"[][(){}*]", constraint):
        return any(word in features for word in re.findall(r"[^][(){}*&|,\s]+", constraint))
    return any(all(word in features for word in re.split("[&,]", part)) for part in constraint.split("|"))


def check_room(partition: str, num_nodes: int, without: Sequence[str], *, constraint: str | None = None) -> None:
    """Refuse a job that would stay pending for the nodes that it is kept off, and for nothing else.

    Raises:
        SlurmError: says how many there are.
    """
    nodes = usable_nodes(partition, constraint)
    excluded = sorted(nodes & set(without))
    if len(nodes) - len(excluded) < num_nodes <= len(nodes):
        kind = f" with {constraint}" if constraint else ""
        raise SlurmError(
            f"the job needs {num_nodes} of the {len(nodes)} nodes of {partition}{kind} that are up, and"
            f" {', '.join(excluded)} of them {'are' if len(excluded) > 1 else 'is'} excluded; it would not start."
            " `wavefleet nodes --cluster P --remove HOST` takes one back"
        )


def cancel(job_id: str) -> None:
    """End a job, or take it out of the queue."""
    run("scancel", job_id)


def jobs_with_comment(comment: str) -> list[str]:
    """Ids of our live jobs with a comment."""
    lines = run("squeue", "--noheader", "--me", "--format=%i|%k").splitlines()
    return [job for line in lines for job, _, text in [line.strip().partition("|")] if text == comment]


def live_jobs(job_ids: Sequence[str]) -> dict[str, Counter[str]]:
    """Those of some jobs or arrays that are live, and how many of their tasks are in which state."""
    if not job_ids:
        return {}
    try:
        out = run("squeue", "--noheader", "--array", f"--jobs={','.join(job_ids)}", "--format=%F|%T")
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return {}
    found: dict[str, Counter[str]] = {}
    for line in out.split():
        job_id, _, state = line.partition("|")
        found.setdefault(job_id, Counter())[state] += 1
    return found


def is_option(name: str) -> bool:
    """Whether sbatch takes this variable of a shell or of a job for an option, which wins over what a script says."""
    return name.startswith(("SBATCH_", "SLURM_")) and name != "SLURM_CONF"


def max_array_size() -> int:
    """How many tasks an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else 1


def _sbatch(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Give sbatch a script."""
    environ = {name: value for name, value in os.environ.items() if not is_option(name)}
    return _call(["sbatch", *options], text=text, environ=environ)


def _call(
    command: Sequence[str], *, text: str | None = None, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: is this a login node of a Slurm cluster?")
    try:
        done = subprocess.run(
            command, input=text, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {_TIMEOUT_S} s; is slurmctld up?") from None
    if done.returncode != 0:
        raise SlurmError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done


def _from_accounting(job_id: str, why: SlurmError | None) -> JobState:
    """What accounting remembers; `why` squeue could not say is raised where there is none."""
    try:
        out = run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job_id}", "--format=State,NodeList")
    except SlurmError:
        if why is not None:
            raise why from None
        return JobState("UNKNOWN")
    lines: Sequence[str] = out.splitlines()
    if not lines:
        return JobState("UNKNOWN")
    state, _, nodes = lines[-1].partition("|")
    return JobState(state.partition(" ")[0], nodes=nodes)
