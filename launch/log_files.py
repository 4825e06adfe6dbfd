"""Where the output of a run's starts lies: two files a rank from torchrun, and two a node from its agent."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asr_train.run_dir import RunDir
from launch.starts import Start

_TEED: Final = re.compile(r"^\[\w+\d+\]:")  # torchrun repeats its ranks' lines so


@dataclass(frozen=True)
class LogFile:
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


def log_files(run: RunDir, start: Start) -> list[LogFile]:
    """The files of one start that there are, node by node: its agent's, then its ranks'.

    An agent's files are those of its job, which goes on with them when it is put back into the queue.
    """
    found = []
    for node in range(len(start.hosts)):
        if start.job_id is not None:
            paths = (run.path / "slurm" / f"{start.job_id}_{node}_log.{stream}" for stream in ("out", "err"))
            found += [LogFile(path, node, None) for path in paths if path.exists()]
        for local_rank, rank in enumerate(start.ranks(node)):
            folders = sorted(start.logs(run, node).glob(f"*/attempt_*/{local_rank}"))
            paths = (folders[-1] / f"{stream}.log" for stream in ("stdout", "stderr") if folders)
            found += [LogFile(path, node, rank) for path in paths if path.exists()]
    return found
