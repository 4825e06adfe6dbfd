"""The files of a test cluster: slurm.conf and its neighbours, for four nodes on one machine."""

import os
import random
import secrets
import socket
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
GPUS_PER_NODE = 4
CPUS_PER_NODE = 4

SETTINGS = {
    # Who, and where.
    "ClusterName": "test",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    # What a job gets: whole cores and GPUs, whatever this machine really has.
    "SlurmdParameters": "config_overrides",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "GresTypes": "gpu",
    # Preemption by partition, and jobs that come back.
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "JobRequeue": "1",
    "ReturnToService": "2",
    # Soon rather than cheaply, but no node is down because this machine is busy. Time limits are checked every 30 s,
    # which no setting changes.
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "bf_interval=1,sched_interval=1,batch_sched_delay=0",
    "OverTimeLimit": "0",
    "KillWait": "5",
    "CompleteWait": "0",
    "InactiveLimit": "0",
    "MinJobAge": "300",
    "MessageTimeout": "10",
    "SlurmctldTimeout": "5",
    "SlurmdTimeout": "30",
    "UnkillableStepTimeout": "120",
    "SlurmctldDebug": "verbose",
    "SlurmdDebug": "verbose",
}


def write_files(
    folder: Path, ports: dict[str, int], settings: dict[str, str], *, grace_s: int, accounting: bool
) -> None:
    """Everything that daemons and clients read; again, with other settings, where it already is."""
    for name in ("munge", "logs", "state", "spool", "jobs"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "munge").chmod(0o711)  # munged trusts no folder that others can write
    key = folder / "munge/key"
    if not key.exists():
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
    for number in range(GPUS_PER_NODE):  # slurmd wants devices, else no job gets a CUDA_VISIBLE_DEVICES
        gpu = folder / f"gpu{number}"
        if not gpu.is_symlink():
            gpu.symlink_to(os.devnull)
    (folder / "gres.conf").write_text(
        f"NodeName=n[1-{len(NODES)}] Name=gpu File={folder}/gpu[0-{GPUS_PER_NODE - 1}]\n", encoding="utf-8"
    )
    (folder / "slurm.conf").write_text(
        _slurm_conf(folder, ports, settings | (_accounting(folder, ports) if accounting else {}), grace_s),
        encoding="utf-8",
    )
    path = folder / "slurmdbd.conf"
    path.touch(mode=0o600)
    path.write_text(_slurmdbd_conf(folder, ports), encoding="utf-8")


def _auth_info(folder: Path) -> str:
    return f"cred_expire=5,socket={folder}/munge/socket"  # 5 s is the least; a requeued job waits so long


def _accounting(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    return {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": "127.0.0.1",
        "AccountingStoragePort": str(ports["slurmdbd"]),
        "AccountingStoragePass": f"{folder}/munge/socket",  # AuthInfo is not asked for this one
        "AccountingStorageTRES": "gres/gpu",
    }


def _slurm_conf(folder: Path, ports: dict[str, int], settings: dict[str, str], grace_s: int) -> str:
    host = socket.gethostname().partition(".")[0]
    settings = {
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": str(ports["slurmctld"]),
        "AuthInfo": _auth_info(folder),
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/%n.pid",
        **settings,
    }
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs={CPUS_PER_NODE} "
        f"RealMemory=8000 Gres=gpu:{GPUS_PER_NODE}"
        for node in NODES
    ]
    everywhere = f"Nodes=n[1-{len(NODES)}] MaxTime=7-0 DefaultTime=10"
    partitions = [
        f"PartitionName=batch {everywhere} Default=YES PriorityTier=1 GraceTime={grace_s}",
        f"PartitionName=urgent {everywhere} PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join([*(f"{name}={value}" for name, value in settings.items()), *nodes, *partitions]) + "\n"


def _slurmdbd_conf(folder: Path, ports: dict[str, int]) -> str:
    return (
        f"AuthType=auth/munge\nAuthInfo={_auth_info(folder)}\nSlurmUser=root\nDbdHost=localhost\n"
        f"DbdAddr=127.0.0.1\nDbdPort={ports['slurmdbd']}\nPidFile={folder}/slurmdbd.pid\n"
        "StorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\n"
    )


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, outside of those that the kernel gives to outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 12_000):
        if len(found) == number:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found.append(port)
    return found
