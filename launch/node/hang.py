"""The hang detector: a limit for each phase, the stacks of all ranks before anything is ended, and who is to blame.

Each node's agent watches the ranks of its own node, and asks at every poll. The one that sees a phase go past its limit
tells the others by a file in a folder that they share, `hangs/<start>/` of the run directory; all of them write their
ranks' stacks and states there, wait for each other a little, and then each ends what it started.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from asr_train.config import LimitSettings
from asr_train.errors import say
from asr_train.files import read_json, write_json
from asr_train.phase import FOLDER, RECORD_BYTES, record_file
from launch.node.ranks import RankState, read_rank
from launch.node.stacks import STOPPED, collect, keep_nccl, nccl_variables
from launch.verdict import Hang

_LOOK_S = 1.0
_LOOK_AROUND_S = 5.0  # at the shared folder
_GRACE_S = 60.0  # for the other nodes' stacks
_PAUSE_S = 10.0  # a longer gap between two looks: we were stopped ourselves
_MIN_STEP_S = 300.0
_USUAL_STEPS = 20
_POLL_S = 0.2


class HangWatch:
    """Watches the ranks of this node; a context, whose end takes away the folder that ranks show themselves in.

    Attributes:
        environment: variables for the ranks.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        limits: LimitSettings,
        shared: Path,
        *,
        node: int = 0,
        num_nodes: int = 1,
        host: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to watch; the ranks are about to be started.

        Args:
            ranks: of this node.
            limits: of the run's recipe.
            shared: folder for this start's hangs, the same on all nodes; made when there is one.
            node: number of this node.
            num_nodes: all nodes.
            host: this node's name; the machine's own when empty.
            clock: seconds; for tests.
        """
        self._ranks, self._limits, self._shared = tuple(ranks), limits, shared
        self._node, self._num_nodes, self._host = node, num_nodes, host or socket.gethostname()
        self._clock = clock
        self._folder = Path(tempfile.mkdtemp(prefix="wavefleet-"))
        for rank in self._ranks:  # a disk that fills up later takes no rank's record away
            record_file(self._folder, rank).write_bytes(b" " * RECORD_BYTES)
        self._last_s = clock()
        self._paused_s = 0.0
        self._next_s = self._next_around_s = self._now_s()
        self._seen = {rank: (0, self._now_s()) for rank in self._ranks}  # changes, since when
        own = {name: value for name, value in nccl_variables(self._folder).items() if name not in os.environ}
        self.environment = {FOLDER: str(self._folder), **own}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            keep_nccl(self._folder, self._shared)  # what it wrote when one of its own timeouts came first
        shutil.rmtree(self._folder, ignore_errors=True)

    def look(self) -> bool:
        """Whether the attempt hangs, here or on another node; then all stacks are written, and it is to be killed.

        Looks once a second at most, and then for microseconds; on a hang it takes its time, a minute at most.
        """
        now_s = self._now_s()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + _LOOK_S
        ranks = self._read(now_s)
        late = [(rank, limit) for rank in ranks if (limit := self._limit(rank)) is not None and rank.idle_s > limit]
        if not late and not self._is_told(now_s):
            return False
        try:
            if late:
                self._tell(*late[0])
            seen = collect(ranks, self._folder, self._shared)
            content = {"node": self._node, "host": self._host, "ranks": [rank.to_json() for rank in seen]}
            write_json(self._shared / f"ranks-{self._node}.json", content)
            self._wait_for_others()
        except OSError as error:  # a full disk; the hang is to be ended all the same
            say(f"not all of the hang could be written down: {error}")
        return True

    def _now_s(self) -> float:
        """Seconds, without those in which we were stopped ourselves: a suspended job does not hang."""
        now_s = self._clock()
        if now_s - self._last_s > _PAUSE_S:
            self._paused_s += now_s - self._last_s
        self._last_s = now_s
        return now_s - self._paused_s

    def _read(self, now_s: float) -> list[RankState]:
        """This node's ranks, and for how long each has not gone on."""
        found = []
        for rank in self._ranks:
            state = read_rank(self._folder, rank, self._host)
            num_changes, since_s = self._seen[rank]
            if state.num_changes != num_changes:
                since_s = now_s
                self._seen[rank] = state.num_changes, since_s
            found.append(replace(state, idle_s=now_s - since_s))
        return found

    def _limit(self, rank: RankState) -> float | None:
        """Seconds that a rank may stay where it is; None for ever."""
        limits = self._limits
        if rank.phase == "step":
            if rank.step_s is None:  # the first one is not like the others: it compiles, and connects ranks
                return max(limits.start_s, limits.step_s or 0.0)
            return limits.step_s or max(_MIN_STEP_S, _USUAL_STEPS * rank.step_s)
        limit_of = {"start": limits.start_s, "checkpoint": limits.checkpoint_s, "evaluation": limits.evaluation_s}
        # how long a corpus takes to prepare depends on the data alone; and the end waits for a checkpoint
        return None if rank.phase == "prepare" else limit_of.get(rank.phase, limits.checkpoint_s)

    def _tell(self, rank: RankState, limit_s: float) -> None:
        """Have all nodes know of a hang."""
        say(f"{rank}; its limit is {limit_s:.0f} s: this is a hang. The stacks of all ranks go to {self._shared}")
        content = {"node": self._node, "host": self._host, "time": time.time(), "limit_s": limit_s, **rank.to_json()}
        write_json(self._shared / f"hang-{self._node}.json", content)

    def _is_told(self, now_s: float) -> bool:
        """Whether another node saw a hang."""
        if self._num_nodes == 1 or now_s < self._next_around_s:
            return False
        self._next_around_s = now_s + _LOOK_AROUND_S
        return any(self._shared.glob("hang-*.json"))

    def _wait_for_others(self) -> None:
        """Until all nodes have written their ranks' stacks, or one of them has had time enough."""
        until = time.monotonic() + _GRACE_S
        while len(list(self._shared.glob("ranks-*.json"))) < self._num_nodes and time.monotonic() < until:
            time.sleep(_POLL_S)


def found(shared: Path) -> Hang | None:
    """The hang that the agents of a start wrote down in their folder, if they did."""
    seen = sorted(_read_all(shared, "hang-*.json"), key=lambda content: float(content["time"]))
    if not seen:
        return None
    first = RankState.from_json(seen[0])
    ranks = [RankState.from_json(entry) for content in _read_all(shared, "ranks-*.json") for entry in content["ranks"]]
    culprit = blamed(ranks)
    where = culprit or first
    return Hang(
        phase=where.phase,
        step=where.step,
        rank=None if culprit is None else culprit.rank,
        host=None if culprit is None else culprit.host,
        state=None if culprit is None else culprit.state,
        time=float(seen[0]["time"]),
        stacks=f"{shared.parent.name}/{shared.name}",
    )


def blamed(ranks: Sequence[RankState]) -> RankState | None:
    """The rank that the others wait for: one whose process is stopped or stuck in the kernel, else the only one behind.

    None when several are equally far.
    """
    for letters in (STOPPED, ("D",)):
        if stuck := [rank for rank in ranks if rank.state in letters]:
            return min(stuck, key=lambda rank: (rank.num_changes, rank.rank))
    fewest = min((rank.num_changes for rank in ranks), default=0)
    behind = [rank for rank in ranks if rank.num_changes == fewest]
    return behind[0] if len(behind) == 1 else None


def _read_all(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(pattern)):
        try:
            yield read_json(path)
        except (OSError, ValueError):  # torn by a full disk
            continue
