"""`wavefleet logs RUN`: what the ranks and the node agents wrote, of any attempt; who failed first; what comes next."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from asr_train import lock
from asr_train.errors import EXIT_DONE, RunError
from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir
from launch import evidence, log_files, signs, slurm
from launch.evidence import Cause, where
from launch.log_files import Source, attempt_of, launches, sources
from launch.node_agent import VERDICTS
from launch.runs import open_run
from launch.signs import Sign
from launch.slurm import SlurmError
from launch.submit import submissions
from launch.verdict import Evidence, NodeReport, Verdict

_POLL_S = 0.5
_ASK_SLURM_S = 10.0
_ALIVE_S = 30.0  # an agent's heart beats every 5 s
_NUM_BEFORE: Final = 30  # lines before an error
_NUM_AFTER: Final = 5


def main(argv: Sequence[str]) -> int:
    """Print what an attempt wrote."""
    options = _parser().parse_args(argv)
    run = open_run(options.run)
    launch = None if options.attempt is None else _launch_of(run, options.attempt)
    if options.follow:
        try:
            _follow(run, launch, options.rank)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return EXIT_DONE
    known = launches(run)
    if launch is None and not known:
        raise RunError(f"{run.path} has no logs: no node agent has started it yet")
    chosen = launch or known[-1]
    if options.first_error:
        for line in first_error(run, chosen):
            print(line)
        return EXIT_DONE
    found = _of_rank(sources(run, chosen), options.rank, chosen)
    several = len({source.label for source in found}) > 1
    for source in found:
        with source.path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            for text in stream:
                _print(source, text, several=several)
    return EXIT_DONE


def first_error(run: RunDir, launch: str) -> Iterator[str]:
    """Lines that tell which rank of a launch failed first, and its log around the error.

    The verdict on the launch knows best; before there is one, the same rules are asked.
    """
    files = sources(run, launch)
    verdict = _verdict(run, launch)
    first = _named(verdict) or _first(_evidence(run, launch, files))
    if first is None:
        yield "no rank says that it failed" if verdict is None else f"{verdict.kind}: {verdict.message}"
        return
    yield f"{where(first.rank, first.host)} failed first: {first.sign.text}"
    stacks = run.path / "hangs" / launch / f"rank-{first.rank}.txt"
    for path in [stacks, *(source.path for source in files if source.rank == first.rank)]:
        if lines := _around(log_files.tail(path), first.sign.text):
            yield f"\n{path}"
            yield from lines


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


def _evidence(run: RunDir, launch: str, files: Sequence[Source]) -> Evidence:
    """What files say of a launch: how ranks ended, and the ends of their logs."""
    attempt = attempt_of(run, launch)
    ranks = {source.rank: source.node for source in files if source.rank is not None}
    outcomes = {} if attempt is None else run.outcomes(attempt)
    names = log_files.hosts(run, launch)
    agents = {source.node: log_files.tail(source.path) for source in files if source.rank is None}
    nodes = {
        names.get(node, f"node {node}"): NodeReport(
            ranks=tuple(rank for rank, its_node in ranks.items() if its_node == node), tail=agents.get(node, "")
        )
        for node in sorted({*ranks.values(), *agents})
    }
    stderr = {source.rank: source.path for source in files if source.path.name == "stderr.log"}
    return Evidence(
        num_ranks=max([*ranks, *outcomes], default=-1) + 1,
        ranks=outcomes,
        nodes=nodes,
        tails={rank: log_files.tail(path) for rank, path in stderr.items() if rank is not None},
    )


def _verdict(run: RunDir, launch: str) -> Verdict | None:
    found = [line for line in read_jsonl(run.path / VERDICTS) if line.get("job") == launch and "kind" in line]
    return Verdict.from_json(found[-1]) if found else None


def _around(text: str, said: str) -> list[str]:
    """The lines of a log around an error; its last ones where it does not stand there."""
    lines = text.rstrip().splitlines()
    start = said.rstrip("…").partition("\n")[0]
    at = next((index for index in reversed(range(len(lines))) if start and start in lines[index]), len(lines) - 1)
    return lines[max(0, at - _NUM_BEFORE) : at + 1 + _NUM_AFTER]


def _launch_of(run: RunDir, attempt: int) -> str:
    if not 1 <= attempt <= run.newest_attempt():
        raise RunError(f"--attempt {attempt}: {run.path} has {run.newest_attempt()} attempts")
    launch = log_files.launch_of(run, attempt)
    if launch is None:
        raise RunError(f"--attempt {attempt}: no node agent started it; it wrote where it was started")
    return launch


def _of_rank(found: Sequence[Source], rank: int | None, launch: str) -> list[Source]:
    if rank is None:
        return list(found)
    chosen = [source for source in found if source.rank == rank]
    if not chosen:
        ranks = sorted({source.rank for source in found if source.rank is not None})
        known = f"there are ranks {ranks[0]} to {ranks[-1]}" if ranks else "a single process has none; leave --rank out"
        raise RunError(f"--rank {rank}: {launch} has no log of that rank; {known}")
    return chosen


# --- following ---------------------------------------------------------------------------------------------------


def _follow(run: RunDir, launch: str | None, rank: int | None) -> None:
    """Print what is written from now on and was before, of one launch, or of the newest one at any time."""
    readers: dict[Path, _Reader] = {}
    life = _Life(run)
    shown = None
    while True:
        known = launches(run)
        current = launch or (known[-1] if known else None)
        is_over = (launch is not None and launch != known[-1]) or not life.goes_on()
        if shown is not None and current != shown:
            _read(readers, sources(run, shown), rank, is_last=True)
            print(f"--- {current} ---", flush=True)
        if current is not None:
            _read(readers, sources(run, current), rank, is_last=is_over)
            shown = current
        if is_over:
            return
        time.sleep(_POLL_S)


class _Reader:
    """How far a growing file was read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._position = 0

    def read(self, *, is_last: bool) -> list[str]:
        """The lines that were added; one that is not ended yet only at the last time."""
        with self.source.path.open("rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        if not is_last:
            data = data[: data.rfind(b"\n") + 1]
        self._position += len(data)
        return self.source.lines(data.decode("utf-8", "replace").removesuffix("\n")) if data else []


def _read(readers: "dict[Path, _Reader]", found: Sequence[Source], rank: int | None, *, is_last: bool) -> None:
    """Print what is new in every file."""
    chosen = [source for source in found if rank is None or source.rank == rank]
    several = len({source.label for source in chosen}) > 1
    for source in chosen:
        for line in readers.setdefault(source.path, _Reader(source)).read(is_last=is_last):
            _print(source, f"{line}\n", several=several)


class _Life:
    """Whether anything more will be written in a run; Slurm is asked now and then only."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._asked_s = -_ASK_SLURM_S
        self._answer = False

    def goes_on(self) -> bool:
        """A process trains, an agent lives, or a job waits; True also when Slurm does not answer."""
        run = self._run
        if lock.holder(run.path / "lock.json") is not None or any(map(_beats, run.path.glob("agents/*/node-*.json"))):
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


def _beats(path: Path) -> bool:
    """Whether an agent's heart beats that has not let its nodes go yet."""
    if (path.parent / "decided").exists():
        return False
    return time.time() - path.stat().st_mtime < _ALIVE_S


def _print(source: Source, text: str, *, several: bool) -> None:
    for line in source.lines(text.removesuffix("\n")):
        print(f"{source.label} | {line}" if several else line, flush=True)


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
