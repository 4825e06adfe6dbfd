"""Stopping in an orderly way: a signal sets a flag, all ranks agree, the loop acts at a step boundary.

Saving inside a signal handler would deadlock as soon as two ranks are on different steps; so handlers only set a
flag, the flag travels with the reduction that every step makes anyway, and all ranks stop after the same step.
"""

import ctypes
import os
import signal
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopFlag:
    """Set by a stop signal; further signals change nothing. Forked workers never react."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._pid = os.getpid()

    def install(self) -> None:
        """Take over the stop signals of this process; the main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_name is not None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid and self.signal_name is None:
            self.signal_name = signal.Signals(number).name


def follow_launcher() -> None:
    """Make the death of the launcher a normal stop: without it a worker of `accelerate launch` lives on as an orphan.

    Does nothing when no launcher started this process.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # set by `accelerate launch`, always
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
