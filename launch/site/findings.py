"""What `doctor` found of a cluster: kept in doctor.json of the site's folder, read by what must act accordingly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from asr_train.files import write_json
from launch.site.cluster import site_folder
from launch.site.cluster_config import Cluster


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition, as Slurm describes it; null limits are none."""

    name: str
    state: str
    time_min: int | None
    max_nodes: int | None
    grace_s: int
    preempt_mode: str


@dataclass(frozen=True, kw_only=True)
class SlurmFacts:
    """What Slurm says of itself; None is what this version does not say.

    Attributes:
        version: in Slurm's words.
        proctrack: how a step's processes are followed, which decides whom a signal reaches.
        kill_wait_s: from SIGTERM to SIGKILL.
        preempt_type: what preempts, `partition_prio` or `qos`; none where nothing does.
        sends_user_signal: whether a preempted job is sent the warning that it asked for.
        job_requeue: whether jobs that do not say so are requeued.
        max_array_size: array indices are below it.
        accounting_problem: why sacct does not answer.
        partitions: those that the profile names, or the default one.
        unknown_partitions: names in the profile that Slurm does not know.
    """

    version: str
    proctrack: str | None
    kill_wait_s: int | None
    preempt_type: str | None
    sends_user_signal: bool
    job_requeue: bool | None
    max_array_size: int | None
    accounting_problem: str | None
    partitions: tuple[Partition, ...]
    unknown_partitions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a job found on the node that it was given; problems are None where there is none.

    Attributes:
        time: in seconds since the epoch.
        job_id: the job that looked.
        node: Slurm's name of the node.
        addresses: what that name resolves to there; nothing where it does not.
        address: what other nodes would reach it by.
        here: what the name resolves to where doctor ran.
        requeue_problem: why a job could not put itself back into the queue.
        sbatch_problem: why a job could not submit another.
        shared_problem: why the site's folder is not shared between there and here.
        seen_after_s: how long a file that was written there needed to be seen here.
        python: version of the Python that jobs get.
    """

    time: float
    job_id: str
    node: str
    addresses: tuple[str, ...]
    address: str | None
    here: tuple[str, ...]
    requeue_problem: str | None
    sbatch_problem: str | None
    shared_problem: str | None
    seen_after_s: float | None
    python: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is known of a cluster.

    Attributes:
        time: when Slurm was asked.
        slurm: what it said.
        refused: Slurm's words, where it would not take a job of this profile.
        expected_start: its words on when such a job would start.
        node: what a job on a node found, perhaps earlier; None when none has looked.
        node_problem: why no job has looked this time.
        cannot_run: whether that shows that no run could work.
    """

    time: float
    slurm: SlurmFacts
    refused: str | None
    expected_start: str | None
    node: NodeFacts | None
    node_problem: str | None = None
    cannot_run: bool = False


_FINDINGS: TypeAdapter[Findings] = TypeAdapter(Findings)


def findings(cluster: Cluster, name: str) -> Findings | None:
    """What `doctor` last found of a cluster; None when it has not looked, or an older version did."""
    try:
        return _FINDINGS.validate_json(_path(cluster, name).read_bytes())
    except (OSError, ValidationError):
        return None


def keep(cluster: Cluster, name: str, found: Findings) -> None:
    """Write findings down for later."""
    write_json(_path(cluster, name), to_json(found))


def to_json(found: Findings) -> dict[str, Any]:
    """Plain values."""
    values: dict[str, Any] = _FINDINGS.dump_python(found, mode="json")
    return values


def continuation(cluster: Cluster, found: Findings | None) -> Literal["requeue", "successor"]:
    """How runs of a profile go on: as it says; where it says auto, by another job if only that works on the nodes."""
    if cluster.continuation != "auto":
        return cluster.continuation
    node = None if found is None else found.node
    if node is None or node.requeue_problem is None or node.sbatch_problem is not None:
        return "requeue"
    return "successor"


def _path(cluster: Cluster, name: str) -> Path:
    return site_folder(cluster, name) / "doctor.json"
