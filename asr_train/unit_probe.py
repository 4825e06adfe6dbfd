"""`unit_audio_s: auto`, on the ranks and devices that are going to train: tried on a GPU, else estimated.

Before the first step of a run, whole steps on noise are made in units of the worst shapes that a size would give,
optimizer included; they change neither weights nor anything else of the run. Where ranks work together within a
forward pass (FSDP2, ZeRO), a rank that ran out of memory would leave the others waiting, so there it is estimated.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist

from asr_train.auto_unit import (
    CPU_HEADROOM,
    CPU_MOST_S,
    candidates,
    estimated_unit_audio_s,
    largest,
    recall,
    remember,
    worst_shapes,
)
from asr_train.config import Recipe
from asr_train.data.batch import input_values, make_batch
from asr_train.data.lengths import LengthIndex
from asr_train.data.plan import PlanSettings, Unit
from asr_train.errors import RecipeError
from asr_train.files import hash_json
from asr_train.loss import ctc_losses
from asr_train.memory_error import is_out_of_memory
from asr_train.memory_estimate import MemorySettings, UnitShape, memory
from asr_train.strategy import Parallel

_PROBE_HEADROOM = 0.1  # fragments, other shapes' kernels, NCCL's buffers
_FORMAT = 1  # a change of what is tried makes remembered sizes worthless
_NOT_OF_MODEL = ("_name_or_path", "transformers_version", "architectures")  # of a config


@dataclass(frozen=True)
class Found:
    """What `auto` came to, the same on all ranks."""

    unit_audio_s: float
    how: Literal["tried", "remembered", "estimated"]
    device: str


def find_unit_audio_s(recipe: Recipe, parallel: Parallel, index: LengthIndex, plan: PlanSettings) -> Found:
    """The largest unit size that fits on every rank; called by all of them, before anything of the run is restored.

    Args:
        recipe: of the run.
        parallel: model and optimizer, wrapped, the optimizer's state made and zero.
        index: the training set's utterances by length.
        plan: how they are batched; its own `unit_audio_s` does not matter.

    Raises:
        RecipeError: not even the smallest unit fits.
    """
    config: dict[str, Any] = parallel.module.hf.config.to_dict()
    settings = MemorySettings.of(
        recipe,
        device="cuda" if parallel.device.type == "cuda" else "cpu",
        strategy=parallel.name,  # type: ignore[arg-type]
        world_size=parallel.world_size,
    )
    device = torch.cuda.get_device_name(parallel.device) if settings.device == "cuda" else "cpu"
    is_tried = settings.device == "cuda" and parallel.name in ("single", "ddp")
    guess = _estimated(parallel, config, index, plan, settings)
    if not is_tried:
        return _agreed(parallel, guess, "estimated", device)
    key = _key(config, settings, index, plan, parallel)
    remembered = _least(parallel, recall(key))
    if remembered:
        return Found(remembered, "remembered", device)
    budget = _free_bytes(parallel) * (1 - _PROBE_HEADROOM)

    def fits(unit_audio_s: float) -> bool:
        shapes = worst_shapes(
            index, replace(plan, unit_audio_s=unit_audio_s), 0, lambda shape: memory(config, shape, settings).total
        )
        return all(_survives(parallel, shape, budget) for shape in shapes)

    found = _agreed(parallel, largest(candidates(index, plan.units_per_step), fits, guess), "tried", device)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        remember(key, found.unit_audio_s, {"device": device, "strategy": parallel.name, **asdict(settings)})
    return found


def survives(step: Callable[[], None]) -> bool:
    """Whether a step can be made without running out of memory."""
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def make_step(parallel: Parallel, shape: UnitShape) -> None:
    """One step of one unit of noise on this rank alone; weights and optimizer are as before when it is done.

    Its gradients are set to zero before the update, and the learning rate is zero: an update of AdamW that keeps every
    bit, but takes the memory of a real one. Nothing is drawn from generators that the run uses later without seeding.
    """
    module, optimizer = parallel.module, parallel.optimizer
    unit = Unit(ids=np.arange(shape.num_utterances), padded_samples=shape.padded_samples)
    noise = _Noise(shape.padded_samples, module.geometry.num_frames(shape.padded_samples))
    batch = make_batch(noise, unit, module.batch_settings, seed=1).to(parallel.device)
    module.train()
    with parallel.unit(is_last=False):  # DDP adds nothing up: ranks may fail one by one
        with parallel.accelerator.autocast():
            logits = parallel.model(
                input_values(batch),
                batch.num_samples,
                time_mask=batch.time_mask,
                feature_mask=batch.feature_mask,
                keep_layers=batch.keep_layers,
            )
        losses, _ = ctc_losses(logits, batch.num_frames, batch.labels, batch.num_labels, 0)
        parallel.backward(losses.sum())
    del logits, losses
    groups = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    try:
        optimizer.step()
    finally:
        for group, (lr, weight_decay) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"], group["weight_decay"] = lr, weight_decay
        for state in optimizer.state.values():
            state["step"].zero_()


class _Noise:
    """Utterances of one length, and as much text as anybody says in it."""

    def __init__(self, num_samples: int, num_frames: int) -> None:
        self._wave = np.random.default_rng(0).integers(-3000, 3000, num_samples).astype(np.int16)
        self._labels = np.ones(max(1, num_frames // 4), dtype=np.int32)
        self._labels[::2] = 2

    def waveform(self, i: int) -> npt.NDArray[np.int16]:
        return self._wave

    def labels(self, i: int) -> npt.NDArray[np.int32]:
        return self._labels


def _survives(parallel: Parallel, shape: UnitShape, budget_bytes: float) -> bool:
    """Whether a unit of this shape fits beside what the device holds already, with room to spare."""
    torch.cuda.reset_peak_memory_stats(parallel.device)
    try:
        done = survives(lambda: make_step(parallel, shape))
        return done and torch.cuda.max_memory_allocated(parallel.device) <= budget_bytes
    finally:
        parallel.stepper.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def _free_bytes(parallel: Parallel) -> float:
    """Memory that this rank may have in all, what it holds already included."""
    if parallel.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(parallel.device)
        return float(free + torch.cuda.memory_reserved(parallel.device))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return float(psutil.virtual_memory().available) / ranks_here


def _estimated(
    parallel: Parallel, config: dict[str, Any], index: LengthIndex, plan: PlanSettings, settings: MemorySettings
) -> float | None:
    limit_bytes = _free_bytes(parallel)
    if settings.device == "cuda":
        return estimated_unit_audio_s(config, index, plan, settings, limit_bytes=limit_bytes)
    return estimated_unit_audio_s(
        config, index, plan, settings, limit_bytes=limit_bytes, headroom=CPU_HEADROOM, most_s=CPU_MOST_S
    )


def _agreed(parallel: Parallel, unit_audio_s: float | None, how: Literal["tried", "estimated"], device: str) -> Found:
    least = _least(parallel, unit_audio_s)
    if not least:
        raise RecipeError(
            "unit_audio_s: 'auto': not even the smallest units fit into memory; set model.gradient_checkpointing, "
            "precision: bf16, a lower data.max_duration_s, or the config fsdp2"
        )
    return Found(least, how, device)


def _least(parallel: Parallel, value: float | None) -> float:
    """The smallest of all ranks' values; 0 where a rank has none."""
    found = torch.tensor([value or 0.0], dtype=torch.float64, device=parallel.device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found)


def _key(
    config: dict[str, Any], settings: MemorySettings, index: LengthIndex, plan: PlanSettings, parallel: Parallel
) -> str:
    """What a size that was found holds for: model, how it is trained, on what, and the lengths of the utterances."""
    model = {name: value for name, value in config.items() if name not in _NOT_OF_MODEL}
    properties = torch.cuda.get_device_properties(parallel.device)
    device = [properties.name, properties.total_memory, torch.__version__, torch.version.cuda]
    batching = {**asdict(plan), "unit_audio_s": None}
    return str(hash_json([_FORMAT, model, asdict(settings), device, index.hash, batching]))
