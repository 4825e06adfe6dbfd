"""`wavefleet submit RECIPE --cluster P`: a run directory with its own copy of the code, and one job that trains in it.

A job is submitted held, written down, then released: a submitter that is killed in between leaves a held job whose
comment names the run, and the next call adopts it.
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asr_train import lock
from asr_train.config import Recipe
from asr_train.data.world_size import check_world_size
from asr_train.errors import EXIT_DONE, RunError, say
from asr_train.files import read_json, write_json
from asr_train.recipe import load_recipe, run_directory
from asr_train.run_dir import RunDir, locked_message
from launch.ending.starts import retried
from launch.jobs import then
from launch.jobs.task import Task
from launch.runs import open_run
from launch.site import exclusions, hub_cache, signal_lead, slurm, snapshot
from launch.site.cluster import load_cluster, site_folder, split_changes
from launch.site.cluster_config import Cluster
from launch.site.findings import continuation, findings
from launch.site.sbatch import last_word, python_command, sbatch_text, submitit_parameters, without_slurm_variables
from launch.site.settings import JobSettings, of_submission, settings_file
from launch.site.slurm import JobState, SlurmError

_MAIL = "END,FAIL,INVALID_DEPEND"  # not REQUEUE: a run that goes on needs nobody
_PRIVATE, _READABLE = 0o700, 0o755


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
    fetch: bool = True  # from the hub, into the profile's cache
    followers: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Submit a training, or say which job does it already."""
    options = _parser().parse_intermixed_args(argv)
    overrides, changes = split_overrides(options)
    if options.mail:
        changes += [f"sbatch.mail-user={options.mail}", f"sbatch.mail-type={_MAIL}"]
    recipe = load_recipe(options.recipe, overrides)
    cluster = load_cluster(options.cluster, changes)
    run = RunDir(run_directory(recipe))
    check_size(recipe, cluster)
    _warn_of_lead(run, cluster)
    if options.dry_run:
        print(text(run, recipe, cluster, exclude=kept_off(cluster, options.cluster)), end="")
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
    if live := live_job(run):
        if wishes.followers:
            then.ask(run, wishes.followers)
        then.chain(run, JobSettings.read(run), live[0].job_id)
        return f"{run.path}: job {live[0].job_id} is {live[1].state} already"
    check_may_start(run, retry=wishes.retry, force=wishes.force)
    run.claim(recipe, allow_change=wishes.allow_change)
    if wishes.force:
        run.done.unlink(missing_ok=True)
    if wishes.retry:
        retried(run)
    if wishes.followers:
        then.ask(run, wishes.followers)
    settings = JobSettings(
        code=_code(run, renew=wishes.update_code),
        cluster_name=cluster_name,
        cluster=cluster,
        continuation=continuation(cluster, findings(cluster, cluster_name)),
    )
    if wishes.fetch:
        hub_cache.fill([str(run.path / "recipe.yaml")], recipe, cluster)
    return f"{run.path}: submitted as job {submit(run, settings).job_id}"


def retry(argv: Sequence[str]) -> int:
    """`wavefleet retry RUN`: another job for a run that ended, with its own recipe, profile and code."""
    options = _retry_parser().parse_args(argv)
    run = open_run(options.run)
    settings = of_submission(run)
    if live := live_job(run):
        print(f"{run.path}: job {live[0].job_id} is {live[1].state} already")
        return EXIT_DONE
    check_may_start(run, retry=True, force=False)
    cluster = settings.cluster if options.nodes is None else replace(settings.cluster, nodes=options.nodes)
    check_size(run.recipe(), cluster)
    _warn_of_lead(run, cluster)
    retried(run)
    settings = replace(
        settings,
        cluster=cluster,
        code=_code(run, renew=options.update_code),
        continuation=continuation(cluster, findings(cluster, settings.cluster_name)),  # doctor may have looked again
    )
    submission = submit(run, settings)
    print(f"{run.path}: submitted as job {submission.job_id}")
    return EXIT_DONE


def split_overrides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What the command line changes of the recipe, and of the profile."""
    recipe, cluster = split_changes(options.overrides)
    recipe += [] if options.name is None else [f"name={json.dumps(options.name)}"]  # quoted: 007 is no number
    return recipe, cluster + ([] if options.nodes is None else [f"nodes={options.nodes}"])


def submit(
    run: RunDir, settings: JobSettings, *, exclude: Sequence[str] = (), after: str | None = None, begin_in_s: float = 0
) -> Submission:
    """Submit held, write down, release.

    Args:
        run: the run, its recipe written.
        settings: what its jobs are like.
        exclude: nodes that the job shall not get.
        after: a job that ends first.
        begin_in_s: not before so many seconds.

    Raises:
        SlurmError: Slurm refused; nothing is left behind.
    """
    import submitit  # noqa: PLC0415  slow, and not needed by a dry run

    cluster = settings.cluster
    run.path.chmod(_PRIVATE if cluster.private else _READABLE)
    settings.write(run)
    folder = run.path / "slurm"
    folder.mkdir(exist_ok=True)
    folder.chmod(_PRIVATE if cluster.private else _READABLE)  # what is pickled there is run: nobody else may write
    parameters = _parameters(
        run, run.recipe().name, cluster, settings.code, exclude=avoided(settings, exclude), after=after
    )
    if begin_in_s:
        parameters["additional_parameters"]["begin"] = f"now+{begin_in_s:.0f}"
    sbatch_text(parameters, folder, python_command(cluster))  # its checks
    executor = submitit.SlurmExecutor(folder, python=python_command(cluster))
    executor.update_parameters(**parameters)
    with without_slurm_variables():
        try:
            job = executor.submit(Task("launch.node_agent", str(run.path)))
        except submitit.core.utils.FailedJobError as error:
            raise SlurmError(f"Slurm refused the job: {error}") from None
    return _note(run, str(job.job_id), settings)


def avoided(settings: JobSettings, exclude: Sequence[str]) -> list[str]:
    """These nodes, and those that are excluded on this cluster now; said."""
    cluster, name = settings.cluster, settings.cluster_name
    found = exclusions.to_avoid(settings.site, cluster.partition, cluster.nodes, cluster.constraint)
    if found:
        say(f"without {', '.join(found)}; `wavefleet nodes --cluster {shlex.quote(name)}` says why")
    return sorted({*exclude, *found})


def kept_off(cluster: Cluster, cluster_name: str) -> list[str]:
    """The nodes that a job would be submitted without now."""
    site = site_folder(cluster, cluster_name)
    return sorted(exclusions.to_show(site, cluster.partition, cluster.nodes, cluster.constraint))


def submissions(run: RunDir) -> list[Submission]:
    """The jobs of a run, oldest first."""
    found = (read_json(path) for path in (run.path / "jobs").glob("*.json"))
    return sorted((Submission(**content) for content in found), key=lambda entry: entry.submitted)


def _note(run: RunDir, job_id: str, settings: JobSettings) -> Submission:
    """Write a held job down, then let it go."""
    submission = Submission(job_id, settings.cluster_name, settings.cluster.nodes, time.time(), str(settings.code))
    write_json(run.path / "jobs" / f"{job_id}.json", asdict(submission))
    let_go(run, job_id, settings)
    return submission


def let_go(run: RunDir, job_id: str, settings: JobSettings) -> None:
    """Release a job that was written down, and before that submit what should follow the run."""
    try:
        then.chain(run, settings, job_id)
    except SlurmError as error:  # the run's own job is there
        say(f"what should follow the run was not submitted: {error}\nthe same command with --then tries it again")
    finally:
        slurm.release(job_id)


def live_job(run: RunDir) -> tuple[Submission, JobState] | None:
    """The job that trains this run or will; one that its submitter did not live to write down or release is, here."""
    for submission in reversed(submissions(run)):
        job_id = submission.job_id
        state = slurm.job_state(job_id)
        if state.is_live and state.reason == slurm.HELD:
            say(f"job {job_id} was left held; it is released now")
            let_go(run, job_id, JobSettings.read(run))
            return submission, slurm.job_state(job_id)
        if state.is_live:
            return submission, state
    for job_id in orphans(run):
        say(f"job {job_id} was submitted for this run and never written down; it is now")
        return adopt(run, job_id), slurm.job_state(job_id)
    return None


def orphans(run: RunDir) -> list[str]:
    """Live jobs of this run that nobody lived to write down."""
    if not settings_file(run).exists():
        return []
    known = {submission.job_id for submission in submissions(run)}
    return [job_id for job_id in slurm.jobs_with_comment(_comment(run)) if job_id not in known]


def adopt(run: RunDir, job_id: str) -> Submission:
    """Write an orphan down, and let it go."""
    return _note(run, job_id, JobSettings.read(run))


def check_may_start(run: RunDir, *, retry: bool, force: bool) -> None:
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
    """Refuse more processes than a step has units."""
    fewer = f"ask for fewer with --nodes or cluster.{'gpus' if cluster.gpus_per_node else 'processes'}_per_node"
    num_processes = cluster.num_processes * cluster.nodes
    check_world_size(recipe.units_per_step, num_processes, recipe.allow_idle_ranks, fewer=fewer)


def _code(run: RunDir, *, renew: bool) -> Path:
    """The run's own copy of the code: the one that it has, unless it has none or a new one is asked for."""
    return snapshot.take(run.path / "code") if renew else _own_code(run) or snapshot.take(run.path / "code")


def _warn_of_lead(run: RunDir, cluster: Cluster) -> None:
    if problem := signal_lead.problem_of(run, cluster.signal_lead_s):
        say(f"warning: {problem}")


def _own_code(run: RunDir) -> Path | None:
    """The copy that the run's last job had."""
    known = submissions(run)
    return Path(known[-1].code) if known and Path(known[-1].code).is_dir() else None


def code_of(run: RunDir) -> Path:
    """Where the code of a run's next job is, or would be copied to; nothing is touched."""
    return _own_code(run) or snapshot.where(run.path / "code")


def _comment(run: RunDir) -> str:
    """Marks a run's jobs in Slurm; one that was never submitted has no number yet."""
    return f"wavefleet:{run.run_id if (run.path / 'run.json').exists() else '<run id>'}"


def _parameters(
    run: RunDir, name: str, cluster: Cluster, code: Path, *, exclude: Sequence[str] = (), after: str | None = None
) -> dict[str, Any]:
    """What submitit is told of a job of a run, which is called `name`."""
    parameters = submitit_parameters(
        cluster,
        job_name=name,
        nodes=cluster.nodes,
        hold=True,
        comment=_comment(run),
        exclude=exclude,
        dependency=None if after is None else f"afterany:{after}",
    )
    # the working directory comes first among Python's paths: it must be the run's own code too
    parameters["additional_parameters"] = {**parameters.get("additional_parameters", {}), "chdir": str(code)}
    parameters["setup"] = [
        *parameters.get("setup", []),
        f"export PYTHONPATH={shlex.quote(str(code))}",
        *last_word(cluster, run.path),
    ]
    return parameters


def text(run: RunDir, recipe: Recipe, cluster: Cluster, *, exclude: Sequence[str] = ()) -> str:
    """The batch script that would be submitted, without some nodes; nothing is touched."""
    parameters = _parameters(run, recipe.name, cluster, code_of(run), exclude=exclude)
    folder = run.path / "slurm"
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return sbatch_text(parameters, folder, command)


def _retry_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet retry", description=retry.__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name in runs/")
    parser.add_argument("--nodes", type=int, metavar="N", help="another number of nodes")
    parser.add_argument("--update-code", action="store_true", help="copy today's code, in place of the run's own")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe fields to change; cluster.key=value for the profile's"
    )
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes, in place of the profile's")
    parser.add_argument("--name", metavar="S", help="the name of run and corpus, in place of the recipe's")
    parser.add_argument("--mail", metavar="ADDRESS", help="Slurm writes there when the job ends or fails for good")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch text, and touch nothing")
    parser.add_argument("--retry", action="store_true", help="go on with a run whose last attempt failed")
    parser.add_argument("--force", action="store_true", help="go on with a run that is done")
    parser.add_argument("--then", metavar="VERB,VERB", help="what follows when the run is done: evaluate, export")
    parser.add_argument("--allow-change", action="store_true", help="go on with a run that another recipe started")
    parser.add_argument("--update-code", action="store_true", help="copy today's code, in place of the run's own")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
