"""The work of a corpus cut into shards, and the processes that do it."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asr_train.data.rows import Listing
from asr_train.data.shards import RowChecks, end_with_parent, write_shard
from asr_train.errors import CorpusError, say

_LINE_EVERY_S = 10.0  # where there is no terminal


@dataclass(frozen=True)
class Shard:
    """One piece of work: rows start..stop of a listing, which is part of a set."""

    set: str
    number: int
    first_row: int  # of the set
    listing: Listing
    start: int
    stop: int


def cut(listings: Mapping[str, Sequence[Listing]], shard_rows: int) -> list[Shard]:
    """The work of all sets, in order; always the same pieces."""
    shards = []
    for name, group in listings.items():
        number = first_row = 0
        for listing in group:
            for start in range(0, len(listing), shard_rows):
                stop = min(start + shard_rows, len(listing))
                shards.append(Shard(name, number, first_row + start, listing, start, stop))
                number += 1
            first_row += len(listing)
    return shards


def write_shards(
    path: Path, shards: Sequence[Shard], checks: Callable[[str], RowChecks], num_proc: int, progress: bool
) -> None:
    """Write shards under `path`, in this process or in `num_proc` others.

    Args:
        path: the corpus.
        shards: those that are missing.
        checks: name of a set -> its checks.
        num_proc: worker processes; they end when this process does, killed too.
        progress: show a bar, or lines where there is no terminal.

    Raises:
        CorpusError: a worker was killed.
    """
    for name in {shard.set for shard in shards}:
        (path / name).mkdir(parents=True, exist_ok=True)

    def work(shard: Shard) -> tuple[Any, ...]:
        rows = shard.listing.rows(shard.start, shard.stop)
        return path / shard.set, shard.number, shard.first_row, rows, checks(shard.set)

    num_proc = min(num_proc, len(shards))
    with _Bar(sum(shard.stop - shard.start for shard in shards), progress) as bar:
        if num_proc <= 1:
            for shard in shards:
                bar.advance(write_shard(*work(shard)))
            return
        context = multiprocessing.get_context("spawn")
        theirs, ours = context.Pipe(duplex=False)
        with _without_main(), theirs, ours, ProcessPoolExecutor(num_proc, context, end_with_parent, (theirs,)) as pool:
            try:
                for count in _in_flight(pool, map(work, shards), num_proc + 1):
                    bar.advance(count)
            except BaseException as error:
                ours.close()  # else Ctrl-C would wait for the shards in work
                if not isinstance(error, BrokenProcessPool):
                    raise
                raise CorpusError(
                    "a worker process of prepare was killed, for memory perhaps; what is done is kept in "
                    f"{path}: run the same command again, with a smaller data.num_proc"
                ) from None


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep workers from importing the program that is run, of which they need nothing.

    A script without `if __name__ == "__main__"`, as notebooks are, would prepare again in every worker.
    """
    main = sys.modules["__main__"]
    before = {name: getattr(main, name, None) for name in ("__spec__", "__file__")}  # what multiprocessing looks at
    for name in before:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


def _in_flight(pool: ProcessPoolExecutor, work: Iterator[tuple[Any, ...]], most: int) -> Iterator[int]:
    """Run `write_shard` on work items, a few at a time so that few rows are in memory; yields counts of rows."""
    running: set[Future[int]] = {pool.submit(write_shard, *item) for item in islice(work, most)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)
        running |= {pool.submit(write_shard, *item) for item in islice(work, len(done))}


class _Bar:
    """Rows done: a bar on a terminal, a line now and then elsewhere, nothing when not asked for."""

    def __init__(self, num_rows: int, shown: bool) -> None:
        self._total, self._done, self._shown = num_rows, 0, shown and num_rows > 0
        self._said_at = time.monotonic()
        columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not (self._shown and console.is_terminal))
        self._task = self._progress.add_task("prepare", total=num_rows)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._done += count
        self._progress.advance(self._task, count)
        if self._shown and self._progress.disable and time.monotonic() - self._said_at >= _LINE_EVERY_S:
            self._said_at = time.monotonic()
            say(f"prepare: {self._done:,} of {self._total:,} rows")
