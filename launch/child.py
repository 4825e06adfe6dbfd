"""A child process that ends in an orderly way: our stop signals reach the processes that can act on them."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import psutil

from asr_train.errors import say
from asr_train.stop import IMPATIENT_S, PR_SET_PDEATHSIG, has_terminal
from asr_train.verbosity import is_verbose

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1

Receivers = Callable[[psutil.Process], list[psutil.Process]]


class Ended(NamedTuple):
    """How a child ended: 128 + N when signal N did it, and the first stop signal that we were sent, if any."""

    exit_code: int
    stopped_by: int | None


class Signals:
    """The stop signals that this process was sent.

    Attributes:
        first: the first one's number, None while there is none.
        time: when that came, in seconds since the epoch.
        count: how many there were.
        pending: those that nobody has passed on yet.
        impatient: Ctrl-C was pressed again.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.time: float | None = None
        self.count = 0
        self.pending: list[int] = []
        self.impatient = False
        self._interrupted_s: float | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over the stop signals, but those that were ignored when we were started: nohup's, say."""
        heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._take) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_s is None:
                self._interrupted_s = now_s
            self.impatient = now_s - self._interrupted_s >= IMPATIENT_S and has_terminal()
        if self.first is None:
            self.first, self.time = number, time.time()
            if number == signal.SIGINT:
                say("stopping; press Ctrl-C again to end at once, without saving")
        self.count += 1
        self.pending.append(signal.SIGTERM if number == signal.SIGHUP else number)


def itself(child: psutil.Process) -> list[psutil.Process]:
    """Signals go to the child."""
    return [child]


def workers(child: psutil.Process) -> list[psutil.Process]:
    """Signals go to the child's children: `accelerate launch` does not pass them on when it has a single one."""
    try:
        return list(child.children())
    except psutil.NoSuchProcess:
        return []


def nobody(child: psutil.Process) -> list[psutil.Process]:
    """Signals go nowhere: the wish to stop travels otherwise."""
    return []


def run_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    receivers: Receivers = itself,
    signals: Signals | None = None,
    is_over: Callable[[psutil.Process], bool] | None = None,
    output: IO[bytes] | None = None,
) -> Ended:
    """Run a command to its end, with our terminal, passing on the signals that ask for a stop.

    It gets a session of its own, so that Ctrl-C comes once, from us. Should we be killed, it receives SIGTERM.
    A signal that comes before there is a receiver waits for it. The second Ctrl-C kills the whole tree.

    Args:
        command: with its arguments.
        env: all of its environment; ours when None.
        cwd: its working directory.
        receivers: who gets our signals. When `nobody` does, the child ignores SIGUSR1 and SIGUSR2 at first, which a
            scheduler may send to every process of ours.
        signals: those of a caller that has installed them already.
        is_over: asked ten times a second; true ends the child and all its descendants with SIGKILL.
        output: a file for what it prints and tells; our own terminal when None.
    """
    mine = signals or Signals()
    if is_verbose():
        say(f"$ {shlex.join(command)}")
    with nullcontext() if signals else mine.installed():
        process = subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=at_start(shielded=receivers is nobody),  # noqa: PLW1509 - this program has one thread
        )
        child = psutil.Process(process.pid)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=_POLL_S)
                return Ended(128 - code if code < 0 else code, mine.first)
            if mine.impatient or (is_over is not None and is_over(child)):
                kill_tree(child)
                process.wait()
                return Ended(128 + (signal.SIGINT if mine.impatient else signal.SIGKILL), mine.first)
            if mine.pending and (found := receivers(child)):
                numbers, mine.pending = mine.pending, []
                for receiver in found:
                    for number in numbers:
                        with suppress(psutil.NoSuchProcess):
                            receiver.send_signal(number)


def at_start(*, shielded: bool) -> Callable[[], None]:
    """What the child runs before its program: it is to hear of our death (Linux only)."""
    # looked up here: after the fork as little as possible should happen
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        if shielded:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # we died in between
                os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def kill_tree(child: psutil.Process) -> None:
    """SIGKILL for a process and all its descendants."""
    with suppress(psutil.NoSuchProcess):
        for process in [*child.children(recursive=True), child]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
