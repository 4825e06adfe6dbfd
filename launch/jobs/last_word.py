"""What a job's batch script does where its node agents ended badly: judge what none of them lived to judge, and go on.

An agent that is killed takes its step along within seconds, and node 0's may be the one. The batch script, on the first
node, is no part of the step; `sbatch.last_word` is the shell lines that call this.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asr_train.errors import EXIT_DONE, run_main, say
from asr_train.run_dir import RunDir
from launch.child import Signals
from launch.ending.collect import conclude
from launch.ending.starts import starts, verdicts
from launch.jobs import continuation
from launch.jobs.notify import notify
from launch.jobs.submit import submissions
from launch.site import slurm
from launch.site.settings import JobSettings
from launch.verdict import Verdict


def main(argv: Sequence[str]) -> int:
    """Speak for the job that this is called in."""
    with (signals := Signals()).installed():
        speak(RunDir(Path(argv[0])), os.environ["SLURM_JOB_ID"], signals)
    return EXIT_DONE


def speak(run: RunDir, job_id: str, signals: Signals) -> None:
    """Judge the job's last start, unless that is done, and see to it that the run goes on where it may.

    Args:
        run: the run.
        job_id: the job that this is called from; its agents have ended.
        signals: of this process.

    Raises:
        SlurmError: Slurm does not answer.
    """
    job = slurm.job_state(job_id)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    start = next((start for start in reversed(starts(run)) if start.job_id == job_id), None)
    if job.state != "RUNNING" or start is None or start.name.split(".")[1] != str(restarts):
        return  # Slurm ended it or puts it back, or the agents did not come so far as to begin
    written = [line for line in verdicts(run) if line["start"] == start.name]
    verdict = Verdict.from_json(written[-1]) if written else conclude(run, start)
    if not written:
        say(f"{verdict.kind}: {verdict.message}")
    settings = JobSettings.read(run)
    if any(entry.job_id != job_id for entry in submissions(run)[-1:]):
        return  # another job follows
    wanted = verdict.goes_on and settings.continuation != "none"
    if wanted and continuation.go_on(run, settings, job_id, verdict, signals, restarts=restarts):
        return
    if not written:
        notify(run, verdict)


if __name__ == "__main__":
    sys.exit(run_main(main))
