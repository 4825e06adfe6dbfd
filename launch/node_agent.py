"""What runs once on every node of a job: finds the other nodes, starts `accelerate launch`, stops it in time, says why.

`task.Task` calls it where submitit starts the job; `python -m launch.node_agent RUN`, under srun, does without.
All that it needs is in the run directory. A stop is two-phase: the agents ask by file, the ranks agree on a step, save
and end; only then does node 0 put the job back into the queue.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from asr_train import verbosity
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, WavefleetError, run_main, say
from asr_train.run_dir import START, RunDir
from launch.child import Signals, nobody, run_child
from launch.ending.collect import conclude
from launch.ending.starts import Start, starts, verdicts
from launch.jobs import continuation
from launch.jobs.notify import notify
from launch.log_files import heading
from launch.node import devices, preflight
from launch.node.hang import HangWatch
from launch.node.hardware import GpuWatch
from launch.node.node_check import Wanted
from launch.node.placement import Rendezvous, place
from launch.node.preflight import Place
from launch.node.rendezvous import Meeting, interface_address
from launch.node.stage import corpus_folder
from launch.requests import ask
from launch.site import slurm
from launch.site.cluster import accelerate_config
from launch.site.cluster_config import Cluster, as_bytes
from launch.site.settings import JobSettings
from launch.site.slurm import JobState, SlurmError
from launch.site.snapshot import check_running
from launch.verdict import Verdict

_MEET_S = 120.0  # for node 0 to say where to meet
_REPORT_S = 120.0  # for all nodes to say how they ended, after the first did
_HASTY_REPORT_S = 5.0  # where Slurm ends them: SIGKILL follows SIGTERM, by default after 30 s
_MAX_RESERVE_S = 60.0  # of the time that the warning signal leaves: to judge, and to put the job back
_BEAT_S = 5.0
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class AttemptError(WavefleetError):
    """An attempt failed; the text is the verdict's."""


def run_task(run_dir: Path) -> None:
    """Train on this node.

    Raises:
        AttemptError: on node 0, when the attempt failed; so Slurm knows it too.
    """
    verdict = run_node(run_dir, os.environ)
    if verdict is not None and verdict.exit_code not in (EXIT_DONE, EXIT_STOPPED):
        raise AttemptError(f"{verdict.kind}: {verdict.message}")


def main(argv: Sequence[str]) -> int:
    """Train on this node; the verdict's exit code on node 0, 0 elsewhere."""
    verdict = run_node(Path(argv[0]), os.environ)
    return EXIT_DONE if verdict is None else verdict.exit_code


@dataclass(frozen=True, kw_only=True)
class _Node:
    """This node's part of one start of a job."""

    run: RunDir
    start: Start
    settings: JobSettings
    number: int
    meeting: Meeting
    signals: Signals
    job_id: str
    restarts: int


def run_node(run_dir: Path, environ: Mapping[str, str]) -> Verdict | None:
    """One node's part of one start of a job; the verdict on node 0, None elsewhere."""
    os.environ.pop(verbosity.VARIABLE, None)  # of the submitter's shell; a job's log is evidence, and holds all notes
    signals = Signals()
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler has nothing to do here
    with signals.installed():
        node = _node(RunDir(run_dir), environ, signals)
        say(heading(node.start, node.number))
        if node.number == 0:
            _judge_before(node)
            node.start.write(node.run)
        node.meeting.beat()
        try:
            found = _checked_and_trained(node)
        except WavefleetError as error:
            say(str(error))
            found = {"exit_code": EXIT_FAILED}
        node.meeting.report({**found, "stopped_by": _stop_reason(node), "stop_time": signals.time})
        if node.number == 0:
            return _end(node)
        node.meeting.wait_for_end(_REPORT_S)
        return None


def _node(run: RunDir, environ: Mapping[str, str], signals: Signals) -> _Node:
    """Who and where this is, from Slurm's variables."""
    settings = JobSettings.read(run)
    check_running(settings.code)
    job_id, number = environ["SLURM_JOB_ID"], int(environ["SLURM_NODEID"])
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    parts = [job_id, str(restarts)]
    if (step := environ.get("SLURM_STEP_ID", "0")) != "0":  # in one allocation there may be several starts
        parts.append(step)
    start = Start(
        name=".".join(parts),
        hosts=tuple(slurm.hostnames(environ["SLURM_JOB_NODELIST"])),
        processes_per_node=settings.cluster.num_processes,
        time=time.time(),
        job_id=job_id,
        code=str(settings.code),
    )
    return _Node(
        run=run,
        start=start,
        settings=settings,
        number=number,
        meeting=start.meeting(run, number),
        signals=signals,
        job_id=job_id,
        restarts=restarts,
    )


def _judge_before(node: _Node) -> None:
    """Say how the start before this one ended, where its agents did not live to say it."""
    before = next((start for start in reversed(starts(node.run)) if start.name != node.start.name), None)
    if before is None or before.name in {line["start"] for line in verdicts(node.run)}:
        return
    if before.job_id == node.job_id:
        state = _why_requeued(before.hosts)
    else:
        state = _slurm_state(before.job_id).state if before.job_id else ""
    verdict = conclude(node.run, before, slurm_state=state or None)
    say(f"the start before ended so: {verdict.kind}: {verdict.message}")


def _checked_and_trained(node: _Node) -> dict[str, Any]:
    """Check this node with the others, and train where all is well; what there is to report."""
    cluster = node.settings.cluster
    if node.number == 0:
        address, port = node.meeting.publish(_address(node))
    else:
        address, port = node.meeting.find(_MEET_S)
    uuids = devices.visible_gpus() if cluster.gpus_per_node else []
    with GpuWatch(uuids) as gpus, corpus_folder(cluster.stage_corpus_to, f"{node.run.run_id}-{node.number}") as staged:
        refused = _preflight(node, f"{address}:{port}")
        if refused is not None:
            return {"exit_code": None, **refused}
        exit_code = _train(node, address, port, staged)
        return {"exit_code": exit_code, "hardware": "; ".join(gpus.errors()) or None}


def _address(node: _Node) -> str:
    """Where the others reach this node: on the profile's interface, else by its name."""
    if len(node.start.hosts) == 1:
        return "127.0.0.1"
    interface = node.settings.cluster.rendezvous_interface
    return slurm.node_address(node.start.hosts[0]) if interface is None else interface_address(interface)


def _preflight(node: _Node, meet: str) -> dict[str, str | None] | None:
    """Whether training may start; None when it may, else what is known of this node that speaks against it."""
    cluster, hosts, begun_s = node.settings.cluster, node.start.hosts, time.monotonic()
    host = hosts[node.number]

    def is_asked() -> bool:
        node.meeting.beat()
        return node.signals.first is not None

    found = preflight.check(
        node.run,
        Place(folder=node.meeting.folder, node=node.number, hosts=hosts, meet=meet),
        Wanted(
            num_gpus=cluster.gpus_per_node,
            gpu_memory_bytes=as_bytes(cluster.gpu_memory),
            commands=cluster.preflight,
        ),
        environ={**os.environ, **training_environment(cluster, node.start.name)},
        is_asked=is_asked,
    )
    if preflight.may_start(found, hosts):
        say(f"{host}: checked with the other nodes in {time.monotonic() - begun_s:.1f} s, all is well")
        return None
    for name, of_node in found.items():
        if text := of_node.problem or of_node.hardware or of_node.network:
            say(f"{name} may not train: {text}" if name == host else f"not started, for {name} may not train: {text}")
    mine = found[host]
    return {"preflight": mine.problem, "hardware": mine.hardware, "network": mine.network}


def _train(node: _Node, address: str, port: int, variables: Mapping[str, str]) -> int:
    """Run `accelerate launch` to its end, passing a wish to stop on by file; its exit code."""
    start, cluster = node.start, node.settings.cluster
    num_nodes = len(start.hosts)
    placement = place(
        node.run.recipe(),
        accelerate=accelerate_config(cluster),
        processes=cluster.num_processes,
        num_nodes=num_nodes,
    )
    logs = start.logs(node.run, node.number)
    logs.mkdir(parents=True, exist_ok=True)
    meet = Rendezvous(num_nodes, node.number, address, port, f"{node.run.path.name}.{start.name}")
    arguments = [str(node.run.path / "recipe.yaml"), f"run_dir={node.run.path}"]
    command = placement.command(arguments, rendezvous=meet, log_dir=logs)
    say(f"{start.hosts[node.number]}, node {node.number} of {num_nodes}: {shlex.join(command)}")
    with HangWatch(
        start.ranks(node.number),
        node.run.recipe().limits,
        start.hangs(node.run),
        node=node.number,
        num_nodes=num_nodes,
        host=start.hosts[node.number],
    ) as hang_watch:
        ours = {**training_environment(cluster, start.name), **variables, **hang_watch.environment}
        environ = placement.environ({**os.environ, **ours})
        return run_child(
            command,
            env=environ,
            cwd=node.settings.code,
            receivers=nobody,
            signals=node.signals,
            is_over=_Watch(node, hang_watch),
        ).exit_code


class _Watch:
    """What this agent does while its ranks train: shows that it lives, passes the wish to stop on, sees a hang."""

    def __init__(self, node: _Node, hang_watch: HangWatch) -> None:
        self._node, self._hang_watch = node, hang_watch
        self._next_beat_s = 0.0
        lead_s = node.settings.cluster.signal_lead_s
        self._grace_s = lead_s - min(lead_s / 3, _MAX_RESERVE_S)

    def __call__(self, child: psutil.Process) -> bool:
        node, now_s = self._node, time.monotonic()
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + _BEAT_S
            node.meeting.beat()
        if node.signals.first is not None:
            ask(node.run, "stop")  # again and again, for an attempt that is just starting forgets old requests
        if self._is_too_late():
            say("the ranks have not saved and ended in time; they are ended, so that the job can go on")
            return True
        return self._hang_watch.look()

    def _is_too_late(self) -> bool:
        """Whether what is left between the warning signal and the limit is needed for going on."""
        signals = self._node.signals
        return signals.first in _WARNINGS and time.time() - (signals.time or 0.0) > self._grace_s


def training_environment(cluster: Cluster, start: str) -> dict[str, str]:
    """Variables by which the profile, and the name of the start, reach torch and the training program."""
    found = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.signal_lead_s),
        "WAVEFLEET_COLLECTIVE_TIMEOUT_S": str(cluster.process_group_timeout_s),
        START: start,
    }
    if cluster.rendezvous_interface is not None:
        found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), cluster.rendezvous_interface)
    return found


def _stop_reason(node: _Node) -> str | None:
    """What the signal that this agent got meant; Slurm knows."""
    number = node.signals.first
    if number is None:
        return None
    job = _slurm_state(node.job_id)
    if job.is_overdue:
        return "time limit"
    if job.is_preempted:
        return "preempted"
    if job.restarts > node.restarts:  # it is in the queue again, and nobody here put it there
        if _why_requeued(node.start.hosts) == "PREEMPTED":
            return "preempted"
        return signal.Signals(number).name  # a node is lost, and nobody asked for a stop
    if number in _WARNINGS:
        return "time limit"
    return "cancelled" if job.state in ("CANCELLED", "COMPLETING") else signal.Signals(number).name


def _slurm_state(job_id: str) -> JobState:
    try:
        return slurm.job_state(job_id)
    except SlurmError:
        return JobState("")


def _end(node: _Node) -> Verdict:
    """Node 0: wait for the other nodes, decide what comes next, and do it."""
    run = node.run
    job = _slurm_state(node.job_id)
    state = _why_requeued(node.start.hosts) if job.restarts > node.restarts else job.state
    wait_s = _HASTY_REPORT_S if node.signals.first == signal.SIGTERM else _REPORT_S
    verdict = conclude(run, node.start, slurm_state=state or None, wait_s=wait_s)
    if node.signals.first is not None:
        (run.control / "stop").unlink(missing_ok=True)
    say(f"{verdict.kind}: {verdict.message}")
    node.meeting.decide()
    wanted = verdict.goes_on and node.settings.continuation != "none"
    if not (
        wanted and continuation.go_on(run, node.settings, node.job_id, verdict, node.signals, restarts=node.restarts)
    ):
        notify(run, verdict)
    return verdict


def _why_requeued(hosts: Sequence[str]) -> str:
    """Why Slurm itself put a job back into the queue, as a state that sacct would show."""
    return "NODE_FAIL" if slurm.unusable(hosts) else "PREEMPTED"


if __name__ == "__main__":
    sys.exit(run_main(main))
