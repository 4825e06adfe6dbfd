"""Where the output of a run's attempts lies: a file a rank and stream from torchrun, and one a node from its agent.

A launch is one start of a job: JOB.RESTART. An attempt belongs to the launch that its record names.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asr_train.files import read_json
from asr_train.run_dir import RunDir

TAIL_BYTES: Final = 16_384
_TEED: Final = re.compile(r"^\[\w+\d+\]:")  # torchrun repeats its ranks' lines so
_STREAMS: Final = ("stdout.log", "stderr.log")


@dataclass(frozen=True)
class Source:
    """One file of output.

    Attributes:
        rank: who wrote it; None for a node's agent.
    """

    path: Path
    node: int
    rank: int | None

    @property
    def label(self) -> str:
        """`rank 3`, or `node 1` for its agent."""
        return f"node {self.node}" if self.rank is None else f"rank {self.rank}"

    def lines(self, text: str) -> list[str]:
        """The lines of a piece of this file, without those that ranks' own files hold too."""
        found = text.split("\n")
        return found if self.rank is not None else [line for line in found if not _TEED.match(line)]


def launches(run: RunDir) -> list[str]:
    """Every start of a job of this run that left a trace, oldest first."""
    names = {path.name for kind in ("agents", "logs") for path in (run.path / kind).glob("*.*") if path.is_dir()}
    return sorted(names, key=lambda name: (_began(run, name), name))


def launch_of(run: RunDir, attempt: int) -> str | None:
    """The launch that an attempt belongs to; None when no agent started it, or it left no record."""
    try:
        found = run.attempt_record(attempt).get("launch")
    except (OSError, ValueError):
        return None
    return None if found is None else str(found)


def attempt_of(run: RunDir, launch: str) -> int | None:
    """The attempt that a launch made; None when it did not come so far."""
    numbers = range(run.newest_attempt(), 0, -1)
    return next((number for number in numbers if launch_of(run, number) == launch), None)


def sources(run: RunDir, launch: str) -> list[Source]:
    """The files of one launch, node by node: its agent's, then its ranks'."""
    job = launch.rpartition(".")[0]
    found = [
        Source(path, int(path.name.removeprefix(f"{job}_").partition("_")[0]), None)
        for stream in ("out", "err")
        for path in (run.path / "slurm").glob(f"{job}_*_log.{stream}")
    ]
    per_node = {
        int(folder.name.removeprefix("node-")): _local_ranks(folder)
        for folder in (run.path / "logs" / launch).glob("node-*")
    }
    num_local = max((max(ranks, default=-1) + 1 for ranks in per_node.values()), default=0)
    for node, ranks in per_node.items():
        for local_rank, folder in ranks.items():
            paths = [folder / stream for stream in _STREAMS]
            found += [Source(path, node, node * num_local + local_rank) for path in paths if path.exists()]
    return sorted(found, key=lambda source: (source.node, -1 if source.rank is None else source.rank))


def hosts(run: RunDir, launch: str) -> dict[int, str]:
    """Node -> its name, as its agent wrote it."""
    found = {}
    for path in (run.path / "agents" / launch).glob("node-*.json"):
        try:
            found[int(path.stem.removeprefix("node-"))] = str(read_json(path)["host"])
        except (OSError, ValueError, KeyError):  # torn by a full disk
            continue
    return found


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> str:
    """The end of a file; empty when it is not there."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - num_bytes))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _local_ranks(folder: Path) -> dict[int, Path]:
    """Local rank -> folder of its two streams, of the newest start that torchrun made there."""
    found = sorted(folder.glob("*/attempt_*/*/"), key=lambda path: path.stat().st_mtime)
    return {int(path.name): path for path in found if path.name.isdigit()}


def _began(run: RunDir, launch: str) -> float:
    """When a launch began: as its agents say, else by the age of its folder."""
    folder = run.path / "agents" / launch
    started = []
    for path in folder.glob("node-*.json"):
        try:
            started.append(float(read_json(path)["started"]))
        except (OSError, ValueError, KeyError):
            continue
    paths = [path for path in (folder, run.path / "logs" / launch) if path.exists()]
    return min(started, default=min((path.stat().st_mtime for path in paths), default=0.0))
