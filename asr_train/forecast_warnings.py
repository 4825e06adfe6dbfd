"""What is wrong, or wasteful, with a training that a forecast was made of, each with what to change."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from asr_train.auto_unit import ESTIMATE_HEADROOM, estimated_unit_audio_s
from asr_train.config import Recipe
from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import PlanSettings
from asr_train.data.world_size import check_world_size
from asr_train.errors import RecipeError
from asr_train.forecast import Forecast, Setup, memory_of_units

LEAST_UNIT_S: Final = 55.0
"""Padded audio of a unit under which a large GPU waits for launches of kernels, wav2vec2 base; docs/performance.md."""


@dataclass(frozen=True)
class ForecastWarning:
    """Something to know before a training starts."""

    kind: str
    text: str


def warnings_of(
    found: Forecast, recipe: Recipe, config: Mapping[str, Any], index: LengthIndex, setup: Setup
) -> Iterator[ForecastWarning]:
    """What speaks against this training.

    Args:
        found: the forecast.
        recipe: of the training.
        config: of its model.
        index: the corpus's utterances by length.
        setup: what it would run on.
    """
    yield from _of_ranks(found, recipe)
    yield from _of_memory(found, recipe, config, index, setup)
    unit_s = found.epoch.padded_audio_s / found.epoch.num_units
    if setup.memory.device == "cuda" and unit_s < LEAST_UNIT_S:
        yield ForecastWarning(
            "small_units",
            f"units hold {unit_s:.3g} s of audio; with less than 55 to 110 s a large GPU waits for its next kernel. "
            "Where memory allows, take a larger unit_audio_s and as much fewer units_per_step",
        )
    if recipe.order == "random" and config.get("feat_extract_norm", "layer") == "group":
        yield ForecastWarning(
            "padding_sensitive",
            "a model with group norm gives other outputs when it is padded: training refuses it with order: random; "
            "take order: cost or grouped",
        )
    if found.max_steps < found.epoch.num_steps:
        yield ForecastWarning(
            "part_of_an_epoch",
            f"max_steps={found.max_steps} trains on a part of the corpus: an epoch has {found.epoch.num_steps:,} steps",
        )


def refused_warning(refused: Mapping[str, int], num_utterances: int, recipe: Recipe, listed: str) -> ForecastWarning:
    """Training rows that `prepare` refused, by reason.

    Args:
        refused: reason -> rows.
        num_utterances: rows that were kept.
        recipe: its limits are named.
        listed: file that names every row.
    """
    limits = {
        "too long": f"data.max_duration_s={recipe.data.max_duration_s:g}",
        "too short": f"data.min_duration_s={recipe.data.min_duration_s:g}",
    }
    reasons = ", ".join(
        f"{count:,} {reason}{f' ({limits[reason]})' if reason in limits else ''}" for reason, count in refused.items()
    )
    total = sum(refused.values())
    return ForecastWarning(
        "refused", f"{total:,} of {num_utterances + total:,} training rows were refused: {reasons}; see {listed}"
    )


def _of_ranks(found: Forecast, recipe: Recipe) -> Iterator[ForecastWarning]:
    world_size, units = found.world_size, recipe.units_per_step
    if world_size > units:
        try:
            check_world_size(units, world_size, allow_idle_ranks=False)
        except RecipeError as error:
            refused = "" if recipe.allow_idle_ranks else "training refuses this: "
            yield ForecastWarning("more_ranks_than_units", f"{refused}{error}")
    elif units % world_size:
        turns = -(-units // world_size)
        divisors = [size for size in range(1, units + 1) if units % size == 0]
        fewer = max(size for size in divisors if size < world_size)
        more = min(size for size in divisors if size > world_size)
        yield ForecastWarning(
            "uneven_units",
            f"{world_size} processes do not divide units_per_step={units}: {1 - units / (turns * world_size):.0%} of "
            f"their turns are idle; use {fewer} or {more} processes, or units_per_step={turns * world_size}",
        )


def _of_memory(
    found: Forecast, recipe: Recipe, config: Mapping[str, Any], index: LengthIndex, setup: Setup
) -> Iterator[ForecastWarning]:
    if not found.memory or setup.gpu is None:
        return
    gpu, unit = setup.gpu, found.memory[0]
    limit_bytes = gpu.memory_bytes * (1 - ESTIMATE_HEADROOM)
    if unit.total_bytes <= limit_bytes:
        return
    is_over = unit.total_bytes > gpu.memory_bytes
    yield ForecastWarning(
        "does_not_fit" if is_over else "may_not_fit",
        f"{unit.num_utterances} utterances of {unit.padded_s:.2f} s are predicted to take {unit.total_bytes / 1e9:.1f} "
        f"GB; {gpu.name} has {gpu.memory_gb:g} GB, of which the estimate wants {ESTIMATE_HEADROOM:.0%} free. "
        f"What fits: {'; '.join(_what_fits(found, recipe, config, index, setup, limit_bytes)) or 'nothing here'}",
    )


def _what_fits(
    found: Forecast, recipe: Recipe, config: Mapping[str, Any], index: LengthIndex, setup: Setup, limit_bytes: float
) -> Iterator[str]:
    """Changes that would each be enough, those first that leave the plan of the data as it is."""
    settings = setup.memory

    def fits(**change: Any) -> bool:
        return memory_of_units(index, recipe, config, replace(settings, **change))[0].total_bytes <= limit_bytes

    both = {"precision": "bf16", "gradient_checkpointing": True}
    if not settings.gradient_checkpointing and found.memory[1].total_bytes <= limit_bytes:
        yield "model.gradient_checkpointing=true"
    elif settings.precision == "fp32" and fits(precision="bf16"):
        yield "precision=bf16"
    elif settings.precision == "fp32" and fits(**both):
        yield "precision=bf16 with model.gradient_checkpointing=true"
    if settings.strategy in ("single", "ddp") and setup.world_size > 1 and fits(strategy="fsdp2"):
        yield "--accelerate fsdp2"
    if recipe.order == "cost":
        smaller = estimated_unit_audio_s(
            config, index, PlanSettings.of(recipe, config), settings,
            limit_bytes=setup.gpu.memory_bytes if setup.gpu else 0,
        )  # fmt: skip
        if smaller is not None and smaller < float(recipe.unit_audio_s):
            yield f"unit_audio_s={smaller:g}, with more units_per_step for as much audio an update"
