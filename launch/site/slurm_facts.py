"""Asking Slurm how it is configured: what decides how jobs start, are warned, end and come back."""

import re
from collections.abc import Mapping

from launch.site import slurm
from launch.site.cluster_config import Cluster
from launch.site.findings import Partition, SlurmFacts
from launch.site.slurm import SlurmError

_NOTHING = ("(null)", "N/A", "NONE", "none", "")


def ask(cluster: Cluster) -> SlurmFacts:
    """What Slurm says of itself and of the profile's partitions.

    Raises:
        SlurmError: it is not here, or does not answer.
    """
    config = _config(slurm.run("scontrol", "show", "config"))
    partitions = _partitions(slurm.run("scontrol", "--oneliner", "show", "partition"))
    wanted = cluster.partition.split(",") if cluster.partition else _default(partitions)
    # SlurmctldParameters=preempt_send_user_signal became PreemptParameters=send_user_signal in newer versions
    parameters = f"{config.get('SlurmctldParameters', '')},{config.get('PreemptParameters', '')}"
    return SlurmFacts(
        version=config.get("SLURM_VERSION", "of an unknown version"),
        proctrack=_value(config, "ProctrackType", "proctrack/"),
        kill_wait_s=_number(config.get("KillWait")),
        preempt_type=_value(config, "PreemptType", "preempt/"),
        sends_user_signal="send_user_signal" in parameters,
        job_requeue={"1": True, "0": False}.get(config.get("JobRequeue", "")),
        max_array_size=_number(config.get("MaxArraySize")),
        accounting_problem=_accounting_problem(),
        partitions=tuple(_partition(partitions[name]) for name in wanted if name in partitions),
        unknown_partitions=tuple(name for name in wanted if name not in partitions),
    )


def _config(text: str) -> dict[str, str]:
    """`Name = value` lines."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _partitions(text: str) -> dict[str, dict[str, str]]:
    """Name -> fields, of a line a partition."""
    found = (dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines())
    return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def _default(partitions: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [name for name, fields in partitions.items() if fields.get("Default") == "YES"]


def _partition(fields: Mapping[str, str]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        state=fields.get("State", "UP"),
        time_min=_minutes(fields.get("MaxTime", "UNLIMITED")),
        max_nodes=_number(fields.get("MaxNodes")),
        grace_s=_number(fields.get("GraceTime")) or 0,
        preempt_mode=fields.get("PreemptMode", "OFF"),
    )


def _value(config: Mapping[str, str], name: str, prefix: str) -> str | None:
    value = config.get(name, "").removeprefix(prefix)
    return None if value in _NOTHING else value


def _number(text: str | None) -> int | None:
    """The number that a value begins with; None where it has none: UNLIMITED, INFINITE."""
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None


def _minutes(text: str) -> int | None:
    """Minutes of Slurm's D-HH:MM:SS or HH:MM:SS, rounded down; None for no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", text)
    if found is None:
        return None
    days, hours, minutes = (int(number or 0) for number in found.groups())
    return (days * 24 + hours) * 60 + minutes


def _accounting_problem() -> str | None:
    try:
        slurm.run("sacct", "--noheader", "--allocations", "--starttime=now-1minutes")
    except SlurmError as error:
        return str(error)
    return None
