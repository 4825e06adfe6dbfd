"""AdamW, its groups of parameters, and learning rates as functions of the step."""

import math
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from asr_train.config import OptimSettings

HEAD = "lm_head."


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, object]]:
    """Trained parameters in up to four groups: head or the rest, with weight decay or without.

    Matrices and convolution kernels decay. Biases, norms and everything else that is one row of numbers do not, as
    the magnitude of a weight-normalised kernel. Each group says `head` and `decays`; `apply_schedule` reads them.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = sum(size > 1 for size in parameter.shape) > 1 and "pos_bias" not in name
            groups.setdefault((is_head(name), decays), []).append(parameter)
    return [
        {"params": groups[head, decays], "head": head, "decays": decays, "lr": settings.lr,
         "weight_decay": settings.weight_decay if decays else 0.0}
        for head, decays in sorted(groups)
    ]  # fmt: skip


def is_head(name: str) -> bool:
    """Whether a parameter's name is one of the CTC head, which trains while the transformer is frozen."""
    return f".{name}".find(f".{HEAD}") >= 0


def build_optimizer(model: nn.Module, settings: OptimSettings, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW, whose settings `apply_schedule` renews before each update; `create_optimizer_state` makes its state.

    Args:
        model: whose trained parameters it updates.
        settings: its numbers.
        fused: by torch's kernel that reads and writes everything once, see `may_fuse`; else by its operations over
            lists of tensors. Both give the same bits each time; each other's differ in the last ones.
    """
    return torch.optim.AdamW(
        parameter_groups(model, settings),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=fused,
        foreach=not fused,
    )


def may_fuse(accelerator: Accelerator) -> bool:
    """Whether the fused kernel is used: on a GPU, but not in fp16 and not under DeepSpeed.

    In fp16 it skips non-finite steps by itself, unseen by accelerate, which looks whether `step` was called. DeepSpeed
    gives an optimizer flat partitions, and scales and clips in ways of its own. On a CPU its last bits depend on where
    in a tensor an element lies, and so on how it is sharded; all it would save is half a second an update (measured:
    0.2 s in place of 0.75 s for 95 million parameters, one core).
    """
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.device.type == "cuda" and accelerator.mixed_precision != "fp16" and not is_deepspeed


def create_optimizer_state(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Give every parameter that has none its Adam state, zero, on the device where the parameter is by now.

    By itself torch makes it in a parameter's first step, so that a checkpoint before it, or one written while a part
    is frozen, would lack names that another has.
    """
    is_fused = bool(optimizer.defaults.get("fused"))
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            # as torch's own: on the host, but where the kernel that does all of the update reads it
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def apply_schedule(
    optimizer: torch.optim.Optimizer,
    settings: OptimSettings,
    step: int,
    *,
    max_steps: int,
    freeze_transformer_steps: int = 0,
) -> float:
    """Set the optimizer up for the update that follows `step` updates; the learning rate of the head.

    A pure function of the step, called before every update. While the transformer is frozen its groups have neither
    learning rate nor decay, and their counters are put back to zero before each update up to and including the first
    trained one; so Adam's bias correction counts from the thaw, wherever a run is stopped and resumed.
    """
    lr = learning_rate(settings, step, max_steps)
    for group in optimizer.param_groups:
        frozen = not group["head"] and step < freeze_transformer_steps
        group["lr"] = 0.0 if frozen else lr
        group["weight_decay"] = settings.weight_decay if group["decays"] and not frozen else 0.0
        group["betas"], group["eps"] = settings.betas, settings.eps  # not a checkpoint's, where the recipe was changed
        if not group["head"] and 0 < step <= freeze_transformer_steps:
            torch._foreach_zero_([optimizer.state[parameter]["step"] for parameter in group["params"]])
    return lr


def learning_rate(settings: OptimSettings, step: int, max_steps: int) -> float:
    """The learning rate of the update that follows `step` updates; a pure function, at every step from 0."""
    return settings.lr * _SHAPES[settings.schedule](settings, step, max_steps)


def _tri_stage(settings: OptimSettings, step: int, max_steps: int) -> float:
    """Linear from the first scale to 1, constant, then exponential down to the last scale.

    Warm-up of W steps: s0 + (1 - s0) * t / W. Hold. Decay of D steps: s1 ** (t / D). After that s1.
    Source: fairseq's `tri_stage_lr_scheduler`, and Park et al. 2019, SpecAugment.
    """
    warmup_share, hold_share, _ = settings.tri_stage
    first, last = settings.tri_stage_scales
    warmup, decay_from = round(warmup_share * max_steps), round((warmup_share + hold_share) * max_steps)
    if step < warmup:
        return first + (1 - first) * step / warmup
    if step < decay_from:
        return 1.0
    return last ** ((step - decay_from) / (max_steps - decay_from)) if step < max_steps else last


def _linear(settings: OptimSettings, step: int, max_steps: int) -> float:
    """Warm-up t / W, then linear to zero at the last step. Source: transformers' `get_linear_schedule_with_warmup`."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    return max(0.0, (max_steps - step) / max(1, max_steps - settings.warmup_steps))


def _cosine(settings: OptimSettings, step: int, max_steps: int) -> float:
    """Warm-up t / W, then half a cosine to zero. Source: transformers' `get_cosine_schedule_with_warmup`."""
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _constant(settings: OptimSettings, step: int, max_steps: int) -> float:
    """Warm-up t / W, then 1. Source: transformers' `get_constant_schedule_with_warmup`."""
    return step / settings.warmup_steps if step < settings.warmup_steps else 1.0


_SHAPES: dict[str, Callable[[OptimSettings, int, int], float]] = {
    "tri_stage": _tri_stage,
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}
