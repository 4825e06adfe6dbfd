"""What runs once on every node of a job: finds the other nodes, starts `accelerate launch`, stops it in time, says why.

submitit stores this class by its module's name, with the run directory and nothing else; everything else is read from
the run directory. A stop is two-phase: the agents ask by file, the ranks agree on a step, save and end; only then does
node 0 put the job back into the queue.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from asr_train import checkpoints
from asr_train.errors import EXIT_DONE, EXIT_STOPPED, WavefleetError, say
from asr_train.files import append_jsonl, read_json, read_jsonl
from asr_train.run_dir import RunDir
from launch import slurm
from launch.child import die_with_parent
from launch.cluster import AgentSettings
from launch.local import Rendezvous, place
from launch.outcome import judge
from launch.rendezvous import Meeting
from launch.slurm import SlurmError
from launch.snapshot import check_running
from launch.verdict import Evidence, NodeReport, Policy, Verdict

SETTINGS = "launch.json"  # in the run directory: what the agents of its jobs need
VERDICTS = "verdicts.jsonl"
_MEET_S = 120.0  # for node 0 to say where to meet
_REPORT_S = 120.0  # for all nodes to say how they ended, after the first did
_BEAT_S = 5.0
_POLL_S = 0.2
_REQUEUE_S = 600.0
_TAIL_BYTES = 16_384
_ASKED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGCONT)


@dataclass(frozen=True)
class NodeAgent:
    """The picklable task: a run directory."""

    run_dir: str

    def __call__(self) -> None:
        """Train on this node.

        Raises:
            AttemptError: on node 0, when the attempt failed; so Slurm knows it too.
        """
        verdict = run_node(Path(self.run_dir), os.environ)
        if verdict is not None and verdict.exit_code not in (EXIT_DONE, EXIT_STOPPED):
            raise AttemptError(f"{verdict.kind}: {verdict.message}")


class AttemptError(WavefleetError):
    """An attempt failed; the text is the verdict's."""


class _Asked:
    """Which signal asked this node to stop, if any; submitit's own handlers are replaced."""

    def __init__(self) -> None:
        self.by: str | None = None
        self.time: float | None = None

    def install(self) -> None:
        for number in _ASKED:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCONT and self.by is None:  # Slurm sends it before SIGTERM, to wake what is stopped
            self.by, self.time = signal.Signals(number).name, time.time()


@dataclass(frozen=True, kw_only=True)
class _Node:
    """This node's part of one start of a job."""

    run: RunDir
    settings: AgentSettings
    code: Path
    job_id: str
    restarts: int
    hosts: tuple[str, ...]
    meeting: Meeting
    asked: _Asked
    attempt_before: int

    @property
    def launch(self) -> str:
        """Names this start of the job."""
        return f"{self.job_id}.{self.restarts}"

    @property
    def is_first(self) -> bool:
        """Node 0 decides."""
        return self.meeting.node == 0

    def logs(self, node: int) -> Path:
        """Folder of a node's per-rank logs."""
        return self.run.path / "logs" / self.launch / f"node-{node}"


def run_node(run_dir: Path, environ: Mapping[str, str]) -> Verdict | None:
    """One node's part of one start of a job; the verdict on node 0, None elsewhere."""
    asked = _Asked()
    asked.install()
    content = read_json(run_dir / SETTINGS)
    code = Path(content.pop("code"))
    check_running(code)
    run = RunDir(run_dir)
    job_id, restarts = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT", "0"))
    hosts = tuple(slurm.hostnames(environ["SLURM_JOB_NODELIST"]))
    node = _Node(
        run=run,
        settings=AgentSettings(**content),
        code=code,
        job_id=job_id,
        restarts=restarts,
        hosts=hosts,
        meeting=Meeting(run_dir / "agents" / f"{job_id}.{restarts}", int(environ["SLURM_NODEID"]), len(hosts)),
        asked=asked,
        attempt_before=run.newest_attempt(),
    )
    node.meeting.beat()
    exit_code = _train(node)
    node.meeting.report({"exit_code": exit_code, "stopped_by": asked.by, "stop_time": asked.time})
    if node.is_first:
        return _end(node)
    node.meeting.wait_for_end(_REPORT_S)
    return None


def _train(node: _Node) -> int:
    """Run `accelerate launch` to its end, passing a wish to stop on by file; its exit code, negative for a signal."""
    num_nodes, number = len(node.hosts), node.meeting.node
    if node.is_first:
        address, port = node.meeting.publish("127.0.0.1" if num_nodes == 1 else slurm.node_address(node.hosts[0]))
    else:
        address, port = node.meeting.find(_MEET_S)
    settings = node.settings
    placement = place(
        node.run.recipe(), accelerate=settings.accelerate, processes=settings.processes_per_node, num_nodes=num_nodes
    )
    logs = node.logs(number)
    logs.mkdir(parents=True, exist_ok=True)
    meet = Rendezvous(num_nodes, number, address, port, f"{node.run.path.name}.{node.launch}")
    arguments = [str(node.run.path / "recipe.yaml"), f"run_dir={node.run.path}"]
    command = placement.command(arguments, rendezvous=meet, log_dir=logs)
    say(f"{node.hosts[number]}, node {number} of {num_nodes}: {shlex.join(command)}")
    environ = placement.environ({**os.environ, **_environment(settings)})
    process = subprocess.Popen(
        command,
        env=environ,
        cwd=node.code,
        start_new_session=True,
        preexec_fn=_shield(),  # noqa: PLW1509 - this program has one thread
    )
    next_beat = 0.0
    while True:
        try:
            return process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + _BEAT_S
                node.meeting.beat()
            if node.asked.by is not None:
                _ask(node.run, node.asked.by)


def _environment(settings: AgentSettings) -> dict[str, str]:
    """Variables by which the profile reaches torch and the training program."""
    found = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(settings.signal_lead_s),
        "WAVEFLEET_COLLECTIVE_TIMEOUT_S": str(settings.process_group_timeout_s),
    }
    if settings.rendezvous_interface is not None:
        found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), settings.rendezvous_interface)
    return found


def _shield() -> Callable[[], None]:
    """What the child runs before its program: torchrun dies of Slurm's warning signals; its workers take them up."""
    ask_for_signal = die_with_parent()

    def shield() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if ask_for_signal is not None:
            ask_for_signal()

    return shield


def _ask(run: RunDir, why: str) -> None:
    """Have the ranks save and stop; again and again, for an attempt that is just starting forgets old requests."""
    path = run.control / "stop"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(why, encoding="utf-8")


def _end(node: _Node) -> Verdict:
    """Node 0: wait for the other nodes, decide what comes next, and do it."""
    run = node.run
    reports = node.meeting.reports(_REPORT_S)
    if node.asked.by is not None:
        (run.control / "stop").unlink(missing_ok=True)
    verdict = judge(_evidence(node, reports), _history(run), Policy())
    append_jsonl(run.path / VERDICTS, {"job": node.launch, "time": time.time(), **verdict.to_json()})
    say(f"{verdict.kind}: {verdict.message}")
    node.meeting.decide()
    if verdict.action in ("continue", "retry"):
        time.sleep(verdict.wait_s)
        slurm.requeue(node.job_id)
        time.sleep(_REQUEUE_S)  # until Slurm ends this process
    return verdict


def _history(run: RunDir) -> list[Verdict]:
    """Verdicts since a person last said `--retry`."""
    history: list[Verdict] = []
    for line in read_jsonl(run.path / VERDICTS):
        history = [*history, Verdict.from_json(line)] if "kind" in line else []
    return history


def _evidence(node: _Node, reports: Mapping[int, Mapping[str, Any]]) -> Evidence:
    """What is known of the attempt that just ended."""
    run, per_node = node.run, node.settings.processes_per_node
    attempt = run.newest_attempt()
    has_begun = attempt > node.attempt_before
    record = run.attempt_record(attempt) if has_begun else {}
    ranks = run.outcomes(attempt) if has_begun else {}
    nodes = {}
    for number, host in enumerate(node.hosts):
        report = reports.get(number)
        nodes[host] = NodeReport(
            reported=report is not None,
            exit_code=None if report is None else report["exit_code"],
            ranks=tuple(range(number * per_node, (number + 1) * per_node)),
            tail=_agent_output(node, number),
        )
    asked = [report for report in reports.values() if report.get("stopped_by")]
    first = min(asked, key=lambda report: report["stop_time"], default={})
    steps = [line["step"] for line in read_jsonl(run.metrics) if line.get("attempt") == attempt and "step" in line]
    skipped = [line for line in read_jsonl(run.metrics) if line.get("event") == "skipped"]
    try:
        state = slurm.job_state(node.job_id).state
    except SlurmError:
        state = None
    return Evidence(
        num_ranks=len(node.hosts) * per_node,
        time=time.time(),
        ranks=ranks,
        nodes=nodes,
        slurm_state=state,
        stop_reason=first.get("stopped_by"),
        stop_time=first.get("stop_time"),
        resumed_step=_step(record.get("resumed_from")),
        committed_step=_step(record.get("committed")),
        last_step=max(steps, default=None) if has_begun else None,
        is_done=run.done.exists(),
        tails={rank: tail for rank in range(len(node.hosts) * per_node) if (tail := _tail(node, rank))},
        utterances=tuple(skipped[-1]["ids"]) if skipped and skipped[-1].get("attempt") == attempt else (),
    )


def _step(name: str | None) -> int | None:
    return None if name is None else checkpoints.order(name)[0]


def _tail(node: _Node, rank: int) -> str:
    """Last lines that a rank wrote to stderr, from torchrun's per-rank logs."""
    number, local_rank = divmod(rank, node.settings.processes_per_node)
    found = sorted(node.logs(number).glob(f"*/attempt_*/{local_rank}/stderr.log"))
    return _last(found[-1]) if found else ""


def _agent_output(node: _Node, number: int) -> str:
    """Last lines of a node agent's stderr in this start of the job, the launcher's own among them."""
    text = _last(node.run.path / "slurm" / f"{node.job_id}_{number}_log.err")
    return text.rpartition(f"node {number} of {len(node.hosts)}: ")[2]  # a requeued job appends to its file


def _last(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
