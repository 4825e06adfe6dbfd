"""Stopping in an orderly way: a signal, a file or a time limit asks, all ranks agree, the loop acts at a step boundary.

Saving inside a signal handler would deadlock as soon as two ranks are on different steps; so handlers only set a
flag, the flag travels with the reduction that every step makes anyway, and all ranks act after the same step.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
IMPATIENT_S: Final = 2.0  # a second Ctrl-C sooner than this may be the first one, arriving twice
_POLL_S = 0.5
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


class StopFlag:
    """Set by a stop signal; the same signals again change nothing. Forked workers never react.

    Attributes:
        reason: what asked for the stop, `SIGTERM` say; None when nothing did.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._pid = os.getpid()
        self._interrupted_s: float | None = None

    def install(self) -> None:
        """Take over the stop signals of this process, the main thread only; SIGQUIT prints stacks and goes on."""
        for number in SIGNALS:
            signal.signal(number, self._take)
        with suppress(OSError, ValueError, AttributeError):  # stderr is no file
            faulthandler.register(signal.SIGQUIT, all_threads=True)

    @property
    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.reason is not None

    def set(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if self._interrupted_s is None:
                self._interrupted_s = now_s
            elif now_s - self._interrupted_s >= IMPATIENT_S and has_terminal():
                os._exit(128 + signal.SIGINT)
        self.set(signal.Signals(number).name)


class Requests:
    """What asks rank 0 to stop or to save, besides signals: files in the run's control/, and a time limit."""

    def __init__(self, control: Path, max_time_s: float | None) -> None:
        self._control = control
        self._ends_s = None if max_time_s is None else time.monotonic() + max_time_s
        self._next_look_s = 0.0
        for kind in ("stop", "save"):
            self.forget(kind)  # was meant for an attempt before

    def look(self, stop: StopFlag) -> bool:
        """Set the flag where a stop is asked for; whether a checkpoint is. Looks at files twice a second at most."""
        now_s = time.monotonic()
        if self._ends_s is not None and now_s >= self._ends_s:
            stop.set("limits.max_time_s")
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + _POLL_S
        if self._is_asked("stop"):
            stop.set("control/stop")
        return self._is_asked("save")

    def _is_asked(self, kind: str) -> bool:
        """Whether there is a request, from this user or root: others have no say, whatever they may write to."""
        try:
            return (self._control / kind).stat().st_uid in (os.getuid(), 0)
        except OSError:
            return False

    def forget(self, kind: str) -> None:
        """Take a request away, once it is done."""
        with suppress(OSError):
            (self._control / kind).unlink(missing_ok=True)


def has_terminal() -> bool:
    """Whether a person sits at this program, who may press Ctrl-C again."""
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def follow_launcher() -> None:
    """Make the death of the launcher a normal stop: without it a worker of `accelerate launch` lives on as an orphan.

    Does nothing when no launcher started this process, and where the system cannot: only Linux can.
    """
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch`, always
    if not is_launched or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
