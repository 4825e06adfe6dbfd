"""What a training will be, before it is started: steps, padding, balance, memory, time, checkpoints; a pure function.

`wavefleet plan` says it. Steps, padding and shapes are exact, for the plan is arithmetic; memory is that of
`memory_estimate`; time is the FLOPs of the slowest rank at a pace (`pace`), which is measured or assumed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from asr_train.auto_unit import worst_shapes
from asr_train.balance import Balance, Costs
from asr_train.config import Recipe
from asr_train.data.lengths import LengthBin, LengthIndex, histogram
from asr_train.data.plan import Plan, PlanSettings, PlanStatistics
from asr_train.estimate import frame_flops
from asr_train.geometry import SAMPLE_RATE, FrameGeometry
from asr_train.gpus import Gpu
from asr_train.memory_estimate import Memory, MemorySettings, UnitShape, memory
from asr_train.pace import Pace
from asr_train.recipe import parse_cadence

WORLD_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A number of ranks, how evenly they share the work, and what they take for all of it.

    Attributes:
        balance: None where there are more ranks than units in a step.
        step_s: seconds a step; None without a pace. So is the next.
        total_s: seconds of all steps.
    """

    world_size: int
    balance: Balance | None
    step_s: float | None
    total_s: float | None


@dataclass(frozen=True, kw_only=True)
class UnitMemory:
    """Peak memory of one rank, and the unit that takes it, with gradient checkpointing or without."""

    gradient_checkpointing: bool
    num_utterances: int
    padded_s: float
    parts: Memory
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointForecast:
    """Checkpoints on disk.

    Attributes:
        each_bytes: of one; None where the model is not known.
        num_saves: that the recipe's cadence makes.
        num_best: further ones that good evaluations may make.
        most_kept: that the retention rule leaves at once, at most.
        most_bytes: of those, and of one that is being written.
    """

    each_bytes: int | None
    num_saves: int
    num_best: int
    most_kept: int
    most_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a training would run on.

    Attributes:
        world_size: ranks.
        memory: how a unit is trained, as far as memory is concerned.
        gpu: where it is known.
        pace: how fast a rank computes, where that is known.
    """

    world_size: int
    memory: MemorySettings
    gpu: Gpu | None = None
    pace: Pace | None = None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a training will be.

    Attributes:
        unit_audio_s: the recipe's, or what stands for `auto`; None where units hold a fixed count of utterances.
        epoch: utterances, units, steps, padding and shapes of an epoch.
        ranks: those of `WORLD_SIZES`, and the chosen number.
        chosen: the entry of `ranks` that was asked for.
        num_replayed: steps that balance and time were counted on.
        memory: with gradient checkpointing as the recipe has it, then the other way; empty where nothing is known.
        num_evaluations: of all sets.
    """

    utterance_s: tuple[float, float, float]  # shortest, mean, longest
    lengths: tuple[LengthBin, ...]
    unit_audio_s: float | None
    units_per_step: int
    epoch: PlanStatistics
    max_steps: int
    num_epochs: float
    step_audio_s: float  # padded, mean
    world_size: int
    strategy: str
    precision: str
    gpu: str | None
    gpu_bytes: float | None
    ranks: tuple[Ranks, ...]
    num_replayed: int
    memory: tuple[UnitMemory, ...]
    pace: Pace | None
    checkpoints: CheckpointForecast
    num_evaluations: int

    @property
    def chosen(self) -> Ranks:
        """The number of ranks that was asked for."""
        return next(each for each in self.ranks if each.world_size == self.world_size)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "chosen": asdict(self.chosen)}


def forecast(
    index: LengthIndex,
    num_samples: npt.NDArray[np.integer],
    recipe: Recipe,
    config: Mapping[str, Any],
    setup: Setup,
    *,
    is_model_known: bool = True,
) -> Forecast:
    """What a training will be.

    Args:
        index: the corpus's utterances by length.
        num_samples: of each utterance, [num_utterances].
        recipe: with a number for `unit_audio_s`.
        config: the model's transformers config, as `to_dict()` gives it.
        setup: what it runs on.
        is_model_known: whether that config is this model's; where it stands for another, memory and time are left out.
    """
    plan = Plan(index, PlanSettings.of(recipe, config), recipe.seed)
    epoch = plan.statistics()
    max_steps = recipe.max_steps or (recipe.max_epochs or 0) * plan.steps_per_epoch
    geometry = FrameGeometry(kernels=tuple(config["conv_kernel"]), strides=tuple(config["conv_stride"]))
    costs = Costs.of(plan, num_samples, geometry)
    flops = frame_flops(config, feature_encoder_frozen=recipe.model.freeze_feature_encoder)
    pace = setup.pace if is_model_known else None

    def ranks(world_size: int) -> Ranks:
        if world_size > recipe.units_per_step:
            return Ranks(world_size=world_size, balance=None, step_s=None, total_s=None)
        balance = costs.balance(world_size)
        step_s = None if pace is None else balance.step_cost * flops / pace.flops_per_s + pace.step_s
        total_s = None if step_s is None else step_s * max_steps
        return Ranks(world_size=world_size, balance=balance, step_s=step_s, total_s=total_s)

    found = memory_of_units(index, recipe, config, setup.memory) if is_model_known else ()
    return Forecast(
        utterance_s=_lengths_s(num_samples),
        lengths=histogram(num_samples),
        unit_audio_s=float(recipe.unit_audio_s) if recipe.order == "cost" else None,
        units_per_step=recipe.units_per_step,
        epoch=epoch,
        max_steps=max_steps,
        num_epochs=max_steps / plan.steps_per_epoch,
        step_audio_s=epoch.padded_audio_s / epoch.num_steps,
        world_size=setup.world_size,
        strategy=setup.memory.strategy,
        precision=recipe.precision,
        gpu=None if setup.gpu is None else setup.gpu.name,
        gpu_bytes=None if setup.gpu is None else setup.gpu.memory_bytes,
        ranks=tuple(ranks(size) for size in sorted({*WORLD_SIZES, setup.world_size})),
        num_replayed=len(costs.padded),
        memory=found,
        pace=pace,
        checkpoints=checkpoints_of(
            recipe, max_steps, plan.steps_per_epoch, each_bytes=found[0].parts.checkpoint if found else None
        ),
        num_evaluations=len(_evaluated(recipe, max_steps, plan.steps_per_epoch)),
    )


def memory_of_units(
    index: LengthIndex, recipe: Recipe, config: Mapping[str, Any], settings: MemorySettings
) -> tuple[UnitMemory, ...]:
    """The unit that takes most memory, as the recipe has gradient checkpointing, and the other way."""

    def largest(settings: MemorySettings) -> UnitMemory:
        def bytes_of(shape: UnitShape) -> int:
            return memory(config, shape, settings).total

        shapes = worst_shapes(index, PlanSettings.of(recipe, config), recipe.seed, bytes_of)
        shape = max(shapes, key=bytes_of)
        parts = memory(config, shape, settings)
        return UnitMemory(
            gradient_checkpointing=settings.gradient_checkpointing,
            num_utterances=shape.num_utterances,
            padded_s=shape.padded_samples / SAMPLE_RATE,
            parts=parts,
            total_bytes=parts.total,
        )

    other = replace(settings, gradient_checkpointing=not settings.gradient_checkpointing)
    return largest(settings), largest(other)


def checkpoints_of(
    recipe: Recipe, max_steps: int, steps_per_epoch: int, each_bytes: int | None = None
) -> CheckpointForecast:
    """How many checkpoints there will be, and how many at once; see `checkpoints.kept` for the rule.

    At most: as if every evaluation were the best so far, and the best ones were old when the newest is written.
    """
    settings = recipe.checkpoint
    due = {*_due(settings.every, max_steps, steps_per_epoch), max_steps}
    scored = set(_evaluated(recipe, max_steps, steps_per_epoch))
    by_best = scored - due if settings.save_best else set()
    steps = sorted(due | by_best)
    most, for_good, num_scored = 0, 0, 0
    for number in range(len(steps)):
        newest = steps[max(0, number + 1 - settings.keep_last) : number + 1]
        left = steps[number - settings.keep_last] if number >= settings.keep_last else None
        if left is not None:  # it is among the newest no more
            is_for_good = settings.keep_every is not None and left % settings.keep_every == 0
            for_good += is_for_good
            num_scored += left in scored and not is_for_good
        most = max(most, len(newest) + for_good + min(settings.keep_best, num_scored))
    return CheckpointForecast(
        each_bytes=each_bytes,
        num_saves=len(due),
        num_best=len(by_best),
        most_kept=most,
        most_bytes=None if each_bytes is None else each_bytes * (most + 1),
    )


def num_slices(total_s: float, *, limit_s: float, signal_lead_s: float, start_s: float) -> int | None:
    """Jobs of a time limit that a training takes one after the other; None where a job has no time to train.

    Args:
        total_s: of all steps.
        limit_s: of a job.
        signal_lead_s: how long before it the job is warned, saves and stops.
        start_s: what each job takes before its first step.
    """
    usable_s = limit_s - signal_lead_s - start_s
    return None if usable_s <= 0 else max(1, ceil(total_s / usable_s))


def _lengths_s(num_samples: npt.NDArray[np.integer]) -> tuple[float, float, float]:
    shortest, mean, longest = (float(value) / SAMPLE_RATE for value in (
        num_samples.min(), num_samples.mean(), num_samples.max()
    ))  # fmt: skip
    return shortest, mean, longest


def _due(cadence: str | None, max_steps: int, steps_per_epoch: int) -> range:
    """Steps after which something is due."""
    number, unit = parse_cadence(cadence) or (max_steps + 1, "steps")
    every = number * (steps_per_epoch if unit == "epochs" else 1)
    return range(every, max_steps + 1, every)


def _evaluated(recipe: Recipe, max_steps: int, steps_per_epoch: int) -> list[int]:
    """Steps after which the sets are evaluated."""
    if not recipe.eval.sets:
        return []
    return sorted({*_due(recipe.eval.every, max_steps, steps_per_epoch), max_steps})
