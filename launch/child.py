"""A child process that ends in an orderly way: our stop signals reach the processes that can act on them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

import psutil

from asr_train.errors import say
from asr_train.stop import IMPATIENT_S, has_terminal

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Receivers = Callable[[psutil.Process], list[psutil.Process]]


class Ended(NamedTuple):
    """How a child ended: 128 + N when signal N did it, and the first stop signal that we were sent, if any."""

    exit_code: int
    stopped_by: int | None


class _Signals:
    """Signals received and not yet passed on; whether Ctrl-C was pressed again."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.first: int | None = None
        self.impatient = False
        self._interrupted_s: float | None = None

    def take(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_s is None:
                self._interrupted_s = now_s
            self.impatient = now_s - self._interrupted_s >= IMPATIENT_S and has_terminal()
        if self.first is None:
            self.first = number
            if number == signal.SIGINT:
                say("stopping; press Ctrl-C again to end at once, without saving")
        self.pending.append(signal.SIGTERM if number == signal.SIGHUP else number)

    @contextmanager
    def installed(self) -> Iterator[None]:
        heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's, say
        before = {number: signal.signal(number, self.take) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def itself(child: psutil.Process) -> list[psutil.Process]:
    """Signals go to the child."""
    return [child]


def workers(child: psutil.Process) -> list[psutil.Process]:
    """Signals go to the child's children: `accelerate launch` does not pass them on when it has a single one."""
    try:
        return list(child.children())
    except psutil.NoSuchProcess:
        return []


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None, receivers: Receivers = itself) -> Ended:
    """Run a command to its end, with our terminal, passing on the signals that ask for a stop.

    It gets a session of its own, so that Ctrl-C comes once, from us. Should we be killed, it receives SIGTERM.
    A signal that comes before there is a receiver waits for it. The second Ctrl-C kills the whole tree.
    """
    signals = _Signals()
    with signals.installed():
        process = subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509 - this program has one thread
        )
        child = psutil.Process(process.pid)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=_POLL_S)
                return Ended(128 - code if code < 0 else code, signals.first)
            if signals.impatient:
                _kill_tree(child)
                process.wait()
                return Ended(128 + signal.SIGINT, signals.first)
            if signals.pending and (found := receivers(child)):
                numbers, signals.pending = signals.pending, []
                for receiver in found:
                    for number in numbers:
                        with suppress(psutil.NoSuchProcess):
                            receiver.send_signal(number)


def die_with_parent() -> Callable[[], None] | None:
    """What the child runs before its program, so that it hears of our death; Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: after the fork as little as possible should happen
    parent = os.getpid()

    def ask_for_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # we died in between
            os.kill(os.getpid(), signal.SIGTERM)

    return ask_for_signal


def _kill_tree(child: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in [*child.children(recursive=True), child]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
