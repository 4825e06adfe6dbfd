"""What is known of how a start of a run ended, read from its directory: by its own node 0, or later from anywhere."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from asr_train import checkpoints
from asr_train.errors import say
from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir
from launch.ending.outcome import judge
from launch.ending.starts import Start, history, write_verdict
from launch.node import hang
from launch.site import exclusions, slurm
from launch.site.settings import JobSettings, settings_file
from launch.site.slurm import SlurmError
from launch.verdict import Evidence, NodeReport, Policy, Verdict

_BY_SAME_COMMAND: Final = Policy(retry_with="the same command")
# There is no other node; and who started it is likely to sit before it: one try more, soon.
_ON_THIS_MACHINE: Final = replace(_BY_SAME_COMMAND, max_excluded_hosts=0, network_waits_s=(30.0,))
_TAIL_BYTES = 16_384


def conclude(run: RunDir, start: Start, *, slurm_state: str | None = None, wait_s: float = 0.0) -> Verdict:
    """Judge a start that ended, and write the verdict down.

    Args:
        run: whose start it is.
        start: the start.
        slurm_state: of its job.
        wait_s: how long to wait for nodes that have not said how they ended.
    """
    verdict = judged(run, start, slurm_state=slurm_state, wait_s=wait_s)
    write_verdict(run, start, verdict)
    if verdict.exclude_hosts and (settings := _job_settings(run, start)) is not None:
        try:
            exclusions.add(settings.site, exclusions.of_verdict(verdict, run.path))
        except OSError as error:  # the next job of this run avoids them all the same
            say(f"other runs will not know of the excluded nodes: {error}")
    return verdict


def judged(run: RunDir, start: Start, *, slurm_state: str | None = None, wait_s: float = 0.0) -> Verdict:
    """The verdict on a start that ended, written nowhere; see `conclude`."""
    found = evidence(run, start, slurm_state=slurm_state, wait_s=wait_s)
    if start.job_id is None:
        return judge(found, history(run), _ON_THIS_MACHINE)
    policy = Policy()
    if (settings := _job_settings(run, start)) is not None:
        policy = _BY_SAME_COMMAND if settings.is_of_allocation else policy
        excluded = exclusions.live(settings.site)
        found = replace(found, excluded_hosts=tuple(node.host for node in excluded))
        with suppress(SlurmError):  # else a job that finds too few nodes left is refused when it is put into the queue
            partition = settings.cluster.partition or slurm.default_partition()
            # those that are down now would have been room
            nodes = slurm.usable_nodes(partition, settings.cluster.constraint) | set(found.down_hosts)
            policy = exclusions.policy(policy, excluded, nodes, settings.cluster.nodes)
    return judge(found, history(run), policy)


def _job_settings(run: RunDir, start: Start) -> JobSettings | None:
    """Of the cluster that a start ran on; None without one."""
    return JobSettings.read(run) if start.job_id is not None and settings_file(run).exists() else None


def evidence(run: RunDir, start: Start, *, slurm_state: str | None = None, wait_s: float = 0.0) -> Evidence:
    """What is known of a start that ended."""
    reports = start.meeting(run, 0).reports(wait_s)
    attempt = start.attempt(run)
    record = run.attempt_record(attempt) if attempt is not None else {}
    lines = [line for line in read_jsonl(run.metrics) if attempt is not None and line.get("attempt") == attempt]
    skipped = [line for line in lines if line.get("event") == "skipped"]
    asked = [report for report in reports.values() if report.get("stopped_by")]
    first: Mapping[str, Any] = min(asked, key=lambda report: report["stop_time"], default={})
    num_ranks = len(start.hosts) * start.processes_per_node
    return Evidence(
        num_ranks=num_ranks,
        time=time.time(),
        ranks=run.outcomes(attempt) if attempt is not None else {},
        nodes={host: _node(run, start, node, reports.get(node)) for node, host in enumerate(start.hosts)},
        slurm_state=slurm_state,
        down_hosts=tuple(slurm.unusable(start.hosts)) if start.job_id is not None else (),
        stop_reason=first.get("stopped_by"),
        stop_time=first.get("stop_time"),
        resumed_step=_step(record["resumed_from"]) if "resumed_from" in record else _newest_step(run),
        committed_step=_step(record.get("committed")),
        last_step=max((line["step"] for line in lines if "step" in line), default=None),
        is_done=run.done.exists(),
        hang=hang.found(start.hangs(run)),
        tails={rank: tail for rank in range(num_ranks) if (tail := _tail(run, start, rank))},
        utterances=tuple(skipped[-1]["ids"]) if skipped else (),
    )


def _node(run: RunDir, start: Start, node: int, report: Mapping[str, Any] | None) -> NodeReport:
    said = report or {}
    return NodeReport(
        preflight=said.get("preflight"),
        reported=report is not None,
        exit_code=said.get("exit_code"),
        hardware=said.get("hardware"),
        network=said.get("network"),
        ranks=tuple(start.ranks(node)),
        tail=_agent_output(run, start, node),
    )


def _newest_step(run: RunDir) -> int | None:
    """Of the newest checkpoint, for an attempt that did not live to look for it."""
    whole = checkpoints.whole(run.checkpoints)
    return whole[-1].step if whole else None


def _step(name: str | None) -> int | None:
    return None if name is None else checkpoints.order(name)[0]


def _tail(run: RunDir, start: Start, rank: int) -> str:
    """Last lines that a rank wrote to stderr, from torchrun's per-rank logs."""
    node, local_rank = divmod(rank, start.processes_per_node)
    found = sorted(start.logs(run, node).glob(f"*/attempt_*/{local_rank}/stderr.log"))
    return _last(found[-1]) if found else ""


def _agent_output(run: RunDir, start: Start, node: int) -> str:
    """Last lines of a node agent's stderr in this start of a job, the launcher's own among them."""
    if start.job_id is None:
        return ""
    text = _last(run.path / "slurm" / f"{start.job_id}_{node}_log.err")
    return text.rpartition(f"node {node} of {len(start.hosts)}: ")[2]  # a requeued job appends to its file


def _last(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
