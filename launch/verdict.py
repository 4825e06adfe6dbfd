"""The values of a judgement: what is known of an attempt that ended, and what follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, Self, get_args

Kind = Literal[
    "done", "stopped_by_user", "time_limit", "preempted", "cancelled", "node_failure", "hardware", "preflight",
    "network", "hang", "out_of_memory", "recipe", "data", "code", "no_checkpoint", "failed", "unknown",
]  # fmt: skip
Action = Literal["done", "continue", "retry", "stop"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
RETRY: Final = "`wavefleet retry`"  # in advice; `Policy.retry_with` takes its place


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What is known of one node.

    Attributes:
        preflight: why its agent refused to start training; None when all was well.
        reported: its agent said at its end how it ended.
        exit_code: its child's; negative, or over 128, for a signal.
        ranks: which ran there.
        network: why it did not meet the other nodes before training, where nobody can say whose fault that is.
        hardware: an Xid or another hardware error of this attempt, from the driver or NVML.
        tail: last lines of the launcher's own output there, torchrun's report of failed workers among them.
    """

    preflight: str | None = None
    reported: bool = True
    exit_code: int | None = None
    ranks: tuple[int, ...] = ()
    hardware: str | None = None
    network: str | None = None
    tail: str = ""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A phase that went past its limit: start, step, checkpoint or evaluation.

    Attributes:
        rank: the one that the others wait for; None when that is not known.
        state: its process's in /proc: T stopped, D waiting for a disk or a driver.
        time: when the hang detector gave up.
        stacks: folder of all ranks' stacks, in the run directory.
    """

    phase: str
    step: int | None = None
    rank: int | None = None
    host: str | None = None
    state: str | None = None
    time: float | None = None
    stacks: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of an attempt that ended.

    Attributes:
        time: when this was collected, in seconds since the epoch; exclusions expire so long after it.
        ranks: rank -> what it wrote about its end, as read from outcome/.
        nodes: host -> its report; all nodes of the attempt, also those that said nothing.
        slurm_state: as squeue or sacct have it; None without Slurm.
        down_hosts: nodes that Slurm calls down, drained or failed; then the others' agents were ended with the job.
        cancelled_by: who called scancel, if that is known.
        stop_reason: what the agents were asked to stop by: `user`, `control/stop`, `time limit`, `limits.max_time_s`,
            `preempted`, or a signal's name when nothing better is known. Not the request that an agent itself wrote.
        stop_time: when that was, by signal, request or limit.
        resumed_step: of the checkpoint that the attempt began from.
        committed_step: of the newest checkpoint that this attempt committed.
        last_step: the last one in metrics.jsonl of this attempt.
        is_done: done.json is there.
        tails: rank -> last lines of its log.
        utterances: ids of the step that failed, from a `skipped` line or the plan.
        excluded_hosts: already excluded now, by verdicts or by hand.
    """

    num_ranks: int
    time: float = 0.0
    ranks: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    nodes: Mapping[str, NodeReport] = field(default_factory=dict)
    slurm_state: str | None = None
    down_hosts: tuple[str, ...] = ()
    cancelled_by: str | None = None
    stop_reason: str | None = None
    stop_time: float | None = None
    resumed_step: int | None = None
    committed_step: int | None = None
    last_step: int | None = None
    is_done: bool = False
    hang: Hang | None = None
    tails: Mapping[int, str] = field(default_factory=dict)
    utterances: tuple[str, ...] = ()
    excluded_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How often to try.

    Attributes:
        max_failed_attempts: that failed by themselves, in a row, with nothing new saved.
        network_waits_s: before each try after a network failure; as many tries as there are waits.
        exclusion_s: how long a node stays excluded.
        max_excluded_hosts: at one time; 0 where there is no other node, as on one machine.
        retry_with: what a person goes on with, in words.
    """

    max_failed_attempts: int = 3
    network_waits_s: tuple[float, ...] = (30.0, 120.0, 600.0, 1800.0)
    exclusion_s: float = 24 * 3600.0
    max_excluded_hosts: int = 4
    retry_with: str = RETRY


@dataclass(frozen=True, kw_only=True)
class Line:
    """One piece of evidence."""

    text: str
    rank: int | None = None
    host: str | None = None
    time: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """A node that the next attempts are kept off, until then (seconds since the epoch)."""

    host: str
    until: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an attempt ended and what follows.

    Attributes:
        message: for a person: what, where, what happens now or what to do.
        evidence: worst first.
        rank, host: the rank that failed first, and where; None when no rank did.
        step: where it failed.
        cause: the failure without its numbers, to know it again.
        hosts: the nodes that it could be blamed on.
        by_itself: not ended from outside.
        committed: the attempt committed a checkpoint.
        uses_budget: it failed by itself and saved nothing new.
        num_lost_steps: made and not in any checkpoint; they are made again.
        wait_s: before the next attempt.
        exit_code: as in `asr_train.errors`.
    """

    kind: Kind
    action: Action = "stop"
    message: str = ""
    evidence: tuple[Line, ...] = ()
    rank: int | None = None
    host: str | None = None
    step: int | None = None
    cause: str = ""
    hosts: tuple[str, ...] = ()
    utterances: tuple[str, ...] = ()
    by_itself: bool = False
    committed: bool = False
    uses_budget: bool = False
    num_lost_steps: int = 0
    exclude_hosts: tuple[Exclusion, ...] = ()
    wait_s: float = 0.0
    exit_code: int = 4

    @property
    def goes_on(self) -> bool:
        """Whether another attempt follows by itself."""
        return self.action in ("continue", "retry")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The verdict that `to_json` wrote; fields of later versions are passed over, a kind of theirs is unknown."""
        known = {entry.name for entry in fields(cls)}
        kept: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
        }
        kept["kind"] = kept["kind"] if kept.get("kind") in KINDS else "unknown"
        kept["evidence"] = tuple(Line(**line) for line in kept.get("evidence", ()))
        kept["exclude_hosts"] = tuple(Exclusion(**entry) for entry in kept.get("exclude_hosts", ()))
        return cls(**kept)


History = Sequence[Verdict]  # of one run, oldest first, since it was started or last retried by a person
