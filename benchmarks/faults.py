"""`python benchmarks/faults.py`: the same faults done to accelerate's checkpoints and to ours; what the user gets.

Each fault is done for real, to real processes and real files, and the training is then resumed in the documented way.
benchmarks/README.md says what the words in the table mean.
"""

import argparse
import ctypes
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fault_sides import EPOCH, Ended, How, Ours, Side, Theirs, kill_at
from measuring import hardware, markdown, versions

from asr_train.errors import EXIT_DONE, run_main
from asr_train.files import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "faults.json"
SIDES = {"ours": Ours, "accelerate": Theirs}
TOLERANCE = 1e-5  # relative; the losses of one process are expected to be equal to the bit
ON_PURPOSE = ("Weights only load failed", "Please manually override")  # errors that say what is wrong and what to do
FILLER = "filler"  # a file that fills a disk
_LIBRARIES = ("wavefleet", "torch", "accelerate", "safetensors", "transformers")
_CLONE_NEWNS = 0x20000  # Linux, sched.h
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Fault:
    """Something that happens to a training.

    Attributes:
        name: what it is, in the table.
        keep: checkpoints that the training keeps.
        every: steps between them; 5 are an epoch.
        dropout: whether the model has any.
        arm: makes it happen in the training's process, from step `at` on.
        at: with 10 it is in the second save.
        on_small_disk: the run is on a disk of its own.
        damage: does it to the newest checkpoint, after the training; gets a file that a program would make.
        number: processes to go on with.
    """

    name: str
    keep: int = 2
    every: int = EPOCH
    dropout: bool = True
    arm: Callable[[Side, Path], None] | None = None
    at: int = 2 * EPOCH
    on_small_disk: bool = False
    damage: Callable[[Side, Path, Path], None] | None = None
    number: int = 1
    is_in_smoke: bool = False


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/faults.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few of the faults: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.smoke and os.geteuid() != 0:
        parser.error("a full disk is mounted for this, which takes root; --smoke leaves that out")
    os.environ |= _ENVIRONMENT
    torch.set_num_threads(1)
    faults = [fault for fault in FAULTS if fault.is_in_smoke or not arguments.smoke]
    found: dict[str, dict[str, Any]] = {fault.name: {} for fault in faults}
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        for side_name, make in SIDES.items():
            folder = Path(name) / side_name
            folder.mkdir()
            for fault_name, outcome in on_side(make(folder), folder, faults).items():
                found[fault_name][side_name] = outcome
    result = {
        "benchmark": "faults",
        "hardware": hardware(),
        "versions": versions(*_LIBRARIES),
        "faults": [{"fault": fault_name, **outcomes} for fault_name, outcomes in found.items()],
    }
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def on_side(side: Side, folder: Path, faults: Sequence[Fault]) -> dict[str, dict[str, Any]]:
    """Every fault, done to one side, each to a run of its own, and the training that follows."""
    wholes: dict[tuple[int, bool], Path] = {}  # runs that nothing happened to
    for fault in faults:
        kind = (fault.every, fault.dropout)
        if kind not in wholes:
            wholes[kind] = folder / f"whole-{len(wholes)}"
            ended = side.run(wholes[kind], How(keep=9, every=fault.every, dropout=fault.dropout))
            if ended.code:
                raise RuntimeError(f"{side.name}: nothing happened, and yet it failed:\n{ended.output}")
    found = {}
    for number, fault in enumerate(faults):
        where = Where(wholes[fault.every, fault.dropout], folder / f"run-{number}", folder / f"trap-{number}")
        where.run.mkdir()
        with small_disk(where.run) if fault.on_small_disk else nullcontext():
            found[fault.name] = _one(side, fault, where)
        shutil.rmtree(where.run)
    return found


@dataclass(frozen=True)
class Where:
    """A run that nothing happened to, the one that something happens to, and what a poisoned pickle makes."""

    whole: Path
    run: Path
    trap: Path


def _one(side: Side, fault: Fault, where: Where) -> dict[str, Any]:
    """One fault, and the training that follows."""
    how = How(keep=fault.keep, every=fault.every, dropout=fault.dropout)
    first = Ended(0, "")
    if fault.arm is not None:
        first = side.run(where.run, replace(how, arm=partial(_arm, fault, side, where.run)))
    else:
        shutil.copytree(where.whole, where.run, dirs_exist_ok=True)
        side.cut(where.run)
    if fault.damage is not None:
        fault.damage(side, where.run, where.trap)
    (where.run / FILLER).unlink(missing_ok=True)  # the user makes room
    second = side.run(where.run, replace(how, number=fault.number, resume=True))
    words = {"first": _said(first, where.run), "second": _said(second, where.run)}
    return judge(side, fault, where, second) | words


def _arm(fault: Fault, side: Side, run: Path, step: int) -> None:
    if step == fault.at and fault.arm is not None:
        fault.arm(side, run)


def judge(side: Side, fault: Fault, where: Where, ended: Ended) -> dict[str, Any]:
    """What the user got, in a word, and from which step it went on."""
    start, losses, expected = side.attempt_from(where.run), side.losses(where.run), side.losses(where.whole)
    is_right = losses.keys() == expected.keys() and all(
        abs(losses[step] - expected[step]) <= TOLERANCE * abs(expected[step]) for step in losses
    )
    if where.trap.exists():
        return {"outcome": "a program was executed", "from": None}
    if ended.code:
        is_refused = "Traceback" not in ended.output or any(text in ended.output for text in ON_PURPOSE)
        return {"outcome": "refused, with a message" if is_refused else "crash", "from": None}
    if fault.damage is not None:
        is_older = is_right and start != fault.at
        is_said = "not whole" in ended.output
        older = "previous one used, said" if is_said else "previous one used, not said"
        return {"outcome": older if is_older else "silently wrong", "from": start}
    if not is_right:
        return {"outcome": "silently wrong" if fault.arm is not None else "goes on, other losses", "from": start}
    return {"outcome": "right", "from": start}


def _said(ended: Ended, run: Path) -> dict[str, Any]:
    """How processes ended: code and last words, without the names of folders."""
    lines = [line for line in ended.output.splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return {"code": ended.code, "last_words": text.replace(str(run), "RUN").replace(str(run.parent), "FOLDER")[:300]}


# --- faults while saving --------------------------------------------------------------------------------------------


def _kill(moment: str) -> Callable[[Side, Path], None]:
    def arm(side: Side, run: Path) -> None:
        owner, name, after = side.kill_points()[moment]
        kill_at(owner, name, after=after)

    return arm


def _kill_in(part: str) -> Callable[[Side, Path], None]:
    """The kernel ends the process in the middle of writing a part of the checkpoint, by SIGXFSZ in SIGKILL's place."""

    def arm(side: Side, run: Path) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (side.sizes(run)[part], resource.RLIM_INFINITY))

    return arm


def _fill_disk(side: Side, run: Path) -> None:
    """All but half of a checkpoint's room on the disk is taken."""
    size = sum(path.stat().st_size for path in side.newest(run).rglob("*") if path.is_file())
    disk = os.statvfs(run)
    with (run / FILLER).open("wb") as stream:
        stream.write(bytes(disk.f_bavail * disk.f_frsize - size // 2))


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of its own in the place of a folder, seen by this process and its children alone; needs root."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNS) != 0:
        raise PermissionError("a disk that is full needs root, to mount one")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _kill_while_deleting(side: Side, run: Path) -> None:
    """A process is killed when one file of a folder is deleted."""

    def rmtree(path: str | Path, *args: Any, **options: Any) -> None:
        max((file for file in Path(path).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    shutil.rmtree = rmtree  # type: ignore[assignment]


# --- damage on disk -------------------------------------------------------------------------------------------------


def _flip(part: str) -> Callable[[Side, Path, Path], None]:
    """One bit, of an exponent where numbers lie at multiples of four bytes, in the middle of the largest tensor."""

    def damage(side: Side, run: Path, trap: Path) -> None:
        path = side.file(run, part)
        data = bytearray(path.read_bytes())
        data[side.middle_of(run, part) | 3] ^= 0x08
        path.write_bytes(data)

    return damage


def _on_file(part: str, change: Callable[[Path], None]) -> Callable[[Side, Path, Path], None]:
    return lambda side, run, trap: change(side.file(run, part))


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class _Program:
    """What a pickle runs when it is loaded."""

    def __init__(self, trap: Path) -> None:
        self._trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._trap),)


def _poison(part: str) -> Callable[[Side, Path, Path], None]:
    """A pickle that runs a program, in the place of a file; whoever puts it there makes the manifest fit."""

    def damage(side: Side, run: Path, trap: Path) -> None:
        path = side.file(run, part)
        path.write_bytes(pickle.dumps(_Program(trap)))
        side.make_fit(run, path)

    return damage


def _now(side: Side, run: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS = (
    Fault("resumed at the end of an epoch"),
    Fault("resumed in mid-epoch", every=7, is_in_smoke=True),
    Fault("resumed in mid-epoch, no dropout", every=7, dropout=False),
    Fault("resumed in mid-epoch on 2 processes", every=7, number=2),
    Fault("resumed in mid-epoch on 2 processes, no dropout", every=7, dropout=False, number=2),
    Fault("SIGKILL between two saves, resumed, saved again", arm=_now, at=7),
    *(
        Fault(f"{what}; {keep} kept", keep=keep, arm=arm, is_in_smoke=what == "SIGKILL as a save begins" and keep == 1)
        for keep in (1, 2)
        for what, arm in {
            "SIGKILL as a save begins": _kill("begins"),
            "killed in the middle of the weights": _kill_in("weights"),
            "killed in the middle of the optimizer's state": _kill_in("optimizer"),
            "SIGKILL between two files": _kill("between"),
            "SIGKILL when all is written": _kill("written"),
            "SIGKILL while the oldest one is deleted": _kill_while_deleting,
        }.items()
        if keep == 1 or arm is not _kill_while_deleting
    ),
    *(
        Fault(f"the disk is full in the middle of a save; {keep} kept", keep=keep, arm=_fill_disk, on_small_disk=True)
        for keep in (1, 2)
    ),
    Fault("a flipped bit in the weights", damage=_flip("weights"), is_in_smoke=True),
    Fault("a flipped bit in the optimizer's state", damage=_flip("optimizer")),
    Fault("half of the weights' file", damage=_on_file("weights", _halve)),
    Fault("half of the optimizer's file", damage=_on_file("optimizer", _halve)),
    Fault("half of the random generators' file", damage=_on_file("generators", _halve)),
    Fault("no weights' file", damage=_on_file("weights", Path.unlink)),
    Fault("no optimizer's file", damage=_on_file("optimizer", Path.unlink)),
    Fault("no random generators' file", damage=_on_file("generators", Path.unlink)),
    Fault("a pickle that is a program for the optimizer's state", damage=_poison("optimizer")),
    Fault("a pickle that is a program for the index, or the position", damage=_poison("index"), is_in_smoke=True),
    Fault("a pickle that is a program for the random generators", damage=_poison("generators"), is_in_smoke=True),
)


# --- what is shown --------------------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    rows = [[entry["fault"], *(_shown(entry[side]) for side in SIDES)] for entry in result["faults"]]
    return "\n".join(markdown(("fault", "ours", "accelerate"), rows, num_left=3))


def _shown(found: dict[str, Any]) -> str:
    outcome: str = found["outcome"]
    return outcome if found["from"] is None else f"{outcome}, from step {found['from']}"


if __name__ == "__main__":
    sys.exit(run_main(main))
