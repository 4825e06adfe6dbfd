"""Several ranks in a test: forked from this process, which has imported everything, so that they start in 0.1 s.

Real processes, real gloo: `accelerate.Accelerator(cpu=True)` or `torch.distributed.init_process_group("gloo")` in the
function gives a group of `world_size`. The store is served by the test process, so no port can be taken in between.
"""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState


class RankError(AssertionError):
    """A rank failed, or did not end in time; the text is its traceback."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300) -> list[Any]:
    """Run `function(*args)` on `world_size` forked ranks; what each returned, by rank.

    Closures work, nothing but the results is pickled. Environment and changes to memory stay in the ranks.

    Raises:
        RankError: with the traceback of the rank that failed first, or of every rank where the time ran out.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pids: dict[int, int] = {}
        try:
            for rank in range(world_size):
                sys.stdout.flush()
                sys.stderr.flush()
                pid = os.fork()
                if pid == 0:
                    _be_rank(rank, world_size, store.port, Path(folder), function, args)
                pids[rank] = pid
            _wait(pids, Path(folder), time.monotonic() + timeout_s)
        finally:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _be_rank(rank: int, world_size: int, port: int, folder: Path, function: Callable[..., Any], args: Any) -> None:
    """The life of a forked rank; never returns."""
    code = 1
    gc.freeze()  # garbage of the parent may have threads to join, a store's say, that do not exist here
    try:
        stacks = (folder / f"stack-{rank}").open("w")
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
            # the store is the parent's, not rank 0's
            TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
        )  # fmt: skip
        torch.set_num_threads(1)  # OpenMP's threads of the parent do not exist here
        _forget_accelerate_state()
        result = function(*args)
        _write(folder / f"result-{rank}", pickle.dumps(result))
        code = 0
    except BaseException:
        _write(folder / f"error-{rank}", traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no clean-up of the test process that this is a copy of


def _forget_accelerate_state() -> None:
    """What an `Accelerator` of the parent left in module state is not true for a rank."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}")  # no pattern finds it
    aside.write_bytes(data)
    aside.rename(path)


def _wait(pids: dict[int, int], folder: Path, deadline: float) -> None:
    """Wait for every rank; removes those that ended from `pids`."""
    while pids:
        for rank, pid in list(pids.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del pids[rank]
                if status != 0:
                    raise RankError(_first_error(folder, rank, os.waitstatus_to_exitcode(status)))
        if pids and time.monotonic() > deadline:
            raise RankError(_stacks(pids, folder))
        time.sleep(0.005)


def _first_error(folder: Path, rank: int, code: int) -> str:
    """The oldest traceback: a rank that fails makes others fail in their next collective."""
    errors = sorted(folder.glob("error-?*"), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        return f"rank {rank} ended with exit code {code} and no exception"
    return f"rank {errors[0].name.removeprefix('error-')} failed:\n{errors[0].read_text()}"


def _stacks(pids: dict[int, int], folder: Path) -> str:
    for pid in pids.values():
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)
    found = [f"rank {rank} is here:\n{(folder / f'stack-{rank}').read_text()}" for rank in pids]
    return "the time is up\n" + "\n".join(found)
