"""Holds the daemons of a test cluster, and leaves no process behind; `tests/slurm_cluster.py` starts it.

Orders are JSON lines on stdin, each answered by one on stdout. At the order "end", or when the process that ordered
dies in whatever way, every process that ever came from here is killed and the cluster's folder removed.

A daemon runs below a holder of its own. Holder and keeper are subreapers: whatever a daemon or a job starts, in a
session of its own or orphaned, stays below its holder, so a holder with all below it is one machine that can be
switched off.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _prctl(option, value):
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _parents():
    """The parent of every living process."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state, parent = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()[:2]
            except OSError:  # it has just ended
                continue
            if state not in (b"Z", b"X"):
                parents[int(entry)] = int(parent)
    return parents


def descendants(top):
    """All living processes below one."""
    children = {}
    for pid, parent in _parents().items():
        children.setdefault(parent, []).append(pid)
    found, queue = [], [top]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _reap_one(options):
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


def _reap():
    while _reap_one(os.WNOHANG):
        pass


def kill_below(top):
    """SIGKILL until nothing lives below; what forks meanwhile is found on the next round."""
    while found := descendants(top):
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.01)


def _hold(argv, environ, log):
    """A holder's whole life: one daemon, and whatever is orphaned below it. Ends, and ends all, on SIGTERM."""

    def end(*_):
        kill_below(os.getpid())
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # should the keeper itself be killed
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    os.posix_spawnp(argv[0], argv, environ, file_actions=actions, setsid=True, setsigdef=_IGNORED)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


class _Keeper:
    def __init__(self):
        self.holders = {}

    def start(self, name, argv, environ, log):
        pid = os.fork()
        if pid == 0:
            try:
                _hold(argv, environ, log)
            finally:
                os._exit(1)
        self.holders[name] = pid

    def stop(self, name):
        """Everything below the daemon's holder, at once, as when a machine loses power."""
        holder = self.holders.pop(name, None)
        if holder is not None and holder in descendants(os.getpid()):
            kill_below(holder)
            with suppress(ProcessLookupError):  # it goes when its last child does
                os.kill(holder, signal.SIGKILL)

    def obey(self, order):
        verb = order.pop("verb")
        if verb == "start":
            self.start(**order)
        elif verb == "stop":
            self.stop(order["name"])
        _reap()
        return {"processes": descendants(os.getpid())}


def _orders(parent):
    """Orders as they come, until there are no more or the parent dies."""
    parent_ends, buffer = os.pidfd_open(parent), b""
    while os.getppid() == parent:
        ready = select.select([0, parent_ends], [], [], 1.0)[0]
        _reap()
        if parent_ends in ready:
            return
        if 0 in ready:
            received = os.read(0, 65536)
            if not received:
                return
            *lines, buffer = (buffer + received).split(b"\n")
            yield from map(json.loads, lines)


def main(folder, parent):
    """Obey until told to end, or until the parent dies, then kill all and remove the folder."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = _Keeper()
    try:
        for order in _orders(int(parent)):
            if order["verb"] == "end":  # said, since a fork of the parent may hold the other end of stdin
                break
            os.write(1, json.dumps(keeper.obey(order)).encode() + b"\n")
    finally:
        kill_below(os.getpid())
        while _reap_one(0):  # the dead are children of the keeper now: wait for the last of them
            pass
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
