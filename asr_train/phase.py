"""What this rank is doing, shown to its launcher in a file; and where its stacks go when the launcher asks for them.

The launcher names a folder on a disk of the node's own; where it names none, nothing happens. A record is written in
place, in one write of less than a page: nothing waits for a disk, and a reader sees it whole.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

FOLDER: Final = "WAVEFLEET_PHASES"  # the variable that names the folder
RECORD_BYTES: Final = 512
# Of our own choice: SIGQUIT is for people, and prints to stderr.
STACKS_SIGNAL: Final = signal.SIGRTMIN + 7 if sys.platform == "linux" else signal.SIGQUIT
_NUM_STEPS = 50  # that the usual time of a step is the median of

Phase = Literal["start", "prepare", "step", "checkpoint", "evaluation", "end"]


class PhaseFile:
    """One rank's record: phase, step, how often either went on, when it last did; rank-R.json in the folder.

    Every rank goes through the same changes in the same order, so that the one with the fewest is behind. Its files
    stay open until the process ends, which answers to the very end.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._rank = rank
        self._at: tuple[Phase, int | None] | None = None
        self._began_s = 0.0
        self._num_changes = 0
        self._step_times_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._record: int | None = None
        if folder is not None:
            with suppress(OSError):
                self._record = os.open(record_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stacks = stacks_file(folder, rank).open("a", encoding="utf-8")  # faulthandler keeps it
                faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "PhaseFile":
        """The record that this process's launcher asked for, if it did."""
        folder = environ.get(FOLDER)
        return cls(Path(folder) if folder else None, int(environ.get("RANK", "0")))

    def show(self, phase: Phase, step: int | None = None) -> None:
        """Say what begins now, or that it goes on: another unit of a step, another set of an evaluation.

        Args:
            phase: what this rank does.
            step: the one that is being made, else those that are made.
        """
        if self._record is None:
            return
        now_s = time.monotonic()
        if (phase, step) != self._at:
            if self._at is not None and self._at[0] == "step":
                self._step_times_s.append(now_s - self._began_s)
            self._at, self._began_s = (phase, step), now_s
        self._num_changes += 1
        content = {
            "rank": self._rank,
            "phase": phase,
            "step": step,
            "num_changes": self._num_changes,
            "changed": time.time(),
            "step_s": round(median(self._step_times_s), 6) if self._step_times_s else None,
            "pid": os.getpid(),
            "host": socket.gethostname()[:200],
        }
        with suppress(OSError):  # the training is worth more than its display
            os.pwrite(self._record, json.dumps(content).encode().ljust(RECORD_BYTES), 0)


def record_file(folder: Path, rank: int) -> Path:
    """Where a rank shows what it is doing."""
    return folder / f"rank-{rank}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank's stacks go that are asked for by signal."""
    return folder / f"rank-{rank}.stacks"


def read_record(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank showed last; None when it has shown nothing yet."""
    try:
        content = json.loads(record_file(folder, rank).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
