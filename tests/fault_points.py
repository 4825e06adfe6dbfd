"""Faults at every point of the checkpoint protocol: a rank that dies there, or a disk that refuses.

No hook in the product. In a forked rank `install` puts itself between the program and the operating system, for paths
below checkpoints/ alone: every file opened for writing, every write that reaches the kernel, every fsync, mkdir,
rename, unlink and rmdir is a *point*. A first run records them; later ones have a fault at one.
"""

import errno
import io
import os
import re
import signal
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from asr_train import checkpoint, run_dir

START = 0  # the phase before the first save: looking, setting aside, deleting; save n is phase n
SAVES = -1  # any save
ANY = -1  # of the ranks whichever comes there first
BUFFER_BYTES = 96 << 10  # of a file: the tiny model's shards take several writes, as real ones do
_NAMES = (
    (re.compile(r"\.staging-\d+-\w{8}"), ".staging"),
    (re.compile(r"\.trash-[^/]*"), ".trash"),
    (re.compile(r"step-\d{10}(\.\d+)?(-\w{8})?"), "step"),
    (re.compile(r"\.\d+\.tmp"), ".tmp"),
)


class Point(NamedTuple):
    """Where a rank is: the `number`-th time in this phase that it does this to that name."""

    operation: str
    name: str  # below checkpoints/, without what differs from run to run
    number: int = 1

    def __str__(self) -> str:
        return f"{self.operation} {self.name}" + (f" #{self.number}" if self.number > 1 else "")


class Fault(NamedTuple):
    """What happens to which rank where."""

    rank: int  # who comes to the point, or ANY
    point: Point
    moment: str = "before"  # or inside (a write: half of it is in the file), or after
    phase: int = SAVES
    victim: int | None = None  # who is killed there, ANY: who came; None: nobody is
    error: int | None = None  # errno of what the operating system says there instead

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.error is not None else f"rank {self.victim} killed"
        return f"{what} {self.moment} {self.point} of rank {self.rank}"


class Recorder:
    """What a rank came to, and what happens there.

    Attributes:
        points: (phase, point) in order.
    """

    def __init__(self, folder: Path, notes: Path, rank: int, faults: tuple[Fault, ...]) -> None:
        self.folder, self.notes, self.rank = folder, notes, rank
        self.faults = {(fault.phase, fault.point, fault.moment): fault for fault in faults if fault.rank in (rank, ANY)}
        self.phase = START
        self.points: list[tuple[int, Point]] = []
        self._seen: Counter[tuple[str, str]] = Counter()

    def begin_phase(self) -> None:
        """A save begins."""
        self.phase += 1
        self._seen.clear()

    def name(self, path: Any, folder_descriptor: int | None = None) -> str | None:
        """A path's name below checkpoints/, or None where it lies elsewhere."""
        there = _opened(path) if isinstance(path, int) else Path(os.fsdecode(path))
        if folder_descriptor is not None:
            there = _opened(folder_descriptor) / there
        if not there.is_relative_to(self.folder):
            return None
        name = str(there.relative_to(self.folder))
        for pattern, plain in _NAMES:
            name = pattern.sub(plain, name)
        return name

    def reach(self, operation: str, name: str) -> Point:
        """The rank comes to a point."""
        self._seen[operation, name] += 1
        point = Point(operation, name, self._seen[operation, name])
        self.points.append((self.phase, point))
        return point

    def at(self, moment: str, point: Point) -> None:
        """The fault of this moment, if there is one.

        Raises:
            OSError: as the operating system would.
        """
        phases = (self.phase, SAVES) if self.phase else (START,)
        fault = next((self.faults[key] for phase in phases if (key := (phase, point, moment)) in self.faults), None)
        if fault is None:
            return
        (self.notes / "fired").touch()
        if fault.error is not None:
            raise OSError(fault.error, os.strerror(fault.error))
        victim = self.rank if fault.victim == ANY else fault.victim
        os.kill(int((self.notes / f"pid-{victim}").read_text()), signal.SIGKILL)
        if victim == self.rank:
            time.sleep(60)  # the signal may take a moment

    @contextmanager
    def around(self, operation: str, name: str | None) -> Any:
        """An operation that is one moment long."""
        if name is None:
            yield
            return
        point = self.reach(operation, name)
        self.at("before", point)
        try:
            yield
        finally:  # a folder that is there already, say
            self.at("after", point)


def _opened(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


class _File(io.FileIO):
    """A file whose writes can break off in the middle."""

    recorder: Recorder
    point_name: str

    def write(self, data: Any) -> int:
        point = self.recorder.reach("write", self.point_name)
        self.recorder.at("before", point)
        view = memoryview(data).cast("B")
        num_bytes = super().write(view[: len(view) // 2])
        self.recorder.at("inside", point)
        num_bytes += super().write(view[len(view) // 2 :])
        self.recorder.at("after", point)
        return num_bytes


def install(folder: Path, *faults: Fault) -> Recorder:
    """Watch this rank's doings below a folder of checkpoints, and let things happen to it."""
    notes = notes_of(folder)
    rank = int(os.environ["RANK"])
    notes.mkdir(exist_ok=True)
    (notes / f"pid-{rank}").write_text(str(os.getpid()))
    recorder = Recorder(folder, notes, rank, faults)
    _watch_files(recorder)
    _watch_system(recorder)

    save = checkpoint.Saver.save

    def counted(saver: checkpoint.Saver, *args: Any, **kwargs: Any) -> None:
        saver.wait()  # one save at a time: that before this one ends in its own phase
        recorder.begin_phase()
        save(saver, *args, **kwargs)

    checkpoint.Saver.save = counted
    run_dir._git_state = lambda: None  # two processes an attempt, for nothing that is tested here
    return recorder


def notes_of(folder: Path) -> Path:
    """Where ranks leave their pids, and whether a fault happened."""
    return folder.parent / "fault-notes"


def _watch_files(recorder: Recorder) -> None:
    original = io.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        name = None if isinstance(file, int) or set("wxa").isdisjoint(mode) else recorder.name(file)
        if name is None:
            return original(file, mode, buffering, *args, **kwargs)
        with recorder.around("open", name):
            raw = _File(file, mode.replace("b", ""))
        raw.recorder, raw.point_name = recorder, name
        stream = io.BufferedWriter(raw, BUFFER_BYTES)
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)

    io.open = opened


def _watch_system(recorder: Recorder) -> None:
    def watch(operation: str) -> None:
        original = getattr(os, operation)

        def called(path: Any, *args: Any, **kwargs: Any) -> Any:
            with recorder.around(operation, recorder.name(path, kwargs.get("dir_fd"))):
                return original(path, *args, **kwargs)

        setattr(os, operation, called)

    def watch_move(operation: str) -> None:
        original = getattr(os, operation)

        def called(source: Any, target: Any) -> None:
            name, to = recorder.name(source), recorder.name(target)
            with recorder.around("rename", name and f"{name} -> {to}"):
                original(source, target)

        setattr(os, operation, called)

    for operation in ("fsync", "mkdir", "unlink", "rmdir"):
        watch(operation)
    for operation in ("rename", "replace"):
        watch_move(operation)
