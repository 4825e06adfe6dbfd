"""The plan: which utterances make which unit of which step, the same on every rank and for every world size.

A pure function of (length index, settings, seed, epoch, step, k). Utterances stand in a line by length, which is cut
into units of fixed shapes (`shapes`); keyed permutations (`permute`) move utterances within their length, units
within their target cost, and steps. So any unit is arithmetic: no table an epoch, no cost in the position.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from math import prod
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from asr_train.config import Recipe
from asr_train.data.lengths import LengthIndex
from asr_train.data.permute import make_key, make_keys, permute
from asr_train.data.shapes import Shapes, equal_cost_shapes, fixed_count_shapes
from asr_train.errors import RecipeError
from asr_train.estimate import quadratic_share
from asr_train.files import hash_json
from asr_train.geometry import SAMPLE_RATE

__all__ = ["LengthIndex", "Plan", "PlanSettings", "PlanStatistics", "Unit", "unit_seed", "units_of_rank"]

Ints = npt.NDArray[np.int64]

_FORMAT = 1  # a change of the plan's arithmetic changes it, and with it every plan's hash


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How utterances are batched; see the recipe's fields of the same names."""

    unit_audio_s: float  # seconds of padded audio a unit, on average over the corpus; order `cost`
    unit_utterances: int | None  # utterances a unit; orders `grouped` and `random`
    units_per_step: int
    order: Literal["cost", "grouped", "random"]
    quadratic: float  # q: an utterance costs frames + q * frames**2
    stride_samples: int = 320  # samples a frame

    @classmethod
    def of(cls, recipe: Recipe, config: Mapping[str, Any]) -> Self:
        """What a recipe says, for a model; where the size of units is still to be found, in units of a second.

        Args:
            recipe: what is trained.
            config: the model's transformers config, as `to_dict()` gives it.
        """
        return cls(
            unit_audio_s=1.0 if recipe.unit_audio_s == "auto" else recipe.unit_audio_s,
            unit_utterances=recipe.unit_utterances,
            units_per_step=recipe.units_per_step,
            order=recipe.order,
            quadratic=quadratic_share(config, feature_encoder_frozen=recipe.model.freeze_feature_encoder),
            stride_samples=prod(config["conv_stride"]),
        )


@dataclass(frozen=True)
class Unit:
    """A micro-batch: which utterances, [B], and the samples that each of them is padded to."""

    ids: Ints
    padded_samples: int


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """What an epoch consists of; for order `random`, whose shapes change with the epoch, what is to be expected."""

    num_utterances: int
    num_units: int
    num_steps: int
    audio_s: float
    padded_audio_s: float
    padded_share: float  # of the padded audio
    num_shapes: int  # distinct (utterances, padded samples); for `random` as many as can occur
    max_unit_audio_s: float  # padded audio of the largest unit


class _Places(NamedTuple):
    """Units of a step before their utterances are looked up: row of the shape table, first place in the line."""

    row: Ints
    first: Ints


class Plan:
    """Units and steps of every epoch of one corpus.

    Args:
        index: the corpus's utterances by length.
        settings: how they are batched.
        seed: the recipe's; another seed gives another order of utterances, units and steps, of the same shapes.
    """

    def __init__(self, index: LengthIndex, settings: PlanSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self._index = index
        self._shapes = _make_shapes(index, settings)
        shapes = self._shapes
        self._row_ends: Ints = np.cumsum(shapes.num_units)
        self._row_starts: Ints = self._row_ends - shapes.num_units
        self._target_starts = self._row_starts[np.unique(shapes.target, return_index=True)[1]]
        self._target_sizes = np.diff(self._target_starts, append=self._row_ends[-1])
        ends = shapes.length_ends if settings.order != "random" else shapes.length_ends[-1:]
        self._pool_ends = ends  # where the utterances end that are permuted among each other
        self._pool_starts = ends - np.diff(ends, prepend=0)
        self._num_units = int(self._row_ends[-1])
        self.num_utterances = index.num_utterances
        self.steps_per_epoch = -(-self._num_units // settings.units_per_step)

    @cached_property
    def hash(self) -> str:
        """Hash, in hex, of all that the plan is made from and of its shapes: equal plans have equal hashes."""
        digest = blake2b(digest_size=16)
        digest.update(hash_json([_FORMAT, asdict(self.settings), self.seed, self._index.hash]).encode())
        for name in ("target", "padded_samples", "num_utterances", "num_units", "first", "length_ends", "lengths"):
            digest.update(np.ascontiguousarray(getattr(self._shapes, name)).data)
        return digest.hexdigest()

    @property
    def unit_shapes(self) -> list[tuple[int, int]]:
        """(utterances, padded samples) of units, each once; with order `random` all count as padded to the longest."""
        shapes = self._shapes
        longest = shapes.padded_samples if self.settings.order != "random" else shapes.lengths[-1:]
        pairs = np.stack(np.broadcast_arrays(shapes.num_utterances, longest), axis=1)
        return [(int(count), int(samples)) for count, samples in np.unique(pairs, axis=0)]

    def num_units_in(self, epoch: int, step_in_epoch: int) -> int:
        """Number of units of a step: `units_per_step` or, spread over all steps, less; they differ by at most one."""
        start, end = self._units_range(epoch, step_in_epoch)
        return end - start

    def num_utterances_in(self, epoch: int, step_in_epoch: int) -> int:
        """Number of utterances of a step, over all its units."""
        start, end = self._units_range(epoch, step_in_epoch)
        return int(self._shapes.num_utterances[self._places(epoch, np.arange(start, end)).row].sum())

    def step_units(self, epoch: int, step_in_epoch: int) -> tuple[Unit, ...]:
        """All units of a step."""
        start, end = self._units_range(epoch, step_in_epoch)
        return self._units(epoch, np.arange(start, end))

    def unit(self, epoch: int, step_in_epoch: int, k: int) -> Unit:
        """Unit `k` of a step."""
        start, end = self._units_range(epoch, step_in_epoch)
        if not 0 <= k < end - start:
            raise IndexError(f"unit {k} of a step of {end - start} units")
        return self._units(epoch, np.array([start + k]))[0]

    def statistics(self) -> PlanStatistics:
        """Padding, shapes and sizes of an epoch."""
        shapes = self._shapes
        padded = int((shapes.num_units * shapes.num_utterances * self._expected_lengths()).sum())
        longest = shapes.padded_samples if self.settings.order != "random" else shapes.lengths[-1:]
        pairs = np.stack(np.broadcast_arrays(shapes.num_utterances, shapes.padded_samples))
        num_shapes = np.unique(pairs, axis=1).shape[1]
        samples = int(self._index.samples.sum())
        return PlanStatistics(
            num_utterances=self.num_utterances,
            num_units=self._num_units,
            num_steps=self.steps_per_epoch,
            audio_s=samples / SAMPLE_RATE,
            padded_audio_s=padded / SAMPLE_RATE,
            padded_share=1 - samples / padded,
            num_shapes=num_shapes if self.settings.order != "random" else num_shapes * len(shapes.lengths),
            max_unit_audio_s=int((shapes.num_utterances * longest).max()) / SAMPLE_RATE,
        )

    def _expected_lengths(self) -> npt.NDArray[np.floating] | Ints:
        """Samples that the units of each shape row are padded to, on average, [num_rows]."""
        shapes = self._shapes
        if self.settings.order != "random":
            return shapes.padded_samples
        reached = (shapes.length_ends / self.num_utterances)[:, None] ** shapes.num_utterances  # P(longest <= length)
        return shapes.lengths @ np.diff(reached, axis=0, prepend=0.0)

    def _units_range(self, epoch: int, step_in_epoch: int) -> tuple[int, int]:
        """First and one past the last unit of a step, in the epoch's order of units."""
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise IndexError(f"step {step_in_epoch} of an epoch of {self.steps_per_epoch} steps")
        key = make_key(self.seed, epoch, "steps")
        step = int(permute(np.array([step_in_epoch]), self.steps_per_epoch, key)[0])
        return step * self._num_units // self.steps_per_epoch, (step + 1) * self._num_units // self.steps_per_epoch

    def _places(self, epoch: int, units: Ints) -> _Places:
        """Where units stand, given their numbers in the epoch's order, [n]: targets ascending, within one permuted."""
        target = np.searchsorted(self._target_starts, units, side="right") - 1
        start = self._target_starts[target]
        keys = make_keys(make_key(self.seed, epoch, "units"), len(self._target_starts))
        unit = start + permute(units - start, self._target_sizes[target], keys[target])
        row = np.searchsorted(self._row_ends, unit, side="right")
        return _Places(row, self._shapes.first[row] + (unit - self._row_starts[row]) * self._shapes.num_utterances[row])

    def _units(self, epoch: int, units: Ints) -> tuple[Unit, ...]:
        """The units of these numbers in the epoch's order."""
        row, first = self._places(epoch, units)
        sizes = self._shapes.num_utterances[row]
        ends = np.cumsum(sizes)
        line = np.arange(ends[-1]) + np.repeat(first - (ends - sizes), sizes)
        pool = np.searchsorted(self._pool_ends, line, side="right")
        start = self._pool_starts[pool]
        keys = make_keys(make_key(self.seed, epoch, "utterances"), len(self._pool_ends))
        place = start + permute(line - start, self._pool_ends[pool] - start, keys[pool])
        padded = self._shapes.padded_samples[row]
        if self.settings.order == "random":
            longest = np.maximum.reduceat(place, ends - sizes)  # places are in order of length
            padded = self._shapes.lengths[np.searchsorted(self._shapes.length_ends, longest, side="right")]
        ids = np.split(self._index.order[place].astype(np.int64), ends[:-1])
        return tuple(Unit(part, int(samples)) for part, samples in zip(ids, padded, strict=True))


def units_of_rank(num_units: int, rank: int, world_size: int) -> list[int | None]:
    """Which units of a step a rank takes: rank, rank + world_size, ...; None is an idle turn.

    All ranks get as many turns, so that they take part in the same collectives.
    """
    turns = range(rank, -(-num_units // world_size) * world_size, world_size)
    return [unit if unit < num_units else None for unit in turns]


def unit_seed(seed: int, epoch: int, step_in_epoch: int, k: int) -> int:
    """Seed of a unit's dropout and masks, in [0, 2**63): it belongs to the unit, not to the rank that runs it."""
    return make_key(seed, epoch, step_in_epoch, k, "unit") >> 1


def _make_shapes(index: LengthIndex, settings: PlanSettings) -> Shapes:
    if settings.order == "cost":
        return equal_cost_shapes(
            index,
            unit_samples=settings.unit_audio_s * SAMPLE_RATE,
            units_per_step=settings.units_per_step,
            quadratic=settings.quadratic,
            stride_samples=settings.stride_samples,
        )
    if settings.unit_utterances is None:
        raise RecipeError(f"order {settings.order!r} takes a fixed count of utterances a unit; set unit_utterances")
    in_order = settings.order == "grouped"
    return fixed_count_shapes(index, unit_utterances=settings.unit_utterances, in_order=in_order)
