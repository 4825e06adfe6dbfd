"""What a planned training would run on: this machine, another one of so many processes, or the nodes of a job."""

from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from asr_train import resources
from asr_train.errors import RecipeError
from asr_train.gpus import Gpu, find_gpu, gpu_named
from asr_train.memory_estimate import Strategy
from launch.node import devices
from launch.node.placement import usable_gpus
from launch.site.cluster import accelerate_config, environment
from launch.site.cluster_config import Cluster, as_bytes


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a training would run on.

    Attributes:
        world_size: processes, on all nodes.
        strategy: how they share the model.
        on_gpu: one GPU a process, not CPUs.
        gpu: which, where that is known.
        environment: variables that its processes would have; where models are cached, say.
    """

    world_size: int
    strategy: Strategy
    on_gpu: bool
    gpu: Gpu | None
    environment: Mapping[str, str]


def here(processes: int | None, accelerate: str | None, gpu: str | None) -> Place:
    """What `wavefleet train` would start on this machine, or what was asked for in its place.

    Args:
        processes: None is one a GPU, or one.
        accelerate: an accelerate config; None is cpu, one_gpu or ddp, as fits.
        gpu: a GPU's name, for one that is not here; None is this machine's, if it has any.

    Raises:
        RecipeError: no such config or GPU is known.
    """
    gpus = usable_gpus()
    world_size = processes or max(1, gpus)
    fitting = "cpu" if gpu is None and gpus == 0 else "one_gpu" if world_size == 1 else "ddp"
    strategy, on_gpu = strategy_of(accelerate or fitting, world_size)
    name = devices.gpu_name() if on_gpu and gpu is None else None
    known = gpu_named(gpu) if gpu is not None else find_gpu(name) if name is not None else None
    return Place(world_size=world_size, strategy=strategy, on_gpu=on_gpu, gpu=known if on_gpu else None, environment={})


def on(cluster: Cluster, gpu: str | None) -> Place:
    """What a job of this profile would start.

    Args:
        cluster: the profile.
        gpu: a GPU's name; None is the profile's `gpu_type`, of `gpu_memory` at least.

    Raises:
        RecipeError: no such config or GPU is known.
    """
    world_size = cluster.nodes * cluster.num_processes
    strategy, _ = strategy_of(accelerate_config(cluster), world_size)
    known = None
    if gpu is not None:
        known = gpu_named(gpu)
    elif cluster.gpu_type is not None:
        # a driver shows less than the data sheet's GB, and Slurm's G are powers of 1024: what is asked for fits
        known = find_gpu(cluster.gpu_type, 0.9 * as_bytes(cluster.gpu_memory) / 1e9)
    on_gpu = cluster.gpus_per_node > 0
    return Place(
        world_size=world_size, strategy=strategy, on_gpu=on_gpu, gpu=known if on_gpu else None,
        environment=environment(cluster),
    )  # fmt: skip


def strategy_of(config: str, world_size: int) -> tuple[Strategy, bool]:
    """What an accelerate config, a file or a shipped one by name, makes of so many processes, and whether of GPUs.

    Raises:
        RecipeError: there is none.
    """
    try:
        values = yaml.safe_load(resources.find("accelerate_configs", config).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"--accelerate: {error}") from None
    kind, on_gpu = str(values.get("distributed_type")), not values.get("use_cpu")
    if kind == "FSDP":
        return "fsdp2", on_gpu
    if kind == "DEEPSPEED":
        stage = int(values["deepspeed_config"]["zero_stage"])
        return ("zero1", "zero1", "zero2", "zero3")[stage], on_gpu
    return "single" if world_size == 1 else "ddp", on_gpu
