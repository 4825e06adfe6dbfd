"""`wavefleet logs RUN`: what the ranks and the node agents wrote, of any attempt; who failed first; what comes next."""

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from asr_train import lock
from asr_train.errors import EXIT_DONE, RunError
from asr_train.run_dir import RunDir
from launch.ending import collect, evidence, signs
from launch.ending.evidence import Cause, where
from launch.ending.signs import Sign
from launch.ending.starts import Start, starts, verdicts
from launch.jobs.submit import submissions
from launch.log_files import LogFile, Reader, log_files
from launch.runs import open_run
from launch.site import slurm
from launch.site.slurm import SlurmError
from launch.verdict import Evidence, Verdict

_POLL_S = 0.5
_ASK_SLURM_S = 10.0
_ALIVE_S = 30.0  # an agent's heart beats every 5 s; a training holds its lock so long after its start
_NUM_BEFORE: Final = 30  # lines before an error
_NUM_AFTER: Final = 5
_NUM_LAST = 5000  # lines at the end of a log that an error is looked for in


def main(argv: Sequence[str]) -> int:
    """Print what an attempt wrote."""
    options = _parser().parse_args(argv)
    run = open_run(options.run)
    start = None if options.attempt is None else _start_of(run, options.attempt)
    if options.follow:
        try:
            _follow(run, start, options.rank)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return EXIT_DONE
    known = starts(run)
    if not known:
        raise RunError(f"{run.path} has no logs: neither a job nor `wavefleet train` has started it yet")
    chosen = start or known[-1]
    if options.first_error:
        for line in first_error(run, chosen):
            print(line)
        return EXIT_DONE
    found = _of_rank(log_files(run, chosen), options.rank, chosen)
    _read({}, found, options.rank, is_last=True)
    return EXIT_DONE


def first_error(run: RunDir, start: Start) -> Iterator[str]:
    """Lines that tell which rank of a start failed first, and its log around the error.

    The verdict knows best; before there is one, its rules are asked.
    """
    written = [line for line in verdicts(run) if line["start"] == start.name]
    verdict = Verdict.from_json(written[-1]) if written else None
    first = _named(verdict) or _first(collect.evidence(run, start))
    if first is None:
        yield "no rank says that it failed" if verdict is None else f"{verdict.kind}: {verdict.message}"
        return
    yield f"{where(first.rank, first.host)} failed first: {first.sign.text}"
    stacks = start.hangs(run) / f"rank-{first.rank}.txt"
    if stacks.exists():
        yield from ("", str(stacks), *stacks.read_text(encoding="utf-8").splitlines())
    for file in log_files(run, start):
        if file.rank == first.rank:
            last = deque(Reader(file).read(is_last=True), maxlen=_NUM_LAST)
            yield from ("", str(file.path), *_around(list(last), first.sign.text))


def _named(verdict: Verdict | None) -> Cause | None:
    """The rank that a verdict names."""
    if verdict is None or verdict.rank is None:
        return None
    said = verdict.evidence[0].text if verdict.evidence else verdict.kind
    return Cause(verdict.rank, verdict.host, None, Sign("failed", said))


def _first(known: Evidence) -> Cause | None:
    """The first failure by the rules of verdicts, else the first rank with anything like an error in its log."""
    attempt = evidence.sort(known)
    if causes := (*attempt.causes, *attempt.lost):
        return causes[0]
    for rank, text in known.tails.items():
        if error := signs.last_error(text):
            return Cause(rank, evidence.host_of(known, rank), None, Sign("failed", error))
    return None


def _around(lines: Sequence[str], said: str) -> Sequence[str]:
    """The lines of a log around an error; its last ones where it does not stand there."""
    beginning = said.rstrip("…").partition("\n")[0]
    named = (index for index in reversed(range(len(lines))) if beginning and beginning in lines[index])
    at = next(named, len(lines) - 1)
    return lines[max(0, at - _NUM_BEFORE) : at + 1 + _NUM_AFTER]


def _start_of(run: RunDir, attempt: int) -> Start:
    if not 1 <= attempt <= run.newest_attempt():
        raise RunError(f"--attempt {attempt}: {run.path} has {run.newest_attempt()} attempts")
    found = next((start for start in starts(run) if start.attempt(run) == attempt), None)
    if found is None:
        raise RunError(f"--attempt {attempt}: `accelerate launch` made it by hand; it wrote where it was started")
    return found


def _of_rank(found: Sequence[LogFile], rank: int | None, start: Start) -> list[LogFile]:
    if rank is None:
        if not found:
            raise RunError(f"{start.name} has no log: a single process writes where `wavefleet train` was started")
        return list(found)
    chosen = [file for file in found if file.rank == rank]
    if not chosen:
        ranks = sorted({file.rank for file in found if file.rank is not None})
        known = f"there are ranks {ranks[0]} to {ranks[-1]}" if ranks else "a single process has none; leave --rank out"
        raise RunError(f"--rank {rank}: {start.name} has no log of that rank; {known}")
    return chosen


# --- following ---------------------------------------------------------------------------------------------------


def _follow(run: RunDir, only: Start | None, rank: int | None) -> None:
    """Print what was written and what is from now on, of one start, or of the newest one at any time."""
    readers: dict[LogFile, Reader] = {}
    life = _Life(run)
    shown: Start | None = None
    while True:
        known = starts(run)
        current = only or (known[-1] if known else None)
        is_over = (only is not None and only != known[-1]) or not life.goes_on()
        if shown is not None and current is not None and current != shown:
            _read(readers, log_files(run, shown), rank, is_last=True)
            print(f"--- {current.name} ---", flush=True)
        if current is not None:
            _read(readers, log_files(run, current), rank, is_last=is_over)
            shown = current
        if is_over:
            return
        time.sleep(_POLL_S)


def _read(readers: dict[LogFile, Reader], found: Sequence[LogFile], rank: int | None, *, is_last: bool) -> None:
    """Print what is new in every file."""
    chosen = [file for file in found if rank is None or file.rank == rank]
    several = len({file.label for file in chosen}) > 1
    for file in chosen:
        for line in readers.setdefault(file, Reader(file)).read(is_last=is_last):
            print(f"{file.label} | {line}" if several else line, flush=True)


class _Life:
    """Whether anything more will be written in a run; Slurm is asked now and then only."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked_s = -_ASK_SLURM_S
        self._answer = False

    def goes_on(self) -> bool:
        """A process trains, an agent lives, a start is due, or a job waits; True also when Slurm does not answer."""
        run = self._run
        if lock.holder(run.path / "lock.json") is not None or any(map(_beats, run.path.glob("agents/*/node-*.json"))):
            return True
        if _is_due(run):
            return True
        now_s = time.monotonic()
        if now_s - self._asked_s >= _ASK_SLURM_S:
            self._asked_s = now_s
            jobs = submissions(run)
            try:
                self._answer = bool(jobs) and slurm.job_state(jobs[-1].job_id).is_live
            except SlurmError:
                self._answer = True
        return self._answer


def _is_due(run: RunDir) -> bool:
    """Whether a start has just begun, and nobody trains yet, or is to follow soon on one that failed."""
    last = max((start.time for start in starts(run)), default=0.0)
    for line in verdicts(run):
        if line["time"] >= last:
            verdict = Verdict.from_json(line)
            last = line["time"] + verdict.wait_s if verdict.goes_on else 0.0
    return time.time() - last < _ALIVE_S


def _beats(path: Path) -> bool:
    """Whether an agent's heart beats that has not let its nodes go yet."""
    if (path.parent / "decided").exists():
        return False
    return time.time() - path.stat().st_mtime < _ALIVE_S


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet logs", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name in runs/")
    parser.add_argument("--rank", type=int, metavar="R", help="of this rank only")
    parser.add_argument("--attempt", type=int, metavar="A", help="of this attempt; the newest one if not given")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--follow", action="store_true", help="go on with what is written, until the run ends")
    form.add_argument("--first-error", action="store_true", help="the rank that failed first, and its last lines")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
