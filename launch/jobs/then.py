"""`wavefleet submit ... --then evaluate,export`: what follows a run once it is done, in a job that waits for the run's.

The job starts whenever the job that it waits for has ended, and looks at `done.json`. A run that is not done but has
another live job is waited for again; one that failed is left alone until a person retries it. What was asked for stays
with the run, so that whatever submits it again has it followed again.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from asr_train.errors import RecipeError, say
from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch.jobs import job
from launch.jobs.job import Command
from launch.jobs.task import Task
from launch.site import slurm
from launch.site.settings import JobSettings
from launch.site.slurm import SlurmError
from launch.site.snapshot import check_running

FOLLOWERS = ("evaluate", "export")
_AHEAD = ("waiting", "running")
_STATE = "then.json"  # in the folder: what was asked for, and how it went


def read_verbs(text: str) -> tuple[str, ...]:
    """`evaluate,export` -> the verbs.

    Raises:
        RecipeError: lists those that cannot follow a run.
    """
    verbs = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if unknown := [verb for verb in verbs if verb not in FOLLOWERS]:
        raise RecipeError(f"--then {text!r}: {', '.join(map(repr, unknown))} cannot; these can: {', '.join(FOLLOWERS)}")
    return verbs


def ask(run: RunDir, verbs: Sequence[str]) -> None:
    """Note what should follow a run; nothing where just that waits already."""
    found, wanted = describe(run), ",".join(verbs)
    if found is None or found["verbs"] != wanted or found["state"] not in _AHEAD:
        _note(run, verbs=wanted, state="asked for", job_id=None, message="")


def chain(run: RunDir, settings: JobSettings, job_id: str) -> None:
    """Submit what was asked for, to start when a job of the run has ended; nothing where nothing was, or it waits.

    Args:
        run: the run.
        settings: of its jobs.
        job_id: its newest job.

    Raises:
        SlurmError: Slurm refused; the run's own job is not touched.
    """
    wanted, folder, run_dir = describe(run), folder_of(run), str(run.path)
    if wanted is None:
        return
    verbs = wanted["verbs"].split(",")
    if states := job.live(folder):
        if [command.name for command in job.commands(folder)] == verbs:
            return
        job.drop(list(states))  # something else was asked for before
    cluster = job.on_one_node(settings.cluster, (), num_gpus=1)
    job.make_folder(folder, cluster)
    to_run = [Command(verb, f"asr_train.{verb}", (run_dir,)) for verb in verbs]
    job.write_job(folder, cluster, settings.site, settings.code, f"then {run.path.name}", to_run)
    _wait_for(run, job_id)


def describe(run: RunDir) -> dict[str, Any] | None:
    """What follows a run, as plain values: verbs, state, job_id, message; None when nothing does."""
    path = folder_of(run) / _STATE
    if not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    return found


def shown(run: RunDir) -> dict[str, Any] | None:
    """As `describe`, and whether a job that should wait is still there; our own files where Slurm does not answer."""
    found = describe(run)
    if found is not None and found["state"] in _AHEAD:
        with suppress(SlurmError):
            if not slurm.live_jobs([found["job_id"]]) and describe(run) == found:
                return {**found, "state": "gone", "message": "its job ended without a word, or was cancelled"}
    return found


def folder_of(run: RunDir) -> Path:
    """The job folder of what follows a run."""
    return run.path / "then"


def run_task(path: Path) -> None:
    """The job, called with the run's directory: do it, wait again, or leave it.

    Raises:
        CommandError: a command failed; the others were run all the same.
        SlurmError: the run goes on, and its job could not be waited for.
    """
    run, folder = RunDir(path), folder_of(RunDir(path))
    check_running(Path(read_json(folder / job.JOB)["code"]))
    if run.done.exists():
        _do(run)
        return
    other = None
    try:
        if (other := _living_job(run)) is not None:
            _wait_for(run, other)
    except SlurmError as error:
        where = f"goes on as job {other}, which" if other else "is not done, and a job of it"
        message = f"the run {where} could not be waited for: {error}"
        _note(run, state="lost", message=f"{message}\n`wavefleet submit` with --then tries it again")
        raise
    if other is not None:
        say(f"the run goes on as job {other}, which is waited for")
    else:
        failed = [outcome["message"] for outcome in run.outcomes().values() if outcome.get("status") == "failed"]
        why = f"the run is not done: {failed[0] if failed else 'no job of it is left'}"
        _note(run, state="left", message=f"{why}; nothing follows until a job of it ends well")
        say(f"{why}; nothing follows")


def _do(run: RunDir) -> None:
    folder = folder_of(run)
    _note(run, state="running")
    codes = {command.name: job.run_command(folder, command) for command in job.commands(folder)}
    failed = [f"{name} ended with {code}: {job.last_words(folder, name)}" for name, code in codes.items() if code]
    _note(run, state="failed" if failed else "done", message="\n".join(failed))
    if failed:
        raise job.CommandError("\n".join(failed))


def _wait_for(run: RunDir, job_id: str) -> None:
    """Submit the job so that it starts when another has ended: also badly, for that may not be the run's end."""
    (own,) = job.hold(folder_of(run), [Task(__name__, str(run.path))], after=f"afterany:{job_id}")
    _note(run, state="waiting", job_id=own, message=f"for job {job_id}")
    job.release(folder_of(run), [own])


def _living_job(run: RunDir) -> str | None:
    """The newest job of the run that is live; those that another program writes down meanwhile count too."""
    records = [read_json(path) for path in (run.path / "jobs").glob("*.json")]
    for record in sorted(records, key=lambda entry: entry["submitted"], reverse=True):
        if slurm.job_state(record["job_id"]).is_live:
            return str(record["job_id"])
    return None


def _note(run: RunDir, **facts: Any) -> None:
    """Add to what is known of this."""
    write_json(folder_of(run) / _STATE, {**(describe(run) or {}), **facts})
