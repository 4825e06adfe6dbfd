"""What findings of a cluster mean for runs there: a remark a finding, worst first. A pure function."""

import ipaddress
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launch.site import signal_lead
from launch.site.cluster_config import Cluster
from launch.site.findings import Findings, NodeFacts, Partition, continuation
from launch.site.signal_lead import Times

Level = Literal["cannot run", "problem", "ok"]
_LEVELS: tuple[Level, ...] = ("cannot run", "problem", "ok")
_SLOW_S = 10.0  # agents of one job wait for each other's files


@dataclass(frozen=True)
class Remark:
    """A finding and what it means.

    Attributes:
        level: "cannot run" where no run could work, "problem" where something is lost.
        about: a word or two.
        text: the finding, and what it means.
    """

    level: Level
    about: str
    text: str


def diagnose(cluster: Cluster, found: Findings, slowest: tuple[str, Times] | None = None) -> list[Remark]:
    """What findings mean for runs of a profile, worst first.

    Args:
        cluster: the profile.
        found: what doctor found.
        slowest: of the runs that were measured here, the one that needs most time to save, by name.
    """
    remarks = [
        _job(found),
        *_partitions(cluster, found),
        *_signals(cluster, found, slowest),
        *(_preemption(partition, found, slowest) for partition in found.slurm.partitions),
        *_coming_back(cluster, found),
        *_bookkeeping(found),
        *_node(cluster, found),
    ]
    return sorted(remarks, key=lambda remark: _LEVELS.index(remark.level))


def _job(found: Findings) -> Remark:
    version = f"Slurm {found.slurm.version}"
    if found.refused is not None:
        return Remark("cannot run", "a job", f"{version} refuses a job of this profile: {found.refused}")
    return Remark("ok", "a job", f"{version} would take one of this profile: {found.expected_start}")


def _partitions(cluster: Cluster, found: Findings) -> Iterator[Remark]:
    slurm = found.slurm
    for name in slurm.unknown_partitions:
        yield Remark("cannot run", "partition", f"Slurm knows no partition {name}; `sinfo` lists those that there are")
    too_small = [limit for partition in slurm.partitions if (limit := _limit(cluster, partition))]
    # of several partitions Slurm takes one that fits
    level: Level = "cannot run" if len(too_small) == len(slurm.partitions) else "problem"
    for limit in too_small:
        yield Remark(level, "partition", f"{limit}: a job would wait there for ever")
    for partition in slurm.partitions:
        if partition.state != "UP":
            yield Remark("problem", "partition", f"{partition.name} is {partition.state}: no job starts there now")
        elif _limit(cluster, partition) is None:
            longest = "without a limit" if partition.time_min is None else f"up to {_duration(partition.time_min)}"
            yield Remark(
                "ok", "partition", f"{partition.name} takes jobs {longest}; {_duration(cluster.time)} is asked for"
            )


def _limit(cluster: Cluster, partition: Partition) -> str | None:
    """Which limit of a partition the profile is beyond."""
    if partition.time_min is not None and cluster.time > partition.time_min:
        return f"time: {_duration(cluster.time)}, and {partition.name} allows {_duration(partition.time_min)}"
    if partition.max_nodes is not None and cluster.nodes > partition.max_nodes:
        return f"nodes: {cluster.nodes}, and {partition.name} allows {partition.max_nodes}"
    return None


def _signals(cluster: Cluster, found: Findings, slowest: tuple[str, Times] | None) -> Iterator[Remark]:
    slurm, lead_s = found.slurm, cluster.signal_lead_s
    reach = {
        "linuxproc": "every process of a job (proctrack/linuxproc); accelerate's launcher is shielded from them",
        "cgroup": "the node agents alone (proctrack/cgroup), which pass them on by file",
        "pgid": "the node agents alone (proctrack/pgid), which pass them on by file",
    }
    unknown = (
        f"processes that depend on proctrack/{slurm.proctrack}, which was never tried; node agents are ready for any"
    )
    yield Remark("ok", "signals", f"Slurm's reach {reach.get(slurm.proctrack or '', unknown)}")
    kill = "" if slurm.kill_wait_s is None else f"; KILL {slurm.kill_wait_s} s (KillWait) after the limit"
    warned = f"a job is warned (USR2) {lead_s} s before its time limit, then saves and stops{kill}"
    if slowest is None:
        yield Remark("ok", "signal lead", f"{warned}. Whether that is enough is known once a run here was measured")
        return
    name, times = slowest
    if problem := signal_lead.problem(times, lead_s):
        yield Remark("problem", "signal lead", f"run {name}: {problem}")
    else:
        yield Remark("ok", "signal lead", f"{warned}. Enough: run {name} needs up to {times.needed_s} s ({times})")


def _preemption(partition: Partition, found: Findings, slowest: tuple[str, Times] | None) -> Remark:
    slurm, about = found.slurm, "preemption"
    where = f"of {partition.name}"
    if slurm.preempt_type == "qos":
        see = "`sacctmgr show qos format=name,preemptmode,gracetime` says what happens then"
        return Remark("ok", about, f"jobs are preempted by QOS, of which doctor knows nothing; {see}")
    if slurm.preempt_type is None or partition.preempt_mode == "OFF":
        return Remark("ok", about, f"jobs {where} are not preempted")
    if "REQUEUE" not in partition.preempt_mode and "CANCEL" not in partition.preempt_mode:  # SUSPEND, GANG
        return Remark(
            "problem", about,
            f"jobs {where} may be suspended ({partition.preempt_mode}); they go on by themselves later, but it may "
            "look like a hang, and a collective that waited longer than process_group_timeout_s fails",
        )  # fmt: skip
    by = "USR2, and SIGTERM" if slurm.sends_user_signal else "SIGTERM alone (no preempt_send_user_signal)"
    if partition.grace_s:
        saving_s = partition.grace_s
        time_left = f"GraceTime is {saving_s} s"
    else:
        saving_s = slurm.kill_wait_s or 0
        time_left = f"GraceTime is 0, so it has KillWait, {saving_s} s"
    text = f"a job {where} that is preempted is told by {by}; {time_left}"
    if "CANCEL" in partition.preempt_mode:
        ends = "it ends for good (PreemptMode=CANCEL): `wavefleet reconcile --act` submits it again"
        return Remark("problem", about, f"{text}; {ends}")
    if slowest is not None and saving_s < (needed_s := slowest[1].needed_s - signal_lead.SLURM_SLACK_S):
        lost = f"run {slowest[0]} needs up to {needed_s} s to save: steps since its last checkpoint may be lost"
        return Remark("problem", about, f"{text}, and {lost}; checkpoint.every says how many")
    if not partition.grace_s:
        return Remark("problem", about, f"{text}; steps since the last checkpoint are lost where saving takes longer")
    # Slurm 22.05 takes a job that exits 0 within its grace for completed
    return Remark("ok", about, f"{text}; one that has saved in time is put back by its node agent, not by Slurm")


def _coming_back(cluster: Cluster, found: Findings) -> Iterator[Remark]:
    about, node = "going on", found.node
    way = continuation(cluster, found)
    says = f"the profile says {way}" if cluster.continuation != "auto" else f"{way}, as the profile leaves it open"
    if node is None:
        yield Remark("ok", about, f"{says}; no job has tried on a node what works there")
    elif node.requeue_problem is None and way == "requeue":
        yield Remark("ok", about, f"{says}: a job's own node asks Slurm to requeue it (scontrol works there)")
    elif node.sbatch_problem is None and way == "successor":
        yield Remark("ok", about, f"{says}: a job's own node submits the next (sbatch works there)")
    else:
        problem = node.requeue_problem if way == "requeue" else node.sbatch_problem
        other = node.sbatch_problem if way == "requeue" else node.requeue_problem
        works = {"requeue": "successor", "successor": "requeue"}[way] if other is None else None
        remedy = f"set continuation: {works}, which works" if works else "run `wavefleet reconcile --act` from cron"
        yield Remark("problem", about, f"{says}, and on {node.node} that does not work: {problem}; {remedy}")
    if found.slurm.job_requeue is False:
        yield Remark("ok", about, "JobRequeue=0 does not matter: jobs ask for --requeue by name")


def _bookkeeping(found: Findings) -> Iterator[Remark]:
    slurm = found.slurm
    if slurm.accounting_problem is None:
        yield Remark("ok", "accounting", "sacct answers: how old jobs ended stays known")
    else:
        lost = "how a job ended is known from squeue for some minutes, then from the run's own files alone"
        yield Remark("problem", "accounting", f"{slurm.accounting_problem}; {lost}")
    if slurm.max_array_size is not None and slurm.max_array_size < 2:
        yield Remark(
            "problem", "arrays", f"MaxArraySize={slurm.max_array_size}: `prepare --cluster` has no arrays here"
        )
    elif slurm.max_array_size is not None:
        yield Remark("ok", "arrays", f"up to {slurm.max_array_size - 1} tasks (MaxArraySize); larger ones are split")


def _node(cluster: Cluster, found: Findings) -> Iterator[Remark]:
    if found.node_problem is not None:
        yield Remark("cannot run" if found.cannot_run else "problem", "a node", found.node_problem)
    if (node := found.node) is None:
        return
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(node.time))
    yield Remark("ok", "a node", f"job {node.job_id} ran this program on {node.node}, {when}, Python {node.python}")
    if node.shared_problem is not None:
        yield Remark("cannot run", "shared folder", f"{node.shared_problem}; name another in the profile's `shared`")
    elif (node.seen_after_s or 0.0) > _SLOW_S:
        slow = f"what a node writes is seen here only {node.seen_after_s:.0f} s later"
        yield Remark("problem", "shared folder", f"{slow}: stops, saves and starts of several nodes take longer by it")
    else:
        yield Remark("ok", "shared folder", "written here and seen on the node, written there and seen here")
    yield _address(cluster, node)


def _address(cluster: Cluster, node: NodeFacts) -> Remark:
    about = "address"
    several = cluster.nodes > 1
    if node.address is None:
        level: Level = "cannot run" if several else "ok"
        return Remark(level, about, f"{node.node} does not resolve, and Slurm names no address: nodes cannot meet")
    there, here = ", ".join(node.addresses) or "nothing", ", ".join(node.here) or "nothing"
    text = f"{node.node} resolves to {there} on itself, to {here} from here; nodes meet at {node.address}"
    if several and _is_loopback(node.address):
        return Remark("problem", about, f"{text}, which no other machine reaches")
    return Remark("ok", about, text)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _duration(minutes: int) -> str:
    """As Slurm and profiles write it."""
    hours, rest = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{rest:02d}:00" if days else f"{hours:02d}:{rest:02d}:00"
