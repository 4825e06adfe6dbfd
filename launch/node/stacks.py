"""The Python stacks of a node's ranks, asked for by signal and copied into the run directory, before anything is ended.

A rank answers wherever it is, in C code too; one that is stopped, or waits for a disk, cannot. NCCL's own record of its
last collectives is asked for and copied where there is one.
"""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from asr_train.files import write_text
from asr_train.phase import STACKS_SIGNAL, stacks_file
from launch.node.ranks import RankState, process_state, waits_in

STOPPED: Final = ("T", "t", "Z")
_ANSWER_S = 5.0
_NCCL_S = 5.0
_POLL_S = 0.1
_NCCL_PIPE: Final = "nccl-pipe-"
_NCCL_TRACE: Final = "nccl-trace-"


def nccl_variables(folder: Path) -> dict[str, str]:
    """Variables by which NCCL's process groups keep a record of their last collectives, and write it when asked."""
    return {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / _NCCL_TRACE),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(folder / _NCCL_PIPE),
    }


def collect(ranks: Sequence[RankState], phases: Path, out: Path) -> list[RankState]:
    """Write `out`/rank-R.txt for ranks of this node: what each was doing, its process, its stacks.

    Args:
        ranks: as they show themselves.
        phases: the folder in which they do.
        out: made if it is not there.

    Returns:
        the same ranks, with the states of their processes.
    """
    before = {rank.rank: process_state(rank.pid) for rank in ranks}
    sizes = {rank.rank: _size(stacks_file(phases, rank.rank)) for rank in ranks}
    asked = {rank.rank for rank in ranks if before[rank.rank] not in (None, *STOPPED) and _ask(rank)}
    _wait_for_answers(asked, sizes, phases)
    found = []
    for rank in ranks:
        state = process_state(rank.pid)
        if state == "D" and before[rank.rank] != "D":  # for a moment only, as anybody who writes a file
            state = before[rank.rank]
        seen = replace(rank, state=state, waits_in=waits_in(rank.pid))
        answer = _read(stacks_file(phases, rank.rank), sizes[rank.rank])
        write_text(out / f"rank-{rank.rank}.txt", f"{seen}\n\n{answer or _silence(seen)}\n")
        found.append(seen)
    _collect_nccl(phases, out)
    return found


def _ask(rank: RankState) -> bool:
    """Ask a rank for its stacks; one that has shown itself has prepared for that before."""
    if rank.pid is None:
        return False
    try:
        os.kill(rank.pid, STACKS_SIGNAL)
    except OSError:
        return False
    return True


def _wait_for_answers(asked: set[int], sizes: dict[int, int], phases: Path) -> None:
    """Wait until every rank that was asked has written, and none goes on writing."""
    until = time.monotonic() + _ANSWER_S
    last: dict[int, int] = {}
    while asked and time.monotonic() < until:
        time.sleep(_POLL_S)
        now = {rank: _size(stacks_file(phases, rank)) for rank in asked}
        if now == last and all(now[rank] > sizes[rank] for rank in asked):
            return
        last = now


def _silence(rank: RankState) -> str:
    if rank.pid is None:
        return "no stacks: it never showed a phase, so it has not come as far as to answer"
    if rank.state is None:
        return "no stacks: its process is gone"
    if rank.state in STOPPED:
        return "no stacks: a process in this state cannot answer"
    return f"no stacks: it did not answer within {_ANSWER_S:.0f} s"


def _collect_nccl(phases: Path, out: Path) -> None:
    """Ask for NCCL's records through its pipes, wait until they are there, copy them."""
    asked = [path for path in phases.glob(f"{_NCCL_PIPE}*") if path.is_fifo() and _write_byte(path)]
    until = time.monotonic() + _NCCL_S
    while len(list(phases.glob(f"{_NCCL_TRACE}*"))) < len(asked) and time.monotonic() < until:
        time.sleep(_POLL_S)
    keep_nccl(phases, out)


def keep_nccl(phases: Path, out: Path) -> None:
    """Copy the records of collectives that NCCL wrote, if it did."""
    for path in phases.glob(f"{_NCCL_TRACE}*"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / path.name)


def _write_byte(pipe: Path) -> bool:
    """Write to a pipe, if anybody reads it."""
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        os.write(descriptor, b"1")
    finally:
        os.close(descriptor)
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path, start: int) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
