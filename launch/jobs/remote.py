"""`wavefleet evaluate ... --cluster P` and `transcribe ... --cluster P`: the same command, as a job of one node.

All other arguments are the command's own, and mean there what they mean here: the job starts in the same folder.
"""

import argparse
import codecs
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from asr_train.errors import EXIT_DONE, EXIT_FAILED, RunError, say, warn
from asr_train.files import hash_json
from launch.jobs import job
from launch.jobs.job import Command
from launch.site import slurm, snapshot
from launch.site.cluster import load_cluster, site_folder
from launch.site.slurm import JobState, SlurmError

_POLL_S = 2.0
_WORD_S = 30.0  # for a file that a node has written to be seen here


def evaluate(argv: Sequence[str]) -> int:
    """Score a run or a model as a job."""
    return _run("evaluate", argv)


def transcribe(argv: Sequence[str]) -> int:
    """Transcribe files as a job."""
    return _run("transcribe", argv)


def _run(verb: str, argv: Sequence[str]) -> int:
    """Submit a command, or say which job runs it already; with --wait its exit code is ours."""
    options, rest = _parser(verb).parse_known_args(argv)
    changes = [text.removeprefix("cluster.") for text in rest if _is_change(text)]
    arguments = tuple(text for text in rest if not _is_change(text))
    subject = next((Path(text) for text in arguments if not text.startswith("-") and Path(text).exists()), None)
    if subject is None:
        raise RunError(f"{verb} {' '.join(arguments)}: none of these is a file or folder here")
    cluster = job.on_one_node(load_cluster(options.cluster, changes), changes, num_gpus=1)
    folder = _folder(verb, subject, arguments)
    name, site = f"{verb} {subject.absolute().name}", site_folder(cluster, options.cluster)
    if options.dry_run:
        print(job.batch_text(cluster, site, folder, name), end="")
        return EXIT_DONE
    with job.submitting(folder, cluster):
        if states := job.live(folder):
            job_id = next(iter(states))
            say(f"{job.shown(states)} already; {_where(folder, verb)}")
        else:
            code = snapshot.take(folder / "code")
            command = Command(verb, f"asr_train.{verb}", arguments)
            job.write_job(folder, cluster, site, code, name, [command])
            (job_id,) = job.hold(folder, [job.task(folder, verb)])
            job.release(folder, [job_id])
            say(f"submitted as job {job_id}; {_where(folder, verb)}")
    if not options.wait:
        print(job_id)
        return EXIT_DONE
    try:
        return follow(folder, verb, job_id)
    except KeyboardInterrupt:
        say(f"job {job_id} goes on; `scancel {job_id}` ends it")
        return 130


class _Tail:
    """Shows what is added to a file; all of it again once it began anew, as a job does that was put back."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path, self._stream = path, stream
        self._begin()

    def _begin(self) -> None:
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._seen:
                self._begin()
            file.seek(self._seen)
            data = file.read()
        self._seen += len(data)
        self._stream.write(self._decoder.decode(data))
        self._stream.flush()


def follow(folder: Path, name: str, job_id: str) -> int:
    """Show what a command of a job writes, until it has ended; its exit code, 4 when it was ended from outside."""
    tails = [_Tail(folder / f"{name}.out", sys.stdout), _Tail(folder / f"{name}.err", sys.stderr)]
    said, gone_since = "", None
    while True:
        exit_code = job.ended(folder, name)  # before its last lines are read
        for tail in tails:
            tail.show()
        if exit_code is not None:
            return exit_code
        try:
            state = slurm.job_state(job_id)
        except SlurmError as error:  # the job may well go on
            state = JobState("UNREACHABLE", str(error))
        shown = f"{state.state.lower()}{f', {state.reason}' if state.state == 'PENDING' else ''}"
        if shown != said:
            said = shown
            say(f"job {job_id}: {shown}")
        if state.is_live or state.state == "UNREACHABLE":
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > _WORD_S:
            warn(f"error: job {job_id} was ended from outside ({state.state}), before its command had ended")
            return EXIT_FAILED
        time.sleep(_POLL_S)


def _is_change(text: str) -> bool:
    return text.startswith("cluster.") and "=" in text


def _folder(verb: str, subject: Path, arguments: Sequence[str]) -> Path:
    """The same for the same command from the same folder."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", subject.absolute().name)[:60]
    return Path.cwd() / "jobs" / f"{verb}-{name}-{hash_json([str(Path.cwd()), *arguments])[:8]}"


def _where(folder: Path, verb: str) -> str:
    return f"what it prints: {folder / f'{verb}.out'}"


def _evaluate_parser() -> argparse.ArgumentParser:
    return _parser("evaluate")


def _transcribe_parser() -> argparse.ArgumentParser:
    return _parser("transcribe")


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"wavefleet {verb}",
        usage=f"wavefleet {verb} ... --cluster P [cluster.key=value ...] [--wait] [--dry-run]",
        description="The same command as a job of one node of a Slurm cluster; all else is as without --cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", required=True, metavar="P", help="a cluster profile: a file, or a shipped one")
    parser.add_argument("--wait", action="store_true", help="show what the job prints, and end with its exit code")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch text, and touch nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
