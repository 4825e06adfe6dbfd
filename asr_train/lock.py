"""A lock that says who holds it: a file with host and pid, kept alive by a heartbeat.

Works on a shared file system and survives SIGKILL: a holder that is dead on this host, or whose heart has not beaten
for `STALE_S`, is no holder.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

BEAT_S = 5.0
STALE_S = 60.0


class LockHeldError(Exception):
    """Somebody alive holds the lock; `holder` has host, pid and since."""

    def __init__(self, path: Path, holder: dict[str, Any]) -> None:
        self.path = path
        self.holder = holder
        super().__init__(f"{path} is held by pid {holder.get('pid')} on {holder.get('host')}")


class HeartbeatLock:
    """Hold `path` while the block runs.

    Raises:
        LockHeldError: on entry, when a live process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            held = holder(self.path)
            if held is not None:
                raise LockHeldError(self.path, held)
            self._remove_stale()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if _read(self.path).get("token") == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Create the file whole or not at all: written aside, then linked, which fails if the name exists."""
        me = psutil.Process()
        content = {
            "host": socket.gethostname(),
            "pid_space": _pid_space(),
            "pid": os.getpid(),
            "process_start": me.create_time(),
            "since": time.time(),
            "token": self._token,
        }
        aside = self.path.with_name(f".{self.path.name}.{self._token}")
        aside.write_text(json.dumps(content), encoding="utf-8")
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _remove_stale(self) -> None:
        """Move a dead holder's file away; of several that try, one succeeds and the others see it gone."""
        grave = self.path.with_name(f".{self.path.name}.stale.{self._token}")
        try:
            os.rename(self.path, grave)
        except FileNotFoundError:
            return
        if _alive(grave, _read(grave)):  # it was replaced between our look and our rename: give it back
            os.rename(grave, self.path)
        else:
            grave.unlink()

    def _beat(self) -> None:
        pid = os.getpid()
        while not self._ended.wait(BEAT_S):
            if os.getpid() != pid:
                return
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return
            except OSError:  # a shared file system that hiccups; the next beat may come through
                continue


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock now (host, pid, since), or None when nobody alive does."""
    content = _read(path)  # once: it may be gone the next moment
    return content if _alive(path, content) else None


def _pid_space() -> str:
    """What pids mean here: two containers of one host and name each count their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content


def _alive(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether the holder that a lock's file names is alive."""
    if not content:
        return False
    if content["host"] == socket.gethostname() and content.get("pid_space") == _pid_space():
        try:
            process = psutil.Process(content["pid"])
            return bool(
                abs(process.create_time() - content["process_start"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return False
    try:
        return time.time() - path.stat().st_mtime < STALE_S
    except FileNotFoundError:
        return False
