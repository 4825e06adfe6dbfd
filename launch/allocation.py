"""`wavefleet train` inside a Slurm allocation, of `salloc` or a batch script: one node agent on each of its nodes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

import asr_train
from asr_train.config import Recipe
from asr_train.data.world_size import check_world_size
from asr_train.errors import EXIT_DONE, say
from asr_train.run_dir import RunDir
from launch.child import Signals, nobody, run_child
from launch.ending.starts import retried
from launch.jobs import last_word
from launch.requests import ask
from launch.site import cluster as profiles
from launch.site import slurm, snapshot
from launch.site.cluster_config import Cluster
from launch.site.settings import ALLOCATION, JobSettings

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # the numbers of salloc's own shell, a batch script and the like


def is_inside(environ: Mapping[str, str]) -> bool:
    """Whether this process has an allocation and is not one of its tasks already."""
    step = environ.get("SLURM_STEP_ID", "")
    is_task = step.isdigit() and int(step) < _FIRST_SPECIAL_STEP
    return "SLURM_JOB_ID" in environ and not is_task


def train(run: RunDir, recipe: Recipe, *, accelerate: str | None, processes: int | None) -> int:
    """Train on all nodes of the allocation; the verdict's exit code.

    A batch script that Slurm may requeue goes on so at its time limit, with the code that it began with.

    Raises:
        RecipeError: more processes than a step has units.
        SlurmError: Slurm does not know the allocation.
    """
    job_id = os.environ["SLURM_JOB_ID"]
    job = slurm.details(job_id)
    cluster = _cluster(os.environ, job, accelerate=accelerate, processes=processes)
    num_processes = cluster.num_processes * cluster.nodes
    fewer = "take fewer nodes, or fewer processes on each with --processes"
    check_world_size(recipe.units_per_step, num_processes, recipe.allow_idle_ranks, fewer=fewer)
    is_batch = job.get("BatchFlag") == "1"
    restarted = int(job.get("Restarts", 0)) > 0
    if not restarted:
        retried(run)
    code = Path(asr_train.__file__).parent.parent
    if is_batch:
        code = JobSettings.read(run).code if restarted else snapshot.take(run.path / "code")
    settings = JobSettings(
        code=code,
        cluster_name=ALLOCATION,
        cluster=cluster,
        continuation="requeue" if is_batch and job.get("Requeue") == "1" else "none",
    )
    settings.write(run)
    say(f"{run.path}: {cluster.nodes} nodes of job {job_id}, processes each: {cluster.num_processes}")
    command = [
        "srun", f"--nodes={cluster.nodes}", f"--ntasks={cluster.nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={cluster.cpus_per_node}", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL",
        sys.executable, "-m", "launch.node_agent", str(run.path),
    ]  # fmt: skip
    environ = {**os.environ, "PYTHONPATH": str(code)}
    with (signals := Signals()).installed():

        def pass_on(child: psutil.Process) -> bool:
            if signals.first is not None:
                ask(run, "stop")
            return False

        ended = run_child(command, env=environ, cwd=code, receivers=nobody, signals=signals, is_over=pass_on)
        if ended.exit_code != EXIT_DONE and signals.first is None:
            last_word.speak(run, job_id, signals)
    return ended.exit_code


def _cluster(
    environ: Mapping[str, str], job: Mapping[str, str], *, accelerate: str | None, processes: int | None
) -> Cluster:
    """The allocation as a profile."""
    limit = job.get("TimeLimit", "")
    return profiles.from_json(
        {
            "nodes": int(environ.get("SLURM_JOB_NUM_NODES", "1")),
            "gpus_per_node": _gpus_per_node(environ),
            "cpus_per_node": int(environ.get("SLURM_CPUS_ON_NODE", "1")),
            "time": limit if limit[:1].isdigit() else "365-00:00:00",
            "accelerate": accelerate,
            "processes_per_node": processes,
        }
    )


def _gpus_per_node(environ: Mapping[str, str]) -> int:
    """`4`, `a100:4`, or a list of numbers, whatever the allocation was asked for by."""
    if gpus := environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE"):
        return int(gpus.rpartition(":")[2])
    return len([number for number in environ.get("SLURM_JOB_GPUS", "").split(",") if number])
