"""How evenly steps are shared by ranks, for any number of ranks: steps of a plan replayed, each unit at its cost."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asr_train.data.plan import Plan
from asr_train.geometry import FrameGeometry

Floats = npt.NDArray[np.float64]

NUM_REPLAYED = 64  # steps of the first epoch, evenly spread; the plan has put them into a random order


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What ranks do with their time while a step's units are computed: three shares that add up to one.

    Attributes:
        world_size: ranks.
        useful_share: computing on speech, of the time of all ranks; a step takes as long as its slowest rank.
        padding_share: computing on padding.
        waiting_share: waiting for the slowest rank, idle turns among it.
        step_cost: what the slowest rank computes in a step, mean over steps; in frames, see `Costs`.
    """

    world_size: int
    useful_share: float
    padding_share: float
    waiting_share: float
    step_cost: float


@dataclass(frozen=True, eq=False)
class Costs:
    """What replayed steps cost: for each step a cost of each of its units, [units], as padded, and of its speech alone.

    An utterance of F frames costs F + q * F**2, as in the plan.
    """

    padded: Sequence[Floats]
    useful: Sequence[Floats]

    @classmethod
    def of(cls, plan: Plan, num_samples: npt.NDArray[np.integer], geometry: FrameGeometry) -> "Costs":
        """Replay steps of the first epoch: all of them, or `NUM_REPLAYED`.

        Args:
            plan: of the training.
            num_samples: of every utterance, [num_utterances].
            geometry: how many frames samples are.
        """
        number = min(plan.steps_per_epoch, NUM_REPLAYED)
        steps = np.arange(number) * plan.steps_per_epoch // number
        padded, useful = [], []
        for step in steps:
            units = plan.step_units(0, int(step))
            counts = np.array([len(unit.ids) for unit in units])
            lengths = np.array([unit.padded_samples for unit in units])
            padded.append(counts * _cost(geometry.num_frames(lengths), plan.settings.quadratic))
            frames = geometry.num_frames(num_samples[np.concatenate([unit.ids for unit in units])])
            useful.append(np.add.reduceat(_cost(frames, plan.settings.quadratic), np.cumsum(counts) - counts))
        return cls(padded, useful)

    def balance(self, world_size: int) -> Balance:
        """Shares for so many ranks, of which rank r takes units r, r + W, ... of each step."""
        slowest = np.array([of_ranks(costs, world_size).max() for costs in self.padded])
        time = world_size * float(slowest.sum())
        padded, useful = (float(sum(costs.sum() for costs in steps)) for steps in (self.padded, self.useful))
        return Balance(
            world_size=world_size,
            useful_share=useful / time,
            padding_share=(padded - useful) / time,
            waiting_share=1 - padded / time,
            step_cost=float(slowest.mean()),
        )


def of_ranks(costs: Floats, world_size: int) -> Floats:
    """What each rank computes of one step, [world_size]."""
    turns = np.append(costs, np.zeros(-len(costs) % world_size))
    summed: Floats = turns.reshape(-1, world_size).sum(axis=0)
    return summed


def _cost(frames: npt.NDArray[np.int64], quadratic: float) -> Floats:
    return frames + quadratic * frames.astype(np.float64) ** 2
