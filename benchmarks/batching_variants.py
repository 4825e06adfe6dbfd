"""Ways to batch utterances, each as a stream of optimizer steps: the plan, and what people use in its place.

A step has units 0, 1, ..., G - 1, of which rank r of W takes r, r + W, ...; ranks meet when each has done its own.
Peers come from their own packages and are given what their documentation asks for; the one that is not installable
beside this torch, fairseq, is a rule written from its description.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asr_train.geometry import SAMPLE_RATE

Ints = npt.NDArray[np.int64]

STRIDE_SAMPLES = 320
_SEED = 0
_BUCKETS = 30


@dataclass(frozen=True)
class Task:
    """What is to be batched, and for how many ranks."""

    lengths: npt.NDArray[np.int32]  # samples of each utterance
    index: Path  # the same, as the plan's index
    unit_audio_s: float
    units_per_step: int
    world_size: int
    quadratic: float  # q: an utterance costs frames + q * frames**2

    @property
    def unit_utterances(self) -> int:
        """How many utterances of average length a unit has, for those who count them."""
        return max(1, round(self.unit_audio_s * SAMPLE_RATE / float(self.lengths.mean())))

    @property
    def turns(self) -> int:
        """Units that a rank takes a step: what others call gradient accumulation."""
        return self.units_per_step // self.world_size


@dataclass(frozen=True)
class Step:
    """The units of a step: utterances of all, one unit after the other, and what each unit is padded to."""

    ids: Ints  # [num_utterances]
    sizes: Ints  # [G], utterances of each unit
    padded_samples: Ints | None = None  # [G]; None: to the longest of the unit
    rank_s: float | None = None  # in which one rank finds its own units; None: as long as finding all of them


def _step(units: list[Any]) -> Step:
    sizes = np.array([len(unit) for unit in units])
    return Step(np.concatenate([np.asarray(unit, dtype=np.int64) for unit in units]), sizes)


def _steps(units: Iterator[Any], units_per_step: int) -> Iterator[Step]:
    """Whole steps only: a last one that is not full is left out."""
    step = []
    for unit in units:
        step.append(unit)
        if len(step) == units_per_step:
            yield _step(step)
            step = []


def plan_steps(task: Task) -> Iterator[Step]:
    """Ours: every step of an epoch, and how long one rank takes to find its own units of it, as its loader does."""
    from asr_train.data.plan import (  # noqa: PLC0415 - each variant imports its own
        LengthIndex,
        Plan,
        PlanSettings,
        units_of_rank,
    )

    settings = PlanSettings(
        unit_audio_s=task.unit_audio_s,
        unit_utterances=None,
        units_per_step=task.units_per_step,
        order="cost",
        quadratic=task.quadratic,
        stride_samples=STRIDE_SAMPLES,
    )
    clock = time.perf_counter()
    plan = Plan(LengthIndex.open(task.index), settings, seed=_SEED)
    for number in range(plan.steps_per_epoch):
        for turn in units_of_rank(plan.num_units_in(0, number), 0, task.world_size):
            if turn is not None:
                plan.unit(0, number, turn)
        rank_s = time.perf_counter() - clock
        units = plan.step_units(0, number)
        step = _step([unit.ids for unit in units])
        yield Step(step.ids, step.sizes, np.array([unit.padded_samples for unit in units]), rank_s)
        clock = time.perf_counter()


def hf_grouped_batches(task: Task) -> Any:
    """Batches of transformers' `group_by_length`, as Trainer makes it, before accelerate shards them by turns."""
    import torch  # noqa: PLC0415
    from torch.utils.data import BatchSampler  # noqa: PLC0415
    from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: PLC0415

    generator = torch.Generator().manual_seed(_SEED)
    in_order = LengthGroupedSampler(
        task.unit_utterances * task.turns, lengths=task.lengths.tolist(), generator=generator
    )
    return BatchSampler(in_order, task.unit_utterances, drop_last=False)


def hf_grouped_steps(task: Task) -> Iterator[Step]:
    """`LengthGroupedSampler`; batch b of a step goes to rank b % W, as `BatchSamplerShard` deals them."""
    return _steps(iter(hf_grouped_batches(task)), task.units_per_step)


def hf_rebalance_steps(task: Task) -> Iterator[Step]:
    """Trainer's `batch_rebalance`, lengths in frames as it expects them; all ranks' batches of its one sum."""
    from transformers.trainer_pt_utils import BatchRebalanceSampler  # noqa: PLC0415

    class OfAllRanks(BatchRebalanceSampler):
        def _yield_global_batch(self, batch_indices: Any) -> Iterator[Any]:
            of_ranks = self._assign(batch_indices, [self.lengths[i] for i in batch_indices])
            for turn in range(self.grad_accum):
                yield from (of_rank[turn] for of_rank in of_ranks)

    sampler = OfAllRanks(
        lengths=(task.lengths // STRIDE_SAMPLES).tolist(),
        effective_batch_size=task.unit_utterances * task.units_per_step,
        dp_size=task.world_size,
        grad_accum=task.turns,
    )
    return _steps(iter(sampler), task.units_per_step)


def max_tokens_steps(task: Task) -> Iterator[Step]:
    """The rule of fairseq's `max_tokens`, by its description.

    Utterances are sorted by length, longest first, equal ones at random; a batch takes the next ones as long as their
    number times the longest is within the limit; batches are shuffled and dealt to ranks by turns.
    """
    random = np.random.default_rng(_SEED)
    order = np.lexsort([random.permutation(len(task.lengths)), task.lengths])[::-1]
    descending = task.lengths[order].tolist()
    limit = int(task.unit_audio_s * SAMPLE_RATE)
    firsts = [0]
    while firsts[-1] < len(order):
        firsts.append(firsts[-1] + max(1, limit // descending[firsts[-1]]))
    batches = random.permutation(len(firsts) - 1)
    return _steps((order[firsts[b] : firsts[b + 1]] for b in batches.tolist()), task.units_per_step)


def lhotse_steps(task: Task) -> Iterator[Step]:
    """`DynamicBucketingSampler` of lhotse with ranks in step, its penalty for length set to the model's.

    Its buffer grows with W: a bucket has to hold a batch for every rank, or ranks are given other buckets. Cuts are
    made as they are asked for, so that reading a manifest is not in its time.
    """
    from lhotse import MonoCut  # noqa: PLC0415
    from lhotse.dataset import DynamicBucketingSampler  # noqa: PLC0415

    class Cuts:
        def __iter__(self) -> Iterator[Any]:
            for number, seconds in enumerate((task.lengths / SAMPLE_RATE).tolist()):
                yield MonoCut(id=str(number), start=0, duration=seconds, channel=0)

    seconds = task.lengths.astype(np.float64) / SAMPLE_RATE
    quadratic_duration = STRIDE_SAMPLES / SAMPLE_RATE / task.quadratic
    costs = seconds + seconds**2 / quadratic_duration
    sampler = DynamicBucketingSampler(
        Cuts(),
        max_duration=task.unit_audio_s * float(costs.sum() / seconds.sum()),
        quadratic_duration=quadratic_duration,
        num_buckets=_BUCKETS,
        buffer_size=max(20_000, 2 * _BUCKETS * task.world_size * task.unit_utterances),
        shuffle=True,
        world_size=task.world_size,
        rank=0,
        seed=_SEED,
    )
    iter(sampler)  # its `cuts_iter` is then the batches of all ranks, of which its own iterator would keep one rank's
    batches = ([int(cut.id) for cut in batch] for batch in sampler.cuts_iter)
    return _steps(batches, task.units_per_step)


@dataclass(frozen=True)
class Variant:
    """A way to batch: its name in the tables, the package it needs, its steps."""

    name: str
    package: str | None
    steps: Callable[[Task], Iterator[Step]]
    takes_long: bool = False  # at many ranks: as many steps as come within a limit

    @property
    def is_here(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or find_spec(self.package) is not None


VARIANTS = {
    "plan": Variant("the plan", None, plan_steps),
    "hf_grouped": Variant("transformers, group_by_length", "transformers", hf_grouped_steps),
    "hf_rebalance": Variant("transformers, batch_rebalance", "transformers", hf_rebalance_steps, takes_long=True),
    "max_tokens": Variant("max-tokens, fairseq's rule as described", None, max_tokens_steps),
    "lhotse": Variant("lhotse, buckets in step", "lhotse", lhotse_steps, takes_long=True),
}
