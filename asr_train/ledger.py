"""Where a rank's time goes: every moment of its process lies in one part, so that the parts add up to its life.

The parts are measured on the host, without asking the device anything; what a step hides from the host (padding,
turns without a unit, waiting inside a backward) is taken out of its compute once the step is over.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, get_args

import psutil

Part = Literal["compute", "padding", "data_wait", "peer_wait", "checkpoint", "evaluation", "startup", "other"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)
"""compute: steps, on audio that counts. padding: steps, on padding, by its cost. data_wait: for the loader.
peer_wait: for other ranks, the exchange of gradients in it. checkpoint: standing still for one. startup: from the
start of the process to the first step. other: logging, and what is between steps."""


def name_of(part: str) -> str:
    """A part's name for people, the same on screens, pages and in text."""
    return part.replace("_", " ")


class Ledger:
    """Seconds of one rank by part, since its process began.

    Args:
        quadratic: q of the cost of an utterance, `frames + q * frames**2`, as in the plan.
        age_s: how old the process is; asked of the system by default.
    """

    def __init__(self, *, quadratic: float, age_s: float | None = None) -> None:
        age_s = _age_s() if age_s is None else age_s
        self._quadratic = quadratic
        self._seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        self._part: Part = "startup"
        self._since = self._begun = time.monotonic() - max(0.0, age_s)
        self._step_start_s = 0.0  # compute before this step
        self._costs = _Costs()
        self.cost = 0.0  # frames' worth of padded units that this rank has computed

    def enter(self, part: Part) -> None:
        """What this rank does from now on."""
        now = time.monotonic()
        self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        """A part for as long as a block lasts; then the one before it goes on."""
        before = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def begin_step(self) -> None:
        """A step begins."""
        self.enter("compute")
        self._step_start_s = self._seconds["compute"]
        self._costs = _Costs()

    def add_unit(self, num_frames: Sequence[int], padded_frames: int, *, is_idle: bool) -> None:
        """A unit of this step: the frames of its utterances, and those that each is padded to."""
        costs, q = self._costs, self._quadratic
        padded = len(num_frames) * (padded_frames + q * padded_frames**2)
        costs.all += padded
        if is_idle:
            costs.idle += padded
        else:
            costs.padding += padded - sum(frames + q * frames**2 for frames in num_frames)

    def end_step(self, peer_wait_s: float) -> None:
        """A step is over, on the device too; `peer_wait_s` of its compute was waiting for other ranks."""
        self.enter("other")
        costs, spent_s = self._costs, self._seconds["compute"] - self._step_start_s
        peer_wait_s = min(max(0.0, peer_wait_s), spent_s)
        worked_s = spent_s - peer_wait_s
        if costs.all > 0:
            padding_s, idle_s = worked_s * costs.padding / costs.all, worked_s * costs.idle / costs.all
        else:
            padding_s = idle_s = 0.0
        self._seconds["compute"] -= peer_wait_s + padding_s + idle_s
        self._seconds["padding"] += padding_s
        self._seconds["peer_wait"] += peer_wait_s + idle_s
        self.cost += costs.all - costs.idle

    def read(self) -> dict[Part, float]:
        """Seconds by part until now."""
        self.enter(self._part)
        return dict(self._seconds)

    @property
    def wall_s(self) -> float:
        """Age of the process."""
        return time.monotonic() - self._begun


class _Costs:
    """Cost of a step's units on this rank: of all of them, of their padding, of idle turns."""

    def __init__(self) -> None:
        self.all = self.padding = self.idle = 0.0


def _age_s() -> float:
    """How old this process is. Linux knows it to 10 ms; the time of day at which it began, only to a second."""
    try:
        after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        begun_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # `starttime` of proc(5), since boot
        return float(time.clock_gettime(time.CLOCK_BOOTTIME)) - begun_s
    except (OSError, AttributeError):
        return float(time.time() - psutil.Process().create_time())


def stragglers(ranks: Sequence[dict[str, Any]]) -> list[float]:
    """How much longer than the median rank each one works on the same amount: 0.1 is a tenth longer.

    Args:
        ranks: of each its `cost`, and its seconds of compute, padding and data_wait.
    """
    paces = [
        sum(rank[f"{part}_s"] for part in ("compute", "padding", "data_wait")) / rank["cost"] if rank["cost"] else None
        for rank in ranks
    ]
    usual = median([pace for pace in paces if pace is not None] or [0.0])
    return [pace / usual - 1 if pace is not None and usual > 0 else 0.0 for pace in paces]
