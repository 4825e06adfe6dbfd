"""The ranks of a node as their launcher sees them: what they show of themselves, and their processes in /proc."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from asr_train import phase


@dataclass(frozen=True, kw_only=True)
class RankState:
    """One rank at one moment.

    Attributes:
        phase: `start`, `step`, ... as in `asr_train.phase`; `start` for one that has shown nothing yet.
        num_changes: how often it went on; the rank with the fewest is behind.
        step_s: its usual time of a step.
        pid: of its process; None as long as it has shown nothing.
        state: its process's in /proc: T stopped, D waiting for a disk or a driver; None when there is no process.
        waits_in: the kernel's function that it waits in, where the system tells.
        idle_s: seconds since it last went on.
    """

    rank: int
    host: str
    phase: str = "start"
    step: int | None = None
    num_changes: int = 0
    step_s: float | None = None
    pid: int | None = None
    state: str | None = None
    waits_in: str = ""
    idle_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave; fields of later versions are passed over."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        process = f"process {self.pid}" if self.pid else "no sign of its process yet"
        state = f", state {self.state}" if self.state else ""
        waits_in = f", waits in {self.waits_in}" if self.waits_in else ""
        doing = f"phase {self.phase}{at} for {self.idle_s:.0f} s"
        return f"rank {self.rank} on {self.host}: {doing}; {process}{state}{waits_in}"


def read_rank(folder: Path, rank: int, host: str) -> RankState:
    """What a rank shows, without a look at its process."""
    record = phase.read_record(folder, rank)
    if record is None:
        return RankState(rank=rank, host=host)
    return RankState(
        rank=rank,
        host=host,
        phase=str(record["phase"]),
        step=record["step"],
        num_changes=int(record["num_changes"]),
        step_s=record["step_s"],
        pid=int(record["pid"]),
    )


def process_state(pid: int | None) -> str | None:
    """The letter that /proc has for a process; None when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None


def waits_in(pid: int | None) -> str:
    """The kernel's function that a process waits in; empty where it runs, or the system does not tell."""
    try:
        found = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8")
    except OSError:
        return ""
    return "" if found == "0" else found
