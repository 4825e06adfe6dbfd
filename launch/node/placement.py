"""Where a training runs: the accelerate config, processes and threads of a node, and the command that starts them."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from asr_train import resources
from asr_train.config import Recipe
from asr_train.data.world_size import check_world_size
from asr_train.errors import RecipeError, say
from asr_train.trouble import need
from launch.node import devices

# torchrun kills its workers 30 s after it passed a stop signal on, saved or not; here no scheduler waits for us.
SHUTDOWN_TIMEOUT_S = 3600


class Rendezvous(NamedTuple):
    """Where the nodes of a job meet, and which of them this is."""

    num_nodes: int
    node: int
    address: str
    port: int
    id: str


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a training runs: an accelerate config file, and how many processes a node of how many threads."""

    config: Path
    num_processes: int
    num_threads: int
    on_cpu: bool

    def command(
        self, arguments: Sequence[str], *, rendezvous: Rendezvous | None = None, log_dir: Path | None = None
    ) -> list[str]:
        """`accelerate launch` with explicit flags; what accelerate would otherwise guess is said.

        Args:
            arguments: of the training program.
            rendezvous: where several nodes meet; this machine alone when None.
            log_dir: each rank's output goes there too, except what rank 0 writes to a terminal, where it draws.
        """
        # port 0 is any free one, so that two runs share a machine
        meet = rendezvous or Rendezvous(1, 0, "127.0.0.1", 0, "")
        num_processes = self.num_processes * meet.num_nodes
        flags = ["--config_file", str(self.config), "--num_machines", str(meet.num_nodes)]
        flags += ["--machine_rank", str(meet.node), "--num_processes", str(num_processes)]
        flags += ["--num_cpu_threads_per_process", str(self.num_threads), "--quiet"]
        flags += ["--main_process_port", str(meet.port)]
        if meet.num_nodes > 1:
            flags += ["--main_process_ip", meet.address, "--rdzv_backend", "static", "--max_restarts", "0"]
        if log_dir is not None and num_processes > 1:  # a single one writes to our own output
            tee = ",".join(f"{rank}:3" for rank in range(1, num_processes)) if sys.stderr.isatty() else "3"
            flags += ["--log_dir", str(log_dir), "--tee", tee]
        if self.on_cpu and num_processes == 1:
            flags.append("--cpu")  # a plain process; with more processes this flag would start one all the same
        return [sys.executable, "-m", "accelerate.commands.launch", *flags, "-m", "asr_train", *arguments]

    def environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Our environment and what `accelerate launch` takes from there alone."""
        extra = {"ACCELERATE_USE_CPU": "true"} if self.on_cpu else {}
        ours = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
        }
        return {**ours, **environ, **extra}

    def __str__(self) -> str:
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        return f"{self.config.stem}, {processes}, CPU threads each: {self.num_threads}"


def place(recipe: Recipe, *, accelerate: str | None, processes: int | None, num_nodes: int = 1) -> Placement:
    """Choose the accelerate config and the number of processes, and refuse what could not work.

    Args:
        recipe: says how many units a step has.
        accelerate: a config file, or the name of a shipped one; None takes what fits the machine.
        processes: a node; None takes the config's, which for the shipped GPU configs is one a GPU.
        num_nodes: nodes like this one.

    Raises:
        RecipeError: no such config, one for other hardware, or more processes than GPUs or units.
    """
    gpus = usable_gpus()
    is_single = (processes or gpus) * num_nodes == 1
    name = accelerate or ("cpu" if gpus == 0 else "one_gpu" if is_single else "ddp")
    try:
        config = resources.find("accelerate_configs", name).absolute()
    except FileNotFoundError as error:
        raise RecipeError(f"--accelerate: {error}") from None
    values = _read_config(config)
    on_cpu = bool(values.get("use_cpu")) or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    own = values.get("num_processes")
    num_processes = processes or (own if isinstance(own, int) else gpus)
    if problem := _mismatch(values, gpus=gpus, on_cpu=on_cpu, num_processes=num_processes):
        raise RecipeError(f"{config.name}: {problem}")
    if str(values["distributed_type"]) == "DEEPSPEED":
        need("deepspeed", f"--accelerate {config.stem}")
    check_world_size(recipe.units_per_step, num_processes * num_nodes, recipe.allow_idle_ranks)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return Placement(
        config=config,
        num_processes=num_processes,
        num_threads=int(threads) if threads.isdigit() else max(1, devices.num_cores() // num_processes),
        on_cpu=on_cpu,
    )


def usable_gpus() -> int:
    """GPUs that this torch can use; says so where there are others."""
    gpus = devices.num_gpus()
    if gpus and devices.torch_is_cpu_build():
        say(f"this torch is a CPU build and cannot use the {gpus} GPU(s) of this machine")
        return 0
    return gpus


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise RecipeError(f"{path} is no accelerate config: it has no distributed_type")
    return values


def _mismatch(values: Mapping[str, Any], *, gpus: int, on_cpu: bool, num_processes: int) -> str | None:
    """Why this config cannot run so many processes here; accelerate would often do something else, silently."""
    kind = str(values["distributed_type"])
    if values.get("num_machines", 1) != 1:
        return "it is for several machines; wavefleet train uses one"
    if not on_cpu and gpus == 0:
        return "it is for GPUs, and this machine shows none; use --accelerate cpu"
    if not on_cpu and num_processes > gpus:
        return f"{num_processes} processes need as many GPUs, and this machine shows {gpus}; use --processes {gpus}"
    if on_cpu and kind in ("FSDP", "DEEPSPEED"):
        return f"{kind} needs GPUs; use --accelerate cpu"
    if kind in ("NO", "False", "MULTI_CPU") and num_processes > 1:
        return f"distributed_type {kind} runs one process, not {num_processes}; use --accelerate cpu or ddp"
    return None
