"""Model and optimizer as flat names and tensors, the same under every strategy and at every world size.

    model.<parameter or buffer>                       weights, float32
    optimizer.<parameter>.exp_avg, .exp_avg_sq        Adam's moments, shaped like the parameter
    optimizer.<parameter>.step                        Adam's counter, float32, no dimensions

What a strategy shards, a checkpoint holds in shards; what it replicates, one rank writes. ZeRO's flat partitions are
put together parameter by parameter, so that its checkpoints are those of DDP and FSDP2, and no pickle of DeepSpeed's
is ever read. Settings of the optimizer are the recipe's, and stand in no checkpoint.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from asr_train.optim import create_optimizer_state
from asr_train.strategy import DeepSpeedParallel, Parallel

_MOMENTS = ("exp_avg", "exp_avg_sq")
_READ_BYTES = 256 << 20  # of ZeRO's state put together at once on reading

Read = Callable[[dict[str, torch.Tensor]], None]


class Snapshots:
    """Copies of a rank's part of the state on the host, which training no longer touches."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._on_gpu = parallel.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=self._on_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=self._on_gpu,
        )
        self._stager = DefaultStager(options)
        self._copies: dict[str, torch.Tensor] = {}

    def take(self) -> dict[str, torch.Tensor]:
        """A copy of what this rank writes, valid until the next is taken; every rank calls this."""
        live = written_here(self._parallel)
        if isinstance(self._parallel, DeepSpeedParallel):
            return live  # put together for this very purpose
        if live.keys() != self._copies.keys():
            copied: Any = self._stager.stage(live)  # makes the buffers, pinned for a GPU
            self._copies = copied
        else:  # one call for all: the stager takes as long again for its own work on each tensor
            torch._foreach_copy_(
                [_local(copy) for copy in self._copies.values()],
                [_local(live[name]) for name in self._copies],
                non_blocking=self._on_gpu,
            )
        if self._on_gpu:
            torch.cuda.synchronize(self._parallel.device)
        return dict(self._copies)

    def close(self) -> None:
        """Free the buffers."""
        self._copies = {}
        self._stager.close()


def create_state(parallel: Parallel) -> None:
    """Make the optimizer's state before the first step, so that every checkpoint has the same names."""
    if isinstance(parallel, DeepSpeedParallel):
        zero = parallel.engine.optimizer
        create_optimizer_state(zero.optimizer, [flat for _, flat in _partitions(parallel)])
    else:
        groups = parallel.optimizer.param_groups
        create_optimizer_state(parallel.optimizer, [parameter for group in groups for parameter in group["params"]])


def written_here(parallel: Parallel) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes: its shards of all that is sharded, its share of what is replicated."""
    shapes = _sizes(parallel)
    owner = _owners(shapes, parallel.world_size)
    if isinstance(parallel, DeepSpeedParallel):
        mine = {}
        for name, tensor in _gathered(parallel):  # each is a collective: every rank walks all of them
            if owner[name] == parallel.rank:
                mine[name] = tensor.detach().to("cpu", copy=True)
        return mine
    live = live_tensors(parallel)
    return {name: tensor for name, tensor in live.items() if _is_sharded(tensor) or owner[name] == parallel.rank}


def live_tensors(parallel: Parallel) -> dict[str, torch.Tensor]:
    """Name -> the tensor that training works on; what is written into it, is restored. Not for ZeRO."""
    found = model_tensors(parallel.module)
    for name, parameter in _trained(parallel.module):
        for key, tensor in parallel.optimizer.state[parameter].items():
            found[f"optimizer.{name}.{key}"] = tensor
    return found


def model_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> weight or buffer of an unwrapped model, in place."""
    state: Mapping[str, torch.Tensor] = module.state_dict(keep_vars=True)
    return {f"model.{name}": tensor.detach() for name, tensor in state.items()}


def expected(parallel: Parallel) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> shape and dtype of all that a checkpoint of this training holds."""
    found = {}
    for name, tensor in parallel.module.state_dict(keep_vars=True).items():
        found[f"model.{name}"] = (_shape(tensor), tensor.dtype)
    for name, parameter in _trained(parallel.module):
        for key in _MOMENTS:
            found[f"optimizer.{name}.{key}"] = (_shape(parameter), torch.float32)
        found[f"optimizer.{name}.step"] = ((), torch.float32)
    return found


def fill(parallel: Parallel, read: Read) -> None:
    """Restore model and optimizer; every rank calls this.

    Args:
        parallel: what is trained.
        read: fills the tensors of a dict from a checkpoint, by name.
    """
    if isinstance(parallel, DeepSpeedParallel):
        _fill_zero(parallel, read)
    else:
        read(live_tensors(parallel))


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _is_sharded(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The whole tensor's, where ZeRO-3 has left a piece of it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _sizes(parallel: Parallel) -> dict[str, int]:
    return {
        name: torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
        for name, (shape, dtype) in expected(parallel).items()
    }


def _owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Name -> the rank that writes it where every rank has it: the next largest to whoever has least."""
    loads = [(0, rank) for rank in range(world_size)]
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        owner[name] = rank
        heapq.heappush(loads, (load + sizes[name], rank))
    return owner


# --- ZeRO ---------------------------------------------------------------------------------------------------------
# Stages 1 and 2 keep a flat float32 partition of each group of parameters, with views for each parameter's piece of
# it; stage 3 a piece of every parameter, padded. Read from deepspeed 0.19.8, deepspeed/utils/tensor_fragment.py and
# deepspeed/runtime/zero/.


def _gathered(parallel: DeepSpeedParallel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, whole, one after another; valid until the next one is asked for."""
    from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415  optional, and slow to import

    steps = _steps(parallel)
    state = parallel.module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        with _whole([tensor], parallel):
            yield f"model.{name}", tensor
    _link(parallel)
    for name, parameter in _trained(parallel.module):
        for key in _MOMENTS:
            yield f"optimizer.{name}.{key}", safe_get_full_optimizer_state(parameter, key).reshape(_shape(parameter))
        yield f"optimizer.{name}.step", steps[parameter]


def _fill_zero(parallel: DeepSpeedParallel, read: Read) -> None:
    state = parallel.module.state_dict(keep_vars=True)
    for batch in _batches(dict(state)):
        with _whole(list(batch.values()), parallel, is_changed=True):
            read({f"model.{name}": tensor.detach() for name, tensor in batch.items()})
    _link(parallel)
    steps = _steps(parallel)
    for batch in _batches(dict(_trained(parallel.module))):
        values = {f"model.{name}": torch.empty(_shape(tensor)) for name, tensor in batch.items()}
        for name, tensor in batch.items():
            values |= {f"optimizer.{name}.{key}": torch.empty(_shape(tensor)) for key in _MOMENTS}
            values[f"optimizer.{name}.step"] = steps[tensor]  # a group's own, filled in place
        read(values)
        for name, parameter in batch.items():
            _set_piece(parallel, parameter, None, values[f"model.{name}"])
            for key in _MOMENTS:
                _set_piece(parallel, parameter, key, values[f"optimizer.{name}.{key}"])


def _batches(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """The tensors, so many at once that they fit into memory whole."""
    batch: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        batch[name] = tensor
        if sum(4 * torch.Size(_shape(tensor)).numel() for tensor in batch.values()) > _READ_BYTES:
            yield batch
            batch = {}
    if batch:
        yield batch


def _whole(tensors: list[torch.Tensor], parallel: DeepSpeedParallel, *, is_changed: bool = False) -> Any:
    """Within the block weights that ZeRO-3 keeps in pieces are whole, and on leaving in pieces again."""
    from deepspeed.runtime.zero import GatheredParameters  # noqa: PLC0415

    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_shape")]
    return GatheredParameters(pieces, modifier_rank=0 if is_changed else None, enabled=bool(pieces))


def _link(parallel: DeepSpeedParallel) -> None:
    """Have stages 1 and 2 find each parameter's piece of the moments; the first step does that otherwise."""
    if parallel.zero_stage < 3:
        parallel.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _partitions(parallel: DeepSpeedParallel) -> Iterator[tuple[list[Any], torch.Tensor]]:
    """(parameters, the flat float32 partition of all of them that this rank keeps); its Adam state is keyed by it."""
    zero = parallel.engine.optimizer
    if parallel.zero_stage < 3:
        return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)


def _steps(parallel: DeepSpeedParallel) -> dict[Any, torch.Tensor]:
    """Parameter -> Adam's counter, one tensor for all parameters of a flat partition."""
    states = parallel.engine.optimizer.optimizer.state
    return {parameter: states[flat]["step"] for group, flat in _partitions(parallel) for parameter in group}


def _set_piece(parallel: DeepSpeedParallel, parameter: Any, key: str | None, value: torch.Tensor) -> None:
    """Put this rank's piece of a whole tensor where DeepSpeed keeps it: a moment, or with key None the weight."""
    if parallel.zero_stage < 3:
        mapping = parameter._hp_mapping
        if mapping is not None:  # a part of this parameter is in this rank's partition
            address = mapping.lp_fragment_address
            piece = value.flatten().narrow(0, address.start, address.numel)
            mapping.get_hp_fragment(key).data.copy_(piece)
        return
    zero = parallel.engine.optimizer
    there, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = min(there.numel() * zero._get_param_partition_rank(parameter), value.numel())
    piece = value.flatten()[start : start + there.numel()]
    there.data[: piece.numel()].copy_(piece)
