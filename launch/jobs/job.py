"""Commands of the training program as jobs of one node: `python -m asr_train.evaluate ...` as a job, or many as arrays.

A job folder holds what they need and what they leave: the code, job.json, and for each command
NAME.out, NAME.err and, once it has ended, NAME.json. Jobs are submitted held, written down, then released.
"""

import os
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asr_train.errors import EXIT_DONE, RunError, WavefleetError, say
from asr_train.files import hash_json, read_json, write_json
from asr_train.lock import HeartbeatLock, LockHeldError
from launch.child import run_child
from launch.jobs.task import Task
from launch.site import exclusions, slurm
from launch.site.cluster_config import Cluster
from launch.site.sbatch import python_command, sbatch_text, submitit_parameters, without_slurm_variables
from launch.site.slurm import SlurmError
from launch.site.snapshot import check_running

JOB = "job.json"  # what is run, and what Slurm is asked for
SUBMITTED = "submitted.json"  # the newest submission
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # before a time limit; these commands have nothing to save


class CommandError(WavefleetError):
    """A command of a job failed; what it said is in the job folder."""


@dataclass(frozen=True)
class Command:
    """`python -m MODULE ARGUMENTS`; `name` is that of its files in the job folder."""

    name: str
    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Submitted:
    """The newest submission of a job folder; until `released` its jobs are held."""

    job_ids: tuple[str, ...]
    time: float
    released: bool


def task(folder: Path, name: str) -> Task:
    """What submitit stores for a command: this module's name and a path."""
    return Task(__name__, str(folder / name))


def run_task(path: Path) -> None:
    """Run a command in its job: `FOLDER/NAME`.

    Raises:
        CommandError: it failed; so Slurm knows it too.
    """
    folder, name = path.parent, path.name
    (command,) = (command for command in commands(folder) if command.name == name)
    if (exit_code := run_command(folder, command)) != EXIT_DONE:
        raise CommandError(f"{name} ended with {exit_code}: {last_words(folder, name)}")


# --- submitting -------------------------------------------------------------------------------------------------


def on_one_node(cluster: Cluster, changes: Sequence[str], *, num_gpus: int) -> Cluster:
    """A profile for jobs of one node with so many of its GPUs, unless the command line asks for a number of them."""
    is_asked = any(text.startswith("gpus_per_node=") for text in changes)
    gpus = cluster.gpus_per_node if is_asked else min(num_gpus, cluster.gpus_per_node)
    return replace(cluster, nodes=1, gpus_per_node=gpus, gpu_type=cluster.gpu_type if gpus else None)


def comment_of(folder: Path) -> str:
    """Marks the jobs of a folder in Slurm."""
    return f"wavefleet:job:{hash_json(str(folder))[:12]}"


def parameters_of(cluster: Cluster, folder: Path, code: Path, job_name: str) -> dict[str, Any]:
    """What submitit is told of every job of a folder; checked.

    Raises:
        RecipeError: lists every value that sbatch could not be given safely.
    """
    parameters = submitit_parameters(cluster, job_name=job_name, nodes=1, hold=True, comment=comment_of(folder))
    # the working directory comes first among Python's paths: it must be the job's own code too
    parameters["additional_parameters"] = {**parameters["additional_parameters"], "chdir": str(code)}
    parameters["setup"] = [*parameters["setup"], f"export PYTHONPATH={shlex.quote(str(code))}"]
    sbatch_text(parameters, folder / "slurm", python_command(cluster))
    return parameters


def batch_text(cluster: Cluster, site: Path, folder: Path, job_name: str, *, num_tasks: int = 1) -> str:
    """The batch script of a submission, for a dry run; nothing is touched."""
    parameters = parameters_of(cluster, folder, folder / "code", job_name)
    if excluded := exclusions.to_show(site, cluster.partition, 1, cluster.constraint):
        parameters["exclude"] = ",".join(excluded)
    if num_tasks > 1:
        parameters["map_count"] = num_tasks
    slurm_folder = folder / "slurm"
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(slurm_folder))}"
    return sbatch_text(parameters, slurm_folder, command)


def write_job(folder: Path, cluster: Cluster, site: Path, code: Path, job_name: str, to_run: Sequence[Command]) -> None:
    """Write down what the folder's jobs run, where they run it, and what Slurm is asked for; earlier results go."""
    content = {
        "commands": [asdict(command) for command in to_run],
        "cwd": str(Path.cwd()),
        "code": str(code),
        "site": str(site),  # where this cluster's excluded nodes are
        "python": python_command(cluster),
        "parameters": parameters_of(cluster, folder, code, job_name),
    }
    for command in to_run:
        for suffix in (".out", ".err", ".json"):
            (folder / f"{command.name}{suffix}").unlink(missing_ok=True)
    write_json(folder / JOB, content)


def make_folder(folder: Path, cluster: Cluster) -> None:
    """Make a job folder, if it is not there; it holds what jobs run: others may read it at most."""
    for path in (folder, folder / "slurm"):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700 if cluster.private else 0o755)


@contextmanager
def submitting(folder: Path, cluster: Cluster) -> Iterator[None]:
    """Keep other submitters of a job folder out, which is made if it is not there.

    Raises:
        RunError: another process submits its jobs now.
    """
    make_folder(folder, cluster)
    try:
        with HeartbeatLock(folder / "lock.json"):
            yield
    except LockHeldError as held:
        who = f"process {held.holder.get('pid')} on {held.holder.get('host')}"
        raise RunError(f"{who} submits the jobs of {folder} now") from None


def hold(folder: Path, tasks: Sequence[Task], *, after: str | None = None) -> list[str]:
    """Submit tasks held: one as a job, more as an array, or as several where the cluster's arrays are smaller.

    Args:
        folder: with its job.json.
        tasks: what they run.
        after: what they wait for, `afterok:12` say; jobs that wait in vain are cancelled.

    Returns:
        Ids of the jobs; of an array the one that all its tasks share.

    Raises:
        SlurmError: Slurm refused; nothing is left behind.
    """
    import submitit  # noqa: PLC0415  slow, and not needed by a dry run

    job = read_json(folder / JOB)
    parameters = dict(job["parameters"])
    asked = parameters.get("partition"), 1, parameters.get("constraint")
    if excluded := exclusions.to_avoid(Path(job["site"]), *asked):
        parameters["exclude"] = ",".join(excluded)
    if after is not None:
        parameters["dependency"] = after
        parameters["additional_parameters"] = {**parameters["additional_parameters"], "kill-on-invalid-dep": "yes"}
    executor = submitit.SlurmExecutor(folder / "slurm", python=job["python"])
    executor.update_parameters(**parameters)
    size = max(1, slurm.max_array_size()) if len(tasks) > 1 else 1
    job_ids: list[str] = []
    with without_slurm_variables():
        for start in range(0, len(tasks), size):
            try:
                jobs = executor.submit_array(tasks[start : start + size])
            except submitit.core.utils.FailedJobError as error:
                drop(job_ids)
                raise SlurmError(f"Slurm refused the job: {error}") from None
            job_ids.append(str(jobs[0].job_id).partition("_")[0])
    return job_ids


def release(folder: Path, job_ids: Sequence[str]) -> None:
    """Write held jobs down, then let them go."""
    for released in (False, True):
        if released:
            for job_id in job_ids:
                slurm.release(job_id)
        write_json(folder / SUBMITTED, {"job_ids": list(job_ids), "time": time.time(), "released": released})


def drop(job_ids: Sequence[str]) -> None:
    """Cancel jobs that are of no use."""
    for job_id in job_ids:
        slurm.cancel(job_id)


# --- looking ----------------------------------------------------------------------------------------------------


def commands(folder: Path) -> list[Command]:
    """What a folder's jobs run."""
    found = read_json(folder / JOB)["commands"]
    return [Command(entry["name"], entry["module"], tuple(entry["arguments"])) for entry in found]


def submitted(folder: Path) -> Submitted | None:
    """The newest submission, if there was one."""
    path = folder / SUBMITTED
    if not path.exists():
        return None
    content = read_json(path)
    return Submitted(tuple(content["job_ids"]), content["time"], content["released"])


def live(folder: Path) -> dict[str, Counter[str]]:
    """Ids of the folder's live jobs, and how many of their tasks are in which state.

    What a submitter that was killed left is put right: jobs that it wrote down are released, others cancelled.
    """
    known = submitted(folder)
    job_ids = () if known is None else known.job_ids
    orphans = {job_id.partition("_")[0] for job_id in slurm.jobs_with_comment(comment_of(folder))} - set(job_ids)
    for job_id in sorted(orphans):
        say(f"job {job_id} was submitted and never written down; it is cancelled")
        slurm.cancel(job_id)
    found = slurm.live_jobs(job_ids)
    if found and known is not None and not known.released:
        release(folder, list(found))
    return found


def shown(states: Mapping[str, Counter[str]]) -> str:
    """Live jobs in words."""
    return "; ".join(
        f"job {job_id}: " + ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items()))
        for job_id, counts in states.items()
    )


def ended(folder: Path, name: str) -> int | None:
    """Exit code of a command; None while it has not ended by itself."""
    path = folder / f"{name}.json"
    return int(read_json(path)["exit_code"]) if path.exists() else None


def last_words(folder: Path, name: str) -> str:
    """The error that a command ended with, or the last line that it wrote to stderr."""
    path = folder / f"{name}.err"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if "error: " in text:
        return text.rpartition("error: ")[2].strip()
    return text.strip().rpartition("\n")[2] or "it said nothing"


# --- in the job -------------------------------------------------------------------------------------------------


def run_command(folder: Path, command: Command) -> int:
    """Run a command of a job folder where its submitter stood, from the folder's code; its exit code.

    A command that is ended from outside leaves no exit code: it is run again should Slurm put the job back.
    """
    job = read_json(folder / JOB)
    check_running(Path(job["code"]))
    for number in _WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    with _output_to(folder / f"{command.name}.out", folder / f"{command.name}.err"):
        # without this Python would look for modules in the working directory first
        environ = {**os.environ, "PYTHONSAFEPATH": "1"}
        program = [sys.executable, "-m", command.module, *command.arguments]
        end = run_child(program, env=environ, cwd=Path(job["cwd"]))
    if end.stopped_by is None:
        record = {"exit_code": end.exit_code, "job_id": _job_id(), "host": socket.gethostname(), "time": time.time()}
        write_json(folder / f"{command.name}.json", record)
    return end.exit_code


@contextmanager
def _output_to(out: Path, err: Path) -> Iterator[None]:
    """Let this process and its children write to files meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        for number, path in ((1, out), (2, err)):
            with path.open("wb") as stream:
                os.dup2(stream.fileno(), number)
        yield
    finally:
        for number, descriptor in zip((1, 2), before, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _job_id() -> str:
    """Of an array's task, as Slurm's commands take it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ.get("SLURM_JOB_ID", "") if array is None else f"{array}_{task}"
