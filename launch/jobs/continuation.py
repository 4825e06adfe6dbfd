"""How a run goes on after its job: the job back in the queue, or another job; called by node 0 of the job that ends."""

import time
from collections.abc import Callable

from asr_train.errors import say
from asr_train.run_dir import RunDir
from launch.child import Signals
from launch.jobs.submit import avoided, submit
from launch.site import slurm
from launch.site.settings import JobSettings
from launch.site.slurm import SlurmError
from launch.verdict import Verdict

_PATIENCE_S = 600.0  # for a controller that does not answer
_PAUSE_S = 15.0
_POLL_S = 0.1
_END_S = 60.0  # for Slurm to end a job that was put back into the queue


def go_on(
    run: RunDir, settings: JobSettings, job_id: str, verdict: Verdict, signals: Signals, *, restarts: int
) -> bool:
    """See to it that another job follows; whether one does.

    Args:
        run: the run.
        settings: of its jobs.
        job_id: the job that this is called from.
        verdict: on the attempt that ended; says how long to wait, and which nodes to avoid.
        signals: of this process; Slurm ends it by one when it puts the job back.
        restarts: how often the job had been put back into the queue when this began.
    """
    exclude = sorted(entry.host for entry in verdict.exclude_hosts)

    def requeue() -> None:
        job = slurm.job_state(job_id)
        if job.state == "RUNNING":
            try:
                slurm.requeue(job_id, exclude=avoided(settings, exclude), begin_in_s=verdict.wait_s)
            except SlurmError as error:
                if error.is_silence or slurm.job_state(job_id).restarts == restarts:
                    raise
                say(str(error))  # it is in the queue all the same, and another job would be one too many
        elif job.restarts == restarts:  # else Slurm has put it back by itself
            raise SlurmError(f"job {job_id} is {job.state} and cannot be put back into the queue")

    def successor() -> None:
        new = submit(run, settings, exclude=exclude, after=job_id, begin_in_s=verdict.wait_s)
        say(f"{run.path} goes on as job {new.job_id}")

    for way in (requeue, successor) if settings.continuation == "requeue" else (successor,):
        try:
            _patiently(way)
        except SlurmError as error:
            say(str(error))
            continue
        if way is requeue:
            _wait_for_the_end(signals)
        return True
    say(f"{run.path} does not go on by itself: `wavefleet reconcile --act`, or `wavefleet retry`, where Slurm lets it")
    return False


def _patiently(act: Callable[[], None]) -> None:
    """Do it, again and again while the controller does not answer.

    Raises:
        SlurmError: it answered no; or it never did.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            act()
        except SlurmError as error:
            if not error.is_silence or time.monotonic() > until:
                raise
            say(f"{error}; trying again")
            time.sleep(_PAUSE_S)
        else:
            return


def _wait_for_the_end(signals: Signals) -> None:
    """Until Slurm ends this process; one that ended before would have its job count as completed."""
    seen, until = signals.count, time.monotonic() + _END_S
    while signals.count == seen and time.monotonic() < until:
        time.sleep(_POLL_S)
