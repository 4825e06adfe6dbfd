"""Nodes that jobs are kept off, for a time: a file a node in the cluster's folder, for all runs there.

A file appears whole or not at all, and nobody writes another's: agents of several runs may add at the same time.
"""

import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from asr_train.errors import RecipeError, say
from asr_train.files import read_json, write_json
from launch.site import slurm
from launch.verdict import Policy, Verdict

FOLDER: Final = "excluded"  # in the cluster's folder
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DURATION = re.compile(r"([1-9][0-9]*)\s*([mhd])")
_UNIT_S: Final = {"m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True, kw_only=True)
class ExcludedNode:
    """A node that jobs are kept off.

    Attributes:
        host: its name in Slurm.
        since, until: seconds since the epoch.
        reason: in a sentence.
        run: the run directory whose verdict it was; None by hand.
        evidence: what the verdict had against the node.
    """

    host: str
    since: float
    until: float
    reason: str
    run: str | None = None
    evidence: tuple[str, ...] = ()


def live(site: Path, now: float | None = None) -> list[ExcludedNode]:
    """What is excluded now, by name; files that cannot be read count for nothing."""
    now = time.time() if now is None else now
    found = (_read(path) for path in sorted((site / FOLDER).glob("*.json")))
    return [node for node in found if node is not None and node.until > now]


def add(site: Path, nodes: Iterable[ExcludedNode]) -> None:
    """Exclude nodes; one that is excluded for longer already stays so.

    Raises:
        RecipeError: a name that is no node's.
    """
    now = time.time()
    for node in nodes:
        if not _HOST.fullmatch(node.host):
            raise RecipeError(f"{node.host!r} is no name of a node")
        path = _path(site, node.host)
        before = _read(path)
        if before is None or before.until <= now or before.until < node.until:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(node))


def remove(site: Path, host: str) -> bool:
    """Take a node back; whether it was excluded."""
    if not _HOST.fullmatch(host):
        return False
    was_live = any(node.host == host for node in live(site))
    _path(site, host).unlink(missing_ok=True)
    return was_live


def of_verdict(verdict: Verdict, run: Path, now: float | None = None) -> list[ExcludedNode]:
    """What a verdict wants excluded, each node with the evidence that is about it."""
    now = time.time() if now is None else now
    return [
        ExcludedNode(
            host=entry.host,
            since=now,
            until=entry.until,
            reason=entry.reason,
            run=str(run),
            evidence=tuple(line.text for line in verdict.evidence if line.host == entry.host),
        )
        for entry in verdict.exclude_hosts
    ]


def to_avoid(site: Path, partition: str | None, num_nodes: int, constraint: str | None = None) -> list[str]:
    """Names for sbatch's --exclude; without nodes that Slurm no longer knows, for which it would refuse the job.

    Raises:
        SlurmError: too few other nodes, so that the job would never start.
    """
    excluded = live(site)
    if not excluded:
        return []
    known = slurm.node_states()
    hosts = [node.host for node in excluded if node.host in known]
    if partition := partition or slurm.default_partition():
        slurm.check_room(partition, num_nodes, hosts, constraint=constraint)
    return hosts


def to_show(site: Path, partition: str | None, num_nodes: int, constraint: str | None = None) -> list[str]:
    """As `to_avoid`, where nothing is submitted: what would keep it from being is said."""
    try:
        return to_avoid(site, partition, num_nodes, constraint)
    except slurm.SlurmError as error:
        say(str(error))
        return [node.host for node in live(site)]


def policy(policy: Policy, excluded: Sequence[ExcludedNode], partition_nodes: Iterable[str], num_nodes: int) -> Policy:
    """The policy with no more room for exclusions than leaves a job of so many nodes enough others to run on."""
    num_left = len(set(partition_nodes) - {node.host for node in excluded})
    most = len(excluded) + max(0, num_left - num_nodes)
    return replace(policy, max_excluded_hosts=min(policy.max_excluded_hosts, most))


def seconds(text: str) -> float:
    """`30m`, `24h`, `7d` in seconds.

    Raises:
        RecipeError: it is none of these.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise RecipeError(f"--for: {text!r}: should be a time, 30m, 24h or 7d say")
    return int(found[1]) * _UNIT_S[found[2]]


def _path(site: Path, host: str) -> Path:
    return site / FOLDER / f"{host}.json"


def _read(path: Path) -> ExcludedNode | None:
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        content: dict[str, Any] = read_json(path)
        known = {field.name for field in fields(ExcludedNode)}
        kept = {name: value for name, value in content.items() if name in known}
        if kept["host"] != path.stem or not _HOST.fullmatch(kept["host"]):
            return None
        return ExcludedNode(**{**kept, "until": float(kept["until"]), "evidence": tuple(kept.get("evidence", ()))})
    return None
