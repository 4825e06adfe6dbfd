"""A cluster profile -> what submitit is told, and the very text that sbatch gets.

submitit's own text is used, so that a dry run shows what a submission sends. What it leaves open is refused here: it
quotes values for a shell, while sbatch reads its #SBATCH lines by other rules, and Slurm expands % in paths.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asr_train.errors import RecipeError, say
from launch.site import slurm
from launch.site.cluster import environment
from launch.site.cluster_config import Cluster, line_problem

_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def submitit_parameters(
    cluster: Cluster,
    *,
    job_name: str,
    nodes: int,
    hold: bool = True,
    exclude: Sequence[str] = (),
    dependency: str | None = None,
    comment: str | None = None,
) -> dict[str, Any]:
    """What `submitit.SlurmExecutor.update_parameters` is given for a job of one task a node.

    Args:
        cluster: the profile.
        job_name: any one line of text.
        nodes: how many; `cluster.nodes` for a training.
        hold: submitted held, to be released once its id is on record.
        exclude: names of nodes not to use.
        dependency: in Slurm's form, `afterany:12` say; a job whose dependency cannot be met any more is cancelled.
        comment: kept by Slurm with the job.

    Raises:
        RecipeError: lists every value that sbatch could not be given safely.
    """
    further: dict[str, Any] = dict(cluster.sbatch)
    # Asked for by name, since a cluster's JobRequeue may say either.
    further["requeue"] = True  # a run that is not done goes on as the same job
    if hold:
        further["hold"] = True
    if cluster.reservation is not None:
        further["reservation"] = cluster.reservation
    if dependency is not None:
        further["kill-on-invalid-dep"] = "yes"
    wanted = {
        "job_name": job_name,
        "comment": comment,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_node,
        "gres": _gres(cluster),
        "mem": cluster.memory,
        "time": cluster.time,  # in minutes: submitit's own handler counts with it
        "signal_delay_s": cluster.signal_lead_s,
        "exclude": ",".join(exclude) or None,
        "dependency": dependency,
        "setup": _setup(cluster),
        "srun_args": _srun(cluster),
        "additional_parameters": further,
    }
    problems = [f"nodes: {nodes}: should be at least 1"] if nodes < 1 else []
    problems += [f"exclude: {name!r}: should be a node's name" for name in exclude if not _NODE.fullmatch(name)]
    _refuse(problems + _problems(wanted))
    # submitit's default wckey is `submitit`, which a cluster that checks them does not know.
    return {"wckey": None, **{name: value for name, value in wanted.items() if value is not None}}


def sbatch_text(parameters: Mapping[str, Any], folder: Path, command: str) -> str:
    """The batch script that submitit would write; call this before a submission too, for its checks.

    Args:
        parameters: of `submitit_parameters`.
        folder: submitit's folder for logs and pickles, absolute.
        command: what srun runs, as shell text: `python_command(cluster)` and quoted arguments.

    Raises:
        RecipeError: a value, the folder or the command could be read as something else.
    """
    from submitit.slurm.slurm import _make_sbatch_string  # noqa: PLC0415 - kept out of `--help`

    problems = _problems(parameters)
    path = str(folder)
    if problem := line_problem(path):
        problems.append(f"folder: {path!r}: {problem}")
    if "%" in path:
        problems.append(f"folder: {path!r}: should have no %; Slurm puts job numbers in its place")
    if not folder.is_absolute():
        problems.append(f"folder: {path!r}: should be absolute")
    if not command.strip() or "\n" in command:
        problems.append(f"command: {command!r}: should be one line")
    _refuse(problems)
    return str(_make_sbatch_string(command=command, folder=folder, **parameters))


def python_command(cluster: Cluster) -> str:
    """How a job starts Python, as shell text: what `submitit.SlurmExecutor(python=...)` takes."""
    container = cluster.container
    if container.kind == "none":
        return shlex.quote(sys.executable)
    python = container.python or "python3"
    if container.kind == "pyxis":  # srun starts the container; see _srun
        return shlex.quote(python)
    gpus = ["--nv"] if cluster.gpus_per_node else []
    mounts = [word for mount in container.mounts for word in ("--bind", mount)]
    return shlex.join(["apptainer", "exec", *gpus, *mounts, *container.extra, str(container.image), python])


@contextmanager
def without_slurm_variables() -> Iterator[None]:
    """Those of a shell would win over the profile, silently; those of a job would reach the next one."""
    removed = {name: os.environ.pop(name) for name in list(os.environ) if slurm.is_option(name)}
    for name in [name for name in removed if name.startswith("SBATCH_")]:
        say(f"{name}={removed[name]} of your shell is left out; set it in the profile")
    try:
        yield
    finally:
        os.environ.update(removed)


def last_word(cluster: Cluster, run_dir: Path) -> list[str]:
    """Set-up lines that call `launch.jobs.last_word` when srun fails, unless Slurm is ending the job itself."""
    command = f"{python_command(cluster)} -m launch.jobs.last_word {shlex.quote(str(run_dir))}"
    then = f'code=$?; [ $code = 0 ] || [ "$ended" ] || {command} || true; exit $code'
    return ["ended=", "trap ended=1 TERM", f"trap {shlex.quote(then)} EXIT"]


def _gres(cluster: Cluster) -> str | None:
    if cluster.gpus_per_node == 0:
        return None
    return ":".join(word for word in ("gpu", cluster.gpu_type, str(cluster.gpus_per_node)) if word)


def _setup(cluster: Cluster) -> list[str]:
    """Shell lines before srun. The first is a command, after which sbatch reads no more #SBATCH lines."""
    loads = [f"module load {shlex.quote(name)}" for name in cluster.modules]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment(cluster).items()]
    return ["set -e", *cluster.setup, *loads, *exports]


def _srun(cluster: Cluster) -> list[str]:
    """Since Slurm 22.05 srun does not inherit --cpus-per-task; a task that fails takes the others along after 60 s."""
    container = cluster.container
    arguments = [f"--cpus-per-task={cluster.cpus_per_node}", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL"]
    if container.kind == "pyxis":
        arguments.append(f"--container-image={container.image}")
        if container.mounts:
            arguments.append(f"--container-mounts={','.join(container.mounts)}")
        arguments += container.extra
    return [*arguments, *cluster.srun]


def _problems(parameters: Mapping[str, Any]) -> list[str]:
    """Every text that would not reach sbatch or srun as it stands; set-up lines are shell, and the profile's own."""
    texts = [(name, value) for name, value in parameters.items() if isinstance(value, str)]
    further = parameters.get("additional_parameters", {}).items()
    texts += [(name, value) for name, value in further if isinstance(value, str)]
    texts += [("srun", argument) for argument in parameters.get("srun_args", ())]
    return [f"{name}: {value!r}: {problem}" for name, value in texts if (problem := line_problem(value))]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise RecipeError("this job cannot be submitted:" + "".join(f"\n  {problem}" for problem in problems))
