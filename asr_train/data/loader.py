"""Batches of one rank, in the plan's order, built ahead by worker processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from asr_train.data.batch import Batch, BatchSettings, make_batch
from asr_train.data.corpus import CorpusSet
from asr_train.data.plan import Plan, Unit, unit_seed, units_of_rank
from asr_train.stop import SIGNALS


class Turn(NamedTuple):
    """One unit of work of one rank: unit `unit` of a step, or, when None, an idle turn that weighs nothing."""

    epoch: int
    step: int  # in the epoch
    unit: int | None
    is_last: bool  # of this rank's turns in this step; every rank has as many


@dataclass(frozen=True)
class RankTurns(Sampler[Turn]):
    """All turns of a rank from a position on, without end."""

    plan: Plan
    rank: int
    world_size: int
    epoch: int
    step: int

    def __iter__(self) -> Iterator[Turn]:
        epoch, step = self.epoch, self.step
        while True:
            units = units_of_rank(self.plan.num_units_in(epoch, step), self.rank, self.world_size)
            for place, unit in enumerate(units):
                yield Turn(epoch, step, unit, place == len(units) - 1)
            step += 1
            if step == self.plan.steps_per_epoch:
                epoch, step = epoch + 1, 0


@dataclass(frozen=True)
class TurnBatches(Dataset[tuple[Turn, Batch]]):
    """Turn -> its batch; what the loader's workers run."""

    plan: Plan
    corpus_set: CorpusSet
    settings: BatchSettings
    seed: int

    def __getitem__(self, turn: Turn) -> tuple[Turn, Batch]:
        if (
            turn.unit is None
        ):  # some work of the right kind, so that this rank joins every collective; it weighs nothing
            unit = self.plan.unit(turn.epoch, turn.step, 0)
            unit = Unit(ids=unit.ids[:1], padded_samples=unit.padded_samples)
        else:
            unit = self.plan.unit(turn.epoch, turn.step, turn.unit)
        seed = unit_seed(self.seed, turn.epoch, turn.step, turn.unit or 0)
        return turn, make_batch(self.corpus_set, unit, self.settings, seed)


@contextmanager
def open_loader(
    batches: TurnBatches, turns: RankTurns, *, num_workers: int, pin_memory: bool
) -> Iterator[Iterator[tuple[Turn, Batch]]]:
    """One rank's (turn, batch), in order, without end; 0 workers build batches in this process."""
    found = iter(
        DataLoader(
            batches,
            sampler=turns,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_start_worker,
        )
    )
    try:
        yield found
    finally:  # now, not at exit, where Python would send the workers a signal that they ignore, and wait for them
        if num_workers:
            cast(Any, found)._shutdown_workers()


def _start_worker(worker: int) -> None:
    """A stop is the loop's business: a worker ignores its signals, which launchers send to whole process groups.

    It ends with its parent: told by `open_loader`, or, when the parent was killed, within seconds by itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
