"""Processes that train by turns: one a rank for each variant, copies of this one, which has imported everything."""

import ctypes
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import psutil
import torch
from throughput_variants import VARIANTS, Baton, Slice, Task

from asr_train.errors import WavefleetError
from asr_train.geometry import SAMPLE_RATE
from asr_train.stop import PR_SET_PDEATHSIG

_Key = TypeVar("_Key")
CLOSE_TURNS = 3
_MAX_TURN_S = 900
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # what accelerate's launcher sets
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Turn:
    """Some steps of a variant, all ranks together."""

    seconds: float
    audio_s_per_s: float  # of utterances, without padding
    audio_s_per_cpu_s: float
    steps: int
    audio_s: float
    padded_audio_s: float
    data_wait: float  # share of the time; of the rank that waited longest
    rank_bytes: int  # peak of the largest rank

    @classmethod
    def of(cls, slices: Sequence[Slice]) -> "Turn":
        """Of the slices of all ranks."""
        seconds = max(each.end_s for each in slices) - min(each.begin_s for each in slices)
        audio_s = sum(each.samples for each in slices) / SAMPLE_RATE
        return cls(
            seconds,
            audio_s / seconds,
            audio_s / sum(each.cpu_s for each in slices),
            slices[0].steps,
            audio_s,
            sum(each.padded_samples for each in slices) / SAMPLE_RATE,
            max(each.data_wait_s for each in slices) / seconds,
            max(each.memory_bytes for each in slices),
        )


class Contestant:
    """The processes of one variant; asleep but in its turns."""

    def __init__(self, variant: str, task: Task) -> None:
        self.variant = variant
        context = get_context("fork")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        gc.collect()
        gc.freeze()  # the children's collectors would otherwise touch, and so copy, what they have from here
        self._connections: list[Connection] = []
        self._processes = []
        begin_s = time.monotonic()
        for rank in range(task.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_be_rank, args=(variant, task, rank, port, theirs, begin_s))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self.first = Turn.of(self._receive())  # start-up and the first step

    def train(self, steps: int) -> Turn:
        """So many steps, while all others sleep."""
        for connection in self._connections:
            connection.send(steps)
        return Turn.of(self._receive())

    def _receive(self) -> list[Slice]:
        found: dict[Connection, Slice] = {}
        until_s = time.monotonic() + _MAX_TURN_S
        while left := [connection for connection in self._connections if connection not in found]:
            ready: Any = wait(left, timeout=max(0.0, until_s - time.monotonic()))
            received: Any = f"no step for {_MAX_TURN_S} s"
            for connection in ready:
                try:
                    received = connection.recv()
                except EOFError:
                    received = "it ended without a word"
                found[connection] = received
            if isinstance(received, str):
                self.close()
                raise WavefleetError(f"{VARIANTS[self.variant].name} failed:\n{received}")
        return [found[connection] for connection in self._connections]

    def close(self) -> None:
        """End the processes and their loaders' workers, which may stand still."""
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                workers = psutil.Process(process.pid).children(recursive=True)
                process.kill()
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.kill()
            process.join()


@contextmanager
def contest(entries: Mapping[_Key, tuple[str, Task]]) -> Iterator[dict[_Key, Contestant]]:
    """A contestant for each (variant, task); started one after the other, each alone."""
    found: dict[_Key, Contestant] = {}
    try:
        for key, (variant, task) in entries.items():
            found[key] = Contestant(variant, task)
        yield found
    finally:
        for contestant in found.values():
            contestant.close()


def by_turns(
    found: Mapping[_Key, Contestant], rounds: int, steps: Mapping[_Key, int], *, close: Sequence[_Key] = ()
) -> dict[_Key, list[Turn]]:
    """Train in slices, forth and back.

    Args:
        found: the contestants.
        rounds: in each of which everyone has a slice.
        steps: of a slice, of each.
        close: those that are as fast as each other, nearly: they have `CLOSE_TURNS` slices a round, by turns.
    """
    turns: dict[_Key, list[Turn]] = {key: [] for key in found}
    for number in range(rounds):
        order = list(found)
        for again in range(CLOSE_TURNS - 1):
            order += close if again % 2 else reversed(close)
        for key in order if number % 2 == 0 else reversed(order):
            turns[key].append(found[key].train(steps[key]))
    return turns


def _be_rank(variant: str, task: Task, rank: int, port: int, connection: Connection, begin_s: float) -> None:
    """The life of a forked rank: it trains until it is killed; an error goes back as text."""
    _die_with_parent()
    os.register_at_fork(after_in_child=_die_with_parent)  # a loader's worker stands still, and sees nobody go
    os.environ.update(_ENVIRONMENT)
    if task.world_size > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": task.world_size, "LOCAL_WORLD_SIZE": task.world_size}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    _be_silent()
    try:
        VARIANTS[variant].train(task, Baton(connection, begin_s))
    except BaseException:
        connection.send(traceback.format_exc())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _be_silent() -> None:
    """What the libraries and we print while training goes nowhere, at no other price than printing it."""
    nowhere: Any = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(nowhere, stream.fileno())
