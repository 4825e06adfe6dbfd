"""`wavefleet reconcile [FOLDER] [--act]`: looks after runs whose jobs are gone; safe from cron.

A job that was killed with its agents, a submitter that died, a controller that did not answer when a job wanted to go
on: each leaves a run that should go on and does not. Without --act this only says what would be done.
"""

import argparse
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from asr_train import lock
from asr_train.errors import EXIT_DONE, EXIT_FAILED, RunError, WavefleetError, say
from asr_train.run_dir import RunDir
from launch.ending.collect import conclude, judged
from launch.ending.starts import Start, starts, verdicts
from launch.jobs.submit import adopt, let_go, orphans, submissions, submit
from launch.site import slurm
from launch.site.settings import JobSettings
from launch.verdict import Verdict

_RETRY = "`wavefleet retry` tries again"


@dataclass(frozen=True)
class Finding:
    """What is to be done about a run, and why.

    Attributes:
        run: its name.
        action: `adopt` a job that nobody wrote down, `release` one that was left held, `submit` another, or `nothing`.
        why: for a person.
        job_id: the job that it was done to; None where nothing was.
    """

    run: str
    action: str
    why: str
    job_id: str | None = None


def main(argv: Sequence[str]) -> int:
    """Look after every run of a folder; 4 where one could not be looked after."""
    options = _parser().parse_args(argv)
    folder = Path(options.folder)
    with _alone(folder) as is_alone:
        if not is_alone:
            say(f"another reconcile looks after {folder} now")
            return EXIT_DONE
        found = [_safely(RunDir(path.parent.absolute()), act=options.act) for path in folder.glob("*/launch.json")]
    found.sort(key=lambda finding: finding.run)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2, ensure_ascii=False))
    else:
        for finding in found:
            done = f" -> job {finding.job_id}" if finding.job_id else ""
            print(f"{finding.run}: {finding.action}{done}: {finding.why}")
    return EXIT_FAILED if any(finding.action == "failed" for finding in found) else EXIT_DONE


def _safely(run: RunDir, *, act: bool) -> Finding:
    """One run that cannot be looked after does not keep the others from it."""
    try:
        return look_after(run, act=act)
    except (WavefleetError, OSError, ValueError) as error:
        return Finding(run.path.name, "failed", str(error))


def look_after(run: RunDir, *, act: bool) -> Finding:
    """What is to be done about a run; done, where `act` is set."""
    name = run.path.name
    jobs = [(entry.job_id, slurm.job_state(entry.job_id)) for entry in submissions(run)]
    live = [(job_id, state) for job_id, state in jobs if state.is_live]
    if live:
        job_id, state = live[-1]
        if state.reason != slurm.HELD:
            return Finding(name, "nothing", f"job {job_id} is {state.state}")
        if act:
            let_go(run, job_id, JobSettings.read(run))
        return Finding(name, "release", f"job {job_id} was left held", job_id if act else None)
    if missed := orphans(run):
        why = f"job {missed[0]} was submitted for it and never written down"
        return Finding(name, "adopt", why, adopt(run, missed[0]).job_id if act else None)
    settings = JobSettings.read(run)
    if settings.is_of_allocation:  # its batch job may be in the queue, and no record of it is kept
        return Finding(name, "nothing", "it was trained in an allocation, and goes on there")
    if lock.holder(run.path / "lock.json") is not None:
        return Finding(name, "nothing", "it is being trained outside of Slurm")
    known = starts(run)
    if jobs and (not known or known[-1].job_id != jobs[-1][0]):  # cancelled in the queue, or its set-up lines failed
        return Finding(name, "nothing", f"job {jobs[-1][0]} ended as {jobs[-1][1].state} before it began; {_RETRY}")
    if not known:
        return Finding(name, "nothing", f"it was never submitted; {_RETRY}")
    start = known[-1]
    slurm_state = jobs[-1][1].state if jobs else None
    verdict = _verdict(run, start, slurm_state, act=act)
    if not verdict.goes_on or settings.continuation == "none":
        return Finding(name, "nothing", f"{verdict.kind}: {verdict.message}")
    submission = submit(run, settings, exclude=[entry.host for entry in verdict.exclude_hosts]) if act else None
    return Finding(name, "submit", f"{verdict.kind}: {verdict.message}", submission.job_id if submission else None)


def _verdict(run: RunDir, start: Start, slurm_state: str | None, *, act: bool) -> Verdict:
    """The verdict on the last start: the one that was written, or what follows from what is known."""
    written = [line for line in verdicts(run) if line["start"] == start.name]
    if written:
        return Verdict.from_json(written[-1])
    if act:
        return conclude(run, start, slurm_state=slurm_state)
    return judged(run, start, slurm_state=slurm_state)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether this is the only reconcile of the folder; two would submit twice."""
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder")
    with (folder / ".reconcile.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wavefleet reconcile", description="Looks after runs whose jobs are gone.", allow_abbrev=False
    )
    parser.add_argument("folder", nargs="?", default="runs", help="the folder that runs are in (%(default)s)")
    parser.add_argument("--act", action="store_true", help="do it; else it is only said")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
