"""Where the output of a run's starts lies: two files a rank from torchrun, and two a node from its agent."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asr_train.run_dir import RunDir
from launch.ending.starts import Start

_TEED: Final = re.compile(r"^\[\w+\d+\]:")  # torchrun repeats its ranks' lines so
_HEADING: Final = re.compile(r"^--- (\S+) on \S+ ---$")
_CHUNK_BYTES = 1 << 20


def heading(start: Start, node: int) -> str:
    """What an agent writes first: its files go on when the job is put back into the queue."""
    return f"--- {start.name} on {start.hosts[node]} ---"


@dataclass(frozen=True)
class LogFile:
    """One file of output.

    Attributes:
        start: name of the start whose lines are wanted.
        rank: who wrote it; None for the agent of a node with several ranks.
        has_headings: other starts wrote to it too, each under its heading.
    """

    path: Path
    start: str
    node: int
    rank: int | None
    has_headings: bool = False

    @property
    def label(self) -> str:
        """`rank 3`, or `node 1` for its agent."""
        return f"node {self.node}" if self.rank is None else f"rank {self.rank}"


class Reader:
    """The lines of a file that may grow: those of its start, without those that ranks' own files hold too."""

    def __init__(self, file: LogFile) -> None:
        self.file = file
        self._position = 0
        self._is_mine = not file.has_headings

    def read(self, *, is_last: bool) -> Iterator[str]:
        """The lines that were added since; one that is not ended yet only at the last time."""
        rest = b""
        with self.file.path.open("rb") as stream:
            stream.seek(self._position)
            while chunk := stream.read(_CHUNK_BYTES):
                *whole, rest = (rest + chunk).split(b"\n")
                self._position = stream.tell() - len(rest)
                yield from self._mine(whole)
        if rest and is_last:
            yield from self._mine([rest])

    def _mine(self, lines: list[bytes]) -> Iterator[str]:
        for line in lines:
            text = line.decode("utf-8", "replace")
            if self.file.has_headings and (found := _HEADING.match(text)):
                self._is_mine = found[1] == self.file.start
            elif self._is_mine and not (self.file.rank is None and _TEED.match(text)):
                yield text


def log_files(run: RunDir, start: Start) -> list[LogFile]:
    """The files of one start that there are, node by node: its agent's, then its ranks'."""
    found = []
    is_single = len(start.hosts) * start.processes_per_node == 1  # it writes through its agent
    for node in range(len(start.hosts)):
        if start.job_id is not None:
            for stream in ("out", "err"):
                path = run.path / "slurm" / f"{start.job_id}_{node}_log.{stream}"
                found.append(LogFile(path, start.name, node, 0 if is_single else None, has_headings=stream == "err"))
        for local_rank, rank in enumerate(start.ranks(node)):
            for folder in sorted(start.logs(run, node).glob(f"*/attempt_*/{local_rank}"))[-1:]:
                found += [LogFile(folder / f"{stream}.log", start.name, node, rank) for stream in ("stdout", "stderr")]
    return [file for file in found if file.path.exists()]
