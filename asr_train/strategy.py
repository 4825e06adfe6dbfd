"""How ranks work together: one process, DDP, FSDP2 or DeepSpeed, all through accelerate, all to the same sums.

Gradients are summed over units and ranks, never averaged: each unit's loss is already divided by the utterances of
the whole step, so the loss scale does not follow the number of processes.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asr_train.compiling import compile_layers
from asr_train.config import Recipe
from asr_train.errors import RecipeError, TrainingError
from asr_train.geometry import SAMPLE_RATE
from asr_train.model import SpeechModel
from asr_train.peer_wait import PeerWait
from asr_train.prometheus import check_prometheus
from asr_train.trackers import tracker_names
from asr_train.trouble import need

_COLLECTIVE_TIMEOUT_S = 1800  # a rank this late is dead; the slowest thing ranks wait for is a save
_LOST_PEER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error")
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The ranks of a training and what they train."""

    accelerator: Accelerator
    model: nn.Module  # wrapped: what the loop calls
    module: SpeechModel  # the same model, seen through the wrapping
    optimizer: torch.optim.Optimizer  # the raw one, whose state a checkpoint holds
    stepper: Any  # accelerate's wrapped optimizer, or DeepSpeed's: what the loop steps
    peer_wait: PeerWait

    @property
    def name(self) -> str:
        """`single`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
        kinds = {DistributedType.NO: "single", DistributedType.FSDP: "fsdp2"}
        return kinds.get(self.accelerator.distributed_type, "ddp")

    @property
    def rank(self) -> int:
        """This process among all."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        device: torch.device = self.accelerator.device
        return device

    @contextlib.contextmanager
    def unit(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of a unit: DDP sums over ranks in the step's last one only."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            with self.model.no_sync():
                yield
        else:
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add a unit's gradients."""
        self.accelerator.backward(loss)

    def update(self, sums: torch.Tensor, max_norm: float | None) -> tuple[list[float], float, bool]:
        """Sum `sums` over ranks, clip, and step the optimizer, or skip on all ranks together; one host sync.

        Args:
            sums: float64 [n] of this rank; the first is its part of the step's loss.
            max_norm: gradients are clipped to it.

        Returns:
            the sums over ranks, the gradients' norm before clipping, and whether the step was applied.
        """
        if not isinstance(self.model, DistributedDataParallel):  # whose hook says it bucket by bucket
            self.peer_wait.gradients_are_there()
        _sum_over_ranks(sums)
        self.peer_wait.sums_are_there()
        limit = float("inf") if max_norm is None else max_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)  # unscales fp16 gradients first
        full: torch.Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
        *totals, norm_value = torch.cat([sums, full.detach().double().reshape(1)]).tolist()
        is_finite = math.isfinite(totals[0]) and math.isfinite(norm_value)
        if is_finite or self.accelerator.scaler is not None:  # a GradScaler must see a bad step too, to back off
            self.stepper.step()
        self.stepper.zero_grad()
        return totals, norm_value, is_finite


class DeepSpeedParallel(Parallel):
    """DeepSpeed's engine averages over ranks, clips, checks and steps by itself."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add a unit's gradients; times the number of ranks, since DeepSpeed averages."""
        self.engine.backward(loss * self.world_size)

    def update(self, sums: torch.Tensor, max_norm: float | None) -> tuple[list[float], float, bool]:
        """See `Parallel.update`; `max_norm` went into the engine's settings."""
        self.peer_wait.gradients_are_there()
        _sum_over_ranks(sums)
        self.peer_wait.sums_are_there()
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return sums.tolist(), norm, bool(self.engine.was_step_applied())

    @property
    def name(self) -> str:
        """See `Parallel.name`."""
        return f"zero{self.zero_stage}"

    @property
    def engine(self) -> Any:
        """DeepSpeed's engine."""
        return self.model

    @property
    def zero_stage(self) -> int:
        """How much is sharded: 1 optimizer state, 2 gradients too, 3 weights too."""
        return int(self.engine.zero_optimization_stage())


def check_environment(recipe: Recipe) -> None:
    """Refuse an accelerate config that says otherwise than the recipe, both values named, and fp16 without a GPU."""
    problems = []
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", _PRECISION[recipe.precision]):
        problems.append(f"mixed_precision: {precision} in the accelerate config, precision: {recipe.precision} here")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        problems.append(f"gradient_accumulation_steps: {steps} there, units_per_step: {recipe.units_per_step} here")
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping.lower() not in ("none", "auto", str(recipe.optim.max_grad_norm)):
        problems.append(f"gradient_clipping: {clipping} there, optim.max_grad_norm: {recipe.optim.max_grad_norm} here")
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("precision: 'fp16': needs a GPU, and this machine shows none; use fp32 or bf16")
    tracker_names(recipe)  # refuses those that cannot be had
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        need("deepspeed", "the accelerate config")
    if recipe.log.prometheus is not None and os.environ.get("RANK", "0") == "0":  # which writes it, on its node
        check_prometheus(recipe.log.prometheus)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise RecipeError(
            f"the accelerate config sets what the recipe alone decides:{listed}\nTake it out of the config."
        )


def keep_deepspeed_from_guessing() -> None:
    """Name the device to DeepSpeed, which transformers and accelerate load where it is installed: it guesses aloud."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def make_accelerator(recipe: Recipe, run_path: str) -> Accelerator:
    """The accelerate object for a recipe, checked against what was asked for.

    Raises:
        TrainingError: accelerate fell back to something else than was asked for.
    """
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    torch.use_deterministic_algorithms(recipe.deterministic)
    keep_deepspeed_from_guessing()
    # on CPU DeepSpeed would become DDP; without this several processes are refused there, or each is alone
    if not torch.cuda.is_available() and not _is_on("ACCELERATE_USE_DEEPSPEED"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # on CPU DeepSpeed must be told, else every rank is alone; without it, telling makes accelerate forget the strategy
    needs_backend = _is_on("ACCELERATE_USE_DEEPSPEED") and not torch.cuda.is_available()
    timeout_s = float(os.environ.get("WAVEFLEET_COLLECTIVE_TIMEOUT_S", _COLLECTIVE_TIMEOUT_S))
    accelerator = Accelerator(
        mixed_precision=_PRECISION[recipe.precision],
        log_with=tracker_names(recipe) or None,
        project_dir=run_path,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s), backend="gloo" if needs_backend else None),
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
        step_scheduler_with_optimizer=False,
    )
    _check_accelerator(accelerator)
    return accelerator


def prepare(accelerator: Accelerator, model: SpeechModel, optimizer: torch.optim.Optimizer, recipe: Recipe) -> Parallel:
    """Wrap model and optimizer for the strategy, with gradients summed over ranks.

    Raises:
        RecipeError: what the strategy would do wrongly.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepare_deepspeed(accelerator, model, optimizer, recipe)
    if accelerator.distributed_type == DistributedType.FSDP:
        # by itself accelerate would sum gradients in bf16 and cast the waveform: another numerics than DDP's autocast
        # (the policy's other types are left out: they would be those of the weights)
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16) if recipe.bf16_gradients else None
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = [type(model._layers()[0]).__name__]
    if recipe.model.compile:
        compile_layers(model)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    peer_wait = PeerWait(accelerator.device)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(peer_wait, _bf16_sum_hook if recipe.bf16_gradients else _sum_hook)
        _settle_buckets(wrapped)
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return Parallel(
        accelerator=accelerator,
        model=wrapped,
        # accelerate's unwrap_model would import DeepSpeed, where it is installed, for half a second
        module=wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped,
        optimizer=stepper.optimizer,
        stepper=stepper,
        peer_wait=peer_wait,
    )


def _prepare_deepspeed(
    accelerator: Accelerator, model: SpeechModel, optimizer: torch.optim.Optimizer, recipe: Recipe
) -> DeepSpeedParallel:
    """DeepSpeed's engine; precision and clipping come from the recipe, and its own step is the only boundary.

    Raises:
        RecipeError: what DeepSpeed would do wrongly.
    """
    stage = accelerator.state.deepspeed_plugin.zero_stage
    if recipe.precision == "fp16":  # 0.19.8 clips gradients before it takes the loss scale out, and never lowers it
        raise RecipeError("precision: 'fp16': DeepSpeed clips scaled gradients; use bf16, or the config ddp or fsdp2")
    for field, is_set in (("model.compile", recipe.model.compile), ("bf16_gradients", recipe.bf16_gradients)):
        if is_set:
            raise RecipeError(f"{field}: not with DeepSpeed; use the config ddp or fsdp2")
    if stage == 3 and recipe.model.freeze_transformer_steps:
        raise RecipeError("model.freeze_transformer_steps: not with ZeRO-3; use the config zero2, ddp or fsdp2")
    if stage not in (1, 2, 3):
        raise RecipeError(f"the accelerate config asks for ZeRO stage {stage}: use 1, 2 or 3, or the config ddp")
    precision = accelerator.mixed_precision
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config.update(
        {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used for nothing but its own throughput figures
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": recipe.optim.max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            # the `bf16` block would convert the weights; autocast keeps them in fp32, as everywhere else
            "torch_autocast": {"enabled": precision != "no", "dtype": "bfloat16"},
            "steps_per_print": 1_000_000_000,
        }
    )
    engine, stepper = accelerator.prepare(model, optimizer)
    return DeepSpeedParallel(
        accelerator=accelerator,
        model=engine,
        module=engine.module,
        optimizer=stepper.optimizer,
        stepper=stepper,
        peer_wait=PeerWait(accelerator.device),
    )


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes of, only says that another rank is gone."""
    while error is not None:
        if isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST_PEER):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sum_over_ranks(values: torch.Tensor) -> None:
    """Sum a small tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)


def _sum_hook(state: PeerWait, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """DDP's communication hook: a plain sum, where DDP's own divides by the number of ranks."""
    state.gradients_are_there()
    future: torch.futures.Future[list[torch.Tensor]] = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _bf16_sum_hook(state: PeerWait, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The same, with half the bytes on the way: each rank's share, and the sum, rounded to bf16."""
    state.gradients_are_there()
    buffer = bucket.buffer()
    rounded = buffer.to(torch.bfloat16)
    future: torch.futures.Future[list[torch.Tensor]] = dist.all_reduce(rounded, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def _settle_buckets(model: DistributedDataParallel) -> None:
    """Run a backward that counts for nothing, so that gradients lie in one order from an attempt's first step on.

    DDP lays its buckets out anew in the order in which its first backward gave gradients, and over three ranks or more
    that order decides in which order a sum is added: without this a resumed run differs in its last bits.
    """
    module: SpeechModel = model.module
    was_training = module.training
    module.eval()
    device = next(module.parameters()).device
    silence = torch.zeros(1, SAMPLE_RATE, device=device)
    model(silence, torch.tensor([SAMPLE_RATE])).sum().backward()
    module.zero_grad()
    module.train(was_training)


def _check_accelerator(accelerator: Accelerator) -> None:
    """Several combinations fall back silently; say so instead."""
    asked_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked_processes:
        raise TrainingError(
            f"asked for {asked_processes} processes, but accelerate sees {accelerator.num_processes}: on CPU use the "
            "config accelerate_configs/cpu.yaml"
        )
    if accelerator.num_processes > 1 and accelerator.distributed_type == DistributedType.NO:
        raise TrainingError("accelerate sees several processes and no strategy, which would train each by itself")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RecipeError("the accelerate config asks for FSDP 1, which averages gradients: add fsdp_version: 2 to it")
    asked = {
        "ACCELERATE_USE_FSDP": DistributedType.FSDP,
        "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    }
    for variable, strategy in asked.items():
        if _is_on(variable) and accelerator.distributed_type != strategy:
            raise TrainingError(
                f"asked for {strategy.value}, but accelerate made {accelerator.distributed_type.value} of it"
                f" on {accelerator.device.type}; use the config ddp or cpu instead"
            )


def _is_on(variable: str) -> bool:
    """Whether `accelerate launch` set a flag in the environment."""
    return os.environ.get(variable, "false").lower() == "true"
