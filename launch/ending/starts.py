"""The starts of a run: each is a life of a job, or of `wavefleet train` on this machine, and has one attempt or none.

`agents/<name>/` of the run directory holds what its node agents write: `start.json`, heartbeats, how each node ended.
A verdict on each start is a line of `verdicts.jsonl`.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from asr_train.files import append_jsonl, read_json, read_jsonl, write_json
from asr_train.run_dir import RunDir
from launch.node.rendezvous import Meeting
from launch.verdict import Verdict

LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run.

    Attributes:
        name: `<job>.<restart>`, or `local.<number>`; its ranks find it in their environment as WAVEFLEET_START.
        hosts: its nodes, by Slurm's names where there is Slurm.
        processes_per_node: training processes a node.
        job_id: of the Slurm job, None without one.
        code: the folder that the program came from.
    """

    name: str
    hosts: tuple[str, ...]
    processes_per_node: int
    time: float
    job_id: str | None = None
    code: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The start that `write` wrote."""
        return cls(**{**values, "hosts": tuple(values["hosts"])})

    def ranks(self, node: int) -> range:
        """Ranks on a node."""
        return range(node * self.processes_per_node, (node + 1) * self.processes_per_node)

    def meeting(self, run: RunDir, node: int) -> Meeting:
        """Where its node agents meet."""
        return Meeting(_folder(run) / self.name, node, len(self.hosts))

    def logs(self, run: RunDir, node: int) -> Path:
        """Folder of a node's per-rank logs."""
        return run.path / "logs" / self.name / f"node-{node}"

    def hangs(self, run: RunDir) -> Path:
        """Folder of the ranks' stacks, should it hang."""
        return run.path / "hangs" / self.name

    def write(self, run: RunDir) -> None:
        """Write it down; node 0, before anything is started."""
        write_json(_folder(run) / self.name / "start.json", asdict(self))

    def attempt(self, run: RunDir) -> int | None:
        """Number of the attempt that began in this start; None when none did."""
        for number in range(run.newest_attempt(), 0, -1):
            with suppress(OSError, ValueError):
                if run.attempt_record(number).get("start") == self.name:
                    return number
        return None


def starts(run: RunDir) -> list[Start]:
    """All starts of a run, oldest first."""
    found = (Start.from_json(read_json(path)) for path in _folder(run).glob("*/start.json"))
    return sorted(found, key=lambda start: start.time)


def next_local(run: RunDir) -> str:
    """A name for the next start on this machine."""
    numbers = [int(start.name.rpartition(".")[2]) for start in starts(run) if start.job_id is None]
    return f"{LOCAL}.{max(numbers, default=0) + 1}"


def write_verdict(run: RunDir, start: Start, verdict: Verdict) -> None:
    """Append the verdict on a start."""
    append_jsonl(_verdicts(run), {"start": start.name, "time": time.time(), **verdict.to_json()})


def retried(run: RunDir) -> None:
    """A person wants it tried again: what failed before is not held against what comes now."""
    append_jsonl(_verdicts(run), {"event": "retried", "time": time.time()})


def verdicts(run: RunDir) -> Iterator[dict[str, Any]]:
    """The lines of verdicts, oldest first: start, time, and the fields of `Verdict`."""
    return (line for line in read_jsonl(_verdicts(run)) if "kind" in line)


def history(run: RunDir) -> list[Verdict]:
    """Verdicts since a person last had it tried again."""
    found: list[Verdict] = []
    for line in read_jsonl(_verdicts(run)):
        found = [*found, Verdict.from_json(line)] if "kind" in line else []
    return found


def _folder(run: RunDir) -> Path:
    return run.path / "agents"


def _verdicts(run: RunDir) -> Path:
    return run.path / "verdicts.jsonl"
