"""`wavefleet submit RECIPE --cluster P`: a run directory with its own copy of the code, and one job that trains in it.

A job is submitted held, written down, then released: a submitter that is killed in between leaves a held job whose
comment names the run, and the next call adopts it.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asr_train import lock
from asr_train.config import Recipe
from asr_train.data.plan import check_world_size
from asr_train.errors import EXIT_DONE, RunError, say
from asr_train.files import append_jsonl, read_json, write_json
from asr_train.recipe import load_recipe, run_directory
from asr_train.run_dir import RunDir, locked_message
from launch import slurm, snapshot, then
from launch.cluster import agent_settings, load_cluster
from launch.cluster_config import Cluster
from launch.node_agent import SETTINGS, VERDICTS, NodeAgent
from launch.sbatch import python_command, sbatch_text, submitit_parameters
from launch.slurm import JobState, SlurmError


@dataclass(frozen=True)
class Submission:
    """A job of a run, as written down in jobs/."""

    job_id: str
    cluster: str
    num_nodes: int
    submitted: float
    code: str


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks for besides recipe and profile; see its help."""

    retry: bool = False
    force: bool = False
    allow_change: bool = False
    update_code: bool = False
    followers: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Submit a training, or say which job does it already."""
    options = _parser().parse_intermixed_args(argv)
    overrides, changes = split_overrides(options)
    recipe = load_recipe(options.recipe, overrides)
    cluster = load_cluster(options.cluster, changes)
    run = RunDir(run_directory(recipe))
    check_size(recipe, cluster)
    if options.dry_run:
        print(batch_text(run, recipe, cluster), end="")
        return EXIT_DONE
    wishes = Wishes(
        retry=options.retry,
        force=options.force,
        allow_change=options.allow_change,
        update_code=options.update_code,
        followers=then.read_verbs(options.then) if options.then is not None else (),
    )
    print(start(run, recipe, cluster, options.cluster, wishes))
    return EXIT_DONE


def start(run: RunDir, recipe: Recipe, cluster: Cluster, cluster_name: str, wishes: Wishes) -> str:
    """Have a run trained by a job, unless one does already; what happened, in a line.

    Raises:
        RunError: it is done, failed, trained elsewhere or of another recipe, and that was not asked for.
        SlurmError: Slurm does not answer, or refused.
    """
    run.make()
    run.path.chmod(0o700)  # its owner's alone: it holds what jobs run
    if live := _live(run):
        if wishes.followers:
            then.ask(run, wishes.followers)
            then.chain(run, cluster, Path(live[0].code), live[0].job_id)
        return f"{run.path}: job {live[0].job_id} is {live[1].state} already"
    _check_may_start(run, retry=wishes.retry, force=wishes.force)
    run.claim(recipe, allow_change=wishes.allow_change)
    if wishes.force:
        run.done.unlink(missing_ok=True)
    if wishes.retry:  # what failed before is not held against what comes now
        append_jsonl(run.path / VERDICTS, {"event": "retried", "time": time.time()})
    if wishes.followers:
        then.ask(run, wishes.followers)
    code = _code(run, renew=wishes.update_code)
    submission = submit(run, recipe, cluster, cluster_name, code)
    return f"{run.path}: submitted as job {submission.job_id}"


def split_overrides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What the command line changes of the recipe, and of the profile."""
    recipe = [text for text in options.overrides if not text.startswith("cluster.")]
    cluster = [text.removeprefix("cluster.") for text in options.overrides if text.startswith("cluster.")]
    return recipe, cluster + ([] if options.nodes is None else [f"nodes={options.nodes}"])


def submit(run: RunDir, recipe: Recipe, cluster: Cluster, cluster_name: str, code: Path) -> Submission:
    """Submit held, write down, release.

    Raises:
        SlurmError: Slurm refused; nothing is left behind.
    """
    import submitit  # noqa: PLC0415  slow, and not needed by a dry run

    write_json(run.path / SETTINGS, {"code": str(code), **asdict(agent_settings(cluster))})
    folder = run.path / "slurm"
    folder.mkdir(mode=0o700, exist_ok=True)
    parameters = _parameters(run, recipe, cluster, code)
    sbatch_text(parameters, folder, python_command(cluster))  # its checks
    for name in [name for name in os.environ if name.startswith("SBATCH_")]:  # would win over the profile, silently
        say(f"{name}={os.environ.pop(name)} of your shell is left out; set it in the profile")
    executor = submitit.SlurmExecutor(folder, python=python_command(cluster))
    executor.update_parameters(**parameters)
    try:
        job = executor.submit(NodeAgent(str(run.path)))
    except submitit.core.utils.FailedJobError as error:
        raise SlurmError(f"Slurm refused the job: {error}") from None
    submission = _note(run, str(job.job_id), cluster_name, cluster.nodes, code)
    try:
        then.chain(run, cluster, code, submission.job_id)
    except SlurmError as error:
        say(f"what should follow the run was not submitted: {error}\nthe same command with --then tries it again")
    return submission


def submissions(run: RunDir) -> list[Submission]:
    """The jobs of a run, oldest first."""
    found = (read_json(path) for path in (run.path / "jobs").glob("*.json"))
    return sorted((Submission(**content) for content in found), key=lambda entry: entry.submitted)


def _note(run: RunDir, job_id: str, cluster: str, num_nodes: int, code: Path) -> Submission:
    """Write a held job down, then let it go."""
    submission = Submission(job_id, cluster, num_nodes, time.time(), str(code))
    write_json(run.path / "jobs" / f"{job_id}.json", asdict(submission))
    slurm.release(job_id)
    return submission


def _live(run: RunDir) -> tuple[Submission, JobState] | None:
    """The job that trains this run or will; adopts one that its submitter did not live to write down."""
    known = submissions(run)
    for submission in reversed(known):
        state = slurm.job_state(submission.job_id)
        if state.is_live:
            return submission, state
    if not (run.path / "run.json").exists():
        return None
    for job_id in slurm.jobs_with_comment(_comment(run)):
        if job_id not in {submission.job_id for submission in known}:
            say(f"job {job_id} was submitted for this run and never written down; it is now")
            settings = read_json(run.path / SETTINGS)
            state = slurm.job_state(job_id)
            return _note(run, job_id, "adopted", 0, Path(settings["code"])), state
    return None


def _check_may_start(run: RunDir, *, retry: bool, force: bool) -> None:
    """Refuse what a user should ask for by name.

    Raises:
        RunError: it is done, failed, or trained elsewhere.
    """
    path = run.path / "lock.json"
    if held := lock.holder(path):
        raise RunError(locked_message(run, lock.LockHeldError(path, held)))
    if run.done.exists() and not force:
        raise RunError(f"{run.path} is done already; --force trains on, with another recipe's fields say")
    failed = {rank: outcome for rank, outcome in run.outcomes().items() if outcome.get("status") == "failed"}
    if failed and not retry:
        rank, outcome = next(iter(failed.items()))
        raise RunError(
            f"{run.path}: the last attempt failed: rank {rank}: {outcome['message']}\n"
            "When the cause is removed: --retry goes on from the newest checkpoint."
        )


def check_size(recipe: Recipe, cluster: Cluster) -> None:
    """Refuse more processes than a step has units, unless the recipe allows it."""
    check_world_size(recipe.units_per_step, cluster.num_processes * cluster.nodes, recipe.allow_idle_ranks)


def _code(run: RunDir, *, renew: bool) -> Path:
    """The run's own copy of the code: the one that it has, unless it has none or a new one is asked for."""
    if not renew and (known := submissions(run)) and Path(known[-1].code).is_dir():
        return Path(known[-1].code)
    return snapshot.take(run.path / "code")


def _comment(run: RunDir) -> str:
    """Marks a run's jobs in Slurm."""
    return f"wavefleet:{run.run_id}"


def _parameters(run: RunDir, recipe: Recipe, cluster: Cluster, code: Path) -> dict[str, Any]:
    parameters = submitit_parameters(
        cluster, job_name=recipe.name, nodes=cluster.nodes, hold=True, comment=_comment(run)
    )
    # the working directory comes first among Python's paths: it must be the run's own code too
    parameters["additional_parameters"] = {**parameters.get("additional_parameters", {}), "chdir": str(code)}
    parameters["setup"] = [*parameters.get("setup", []), f"export PYTHONPATH={shlex.quote(str(code))}"]
    return parameters


def batch_text(run: RunDir, recipe: Recipe, cluster: Cluster) -> str:
    """What would be submitted; nothing is touched."""
    parameters = submitit_parameters(
        cluster, job_name=recipe.name, nodes=cluster.nodes, hold=True, comment="wavefleet:<run id>"
    )
    folder = run.path / "slurm"
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return sbatch_text(parameters, folder, command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe fields to change; cluster.key=value for the profile's"
    )
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, in place of the profile's")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch text, and touch nothing")
    parser.add_argument("--retry", action="store_true", help="go on with a run whose last attempt failed")
    parser.add_argument("--force", action="store_true", help="go on with a run that is done")
    parser.add_argument("--then", metavar="VERB,VERB", help="what follows when the run is done: evaluate, export")
    parser.add_argument("--allow-change", action="store_true", help="go on with a run that another recipe started")
    parser.add_argument("--update-code", action="store_true", help="copy today's code, in place of the run's own")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
