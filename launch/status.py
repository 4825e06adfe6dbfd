"""`wavefleet status RUN`, `ls`, `why RUN`, `cancel RUN`: how runs are, from Slurm and from their own files.

Slurm may not answer; then what the run's files say is shown, and that Slurm did not answer.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asr_train import checkpoints, lock
from asr_train.errors import EXIT_DONE, RunError
from asr_train.files import read_jsonl
from asr_train.ledger import name_of
from asr_train.run_dir import RunDir, kept_lines
from launch.ending.collect import judged
from launch.ending.evidence import where
from launch.ending.starts import Start, starts, verdicts
from launch.jobs import then
from launch.jobs.submit import submissions
from launch.report.lives import read_lives, run_ledger
from launch.runs import open_run
from launch.site import slurm
from launch.site.slurm import SlurmError

_REQUEUE_S = 180.0  # for a job to be back in the queue; it takes longer the longer Slurm's KillWait is
_POLL_S = 1.0
_STRAGGLER = 0.1  # a tenth slower than the median rank is worth a word

OVER = ("done", "failed", "stopped", "ended")
"""States of a run that nobody trains."""


def status(argv: Sequence[str]) -> int:
    """Print how one run is."""
    options = _status_parser().parse_args(argv)
    found = describe(open_run(options.run))
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for key, value in {**found, **readable(found), **dict.fromkeys(_IN_OTHER_WORDS)}.items():
            if key != "starts" and value not in (None, "", {}, []):
                print(f"{key.replace('_', ' '):<16}{_shown(value)}")
        for start in found["starts"]:
            words = [
                start["began"],
                ",".join(start["hosts"]),
                start["code"] and f"code {start['code']}",
                start["verdict"],
            ]
            print(f"start {start['start']:<10}" + "  ".join(filter(None, words)))
    return EXIT_DONE


def list_runs(argv: Sequence[str]) -> int:
    """Print every run below a folder."""
    options = _list_runs_parser().parse_args(argv)
    runs = [RunDir(path.parent) for path in sorted(Path(options.folder).glob("*/run.json"))]
    found = [describe(run) for run in runs]
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return EXIT_DONE
    names = ("run", "state", "job", "attempts", "step", "loss", "WER", "why")
    table = Table(*names, box=None, pad_edge=False, header_style="dim")
    for row in found:
        step = f"{row['step']}/{row['max_steps']}" if row["max_steps"] else str(row["step"])
        table.add_row(
            str(row["name"]), str(row["state"]), str(row["job_id"] or ""), str(row["attempts"]), step,
            _shown(row["loss"]), readable(row)["wer"], str(row["reason"] or ""),
        )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table if found else f"no run in {options.folder}")
    return EXIT_DONE


def why(argv: Sequence[str]) -> int:
    """Print the verdict on the last attempt, with its evidence."""
    options = _why_parser().parse_args(argv)
    run = open_run(options.run)
    known = starts(run)
    if not known:
        raise RunError(f"{run.path} has not been started yet")
    written = [line for line in verdicts(run) if line["start"] == known[-1].name]
    last = written[-1] if written else _worked_out(run, known[-1])
    if options.json:
        print(json.dumps(last, indent=2, ensure_ascii=False))
        return EXIT_DONE
    print(f"{last['kind']}: {last['message']}")
    for line in last["evidence"]:
        print(f"  {_piece(line)}")
    return EXIT_DONE


def _worked_out(run: RunDir, start: Start) -> dict[str, Any]:
    """The verdict on a start that nobody lived to judge.

    Raises:
        RunError: it has not ended.
    """
    job = None if start.job_id is None else slurm.job_state(start.job_id)
    if (job is not None and job.is_live) or lock.holder(run.path / "lock.json") is not None:
        raise RunError(f"{run.path} is being trained, or will be, by {start.name}; `wavefleet status` says how it is")
    verdict = judged(run, start, slurm_state=None if job is None else job.state)
    return {"start": start.name, **verdict.to_json()}


def _piece(line: Mapping[str, Any]) -> str:
    """One piece of evidence: when, rank and host, text."""
    when = time.strftime("%H:%M:%S", time.localtime(line["time"])) if line["time"] else ""
    who = where(line["rank"], line["host"]) if line["rank"] is not None else line["host"] or ""
    return " ".join(part for part in (when, who and f"{who}:", line["text"]) if part)


def cancel(argv: Sequence[str]) -> int:
    """End a run's job, or take it out of the queue; nothing is saved that was not saved before."""
    options = _cancel_parser().parse_args(argv)
    run = open_run(options.run)
    live = [entry for entry in submissions(run) if slurm.job_state(entry.job_id).is_live]
    if not live:
        raise RunError(f"{run.path} has no job in Slurm; there is nothing to cancel")
    for entry in live:
        _cancel(run, entry.job_id)
        print(f"{run.path}: job {entry.job_id} cancelled")
    return EXIT_DONE


def _cancel(run: RunDir, job_id: str) -> None:
    """Cancel a job; again and again where it is on its way back into the queue, for there scancel passes it over.

    Raises:
        RunError: it did not arrive there.
    """
    begun = [int(start.name.split(".")[1]) for start in starts(run) if start.job_id == job_id]
    until = time.monotonic() + _REQUEUE_S
    slurm.cancel(job_id)
    while (job := slurm.job_state(job_id)).is_live and job.restarts > max(begun, default=0):
        if time.monotonic() > until:
            raise RunError(f"{run.path}: job {job_id} is {job.state}, and scancel does not end it; try again later")
        time.sleep(_POLL_S)
        slurm.cancel(job_id)


def describe(run: RunDir, *, ask_slurm: bool = True) -> dict[str, Any]:
    """What is known of a run, as plain values; without Slurm's word, from its files alone."""
    jobs = submissions(run)
    slurm_state, problem = None, None
    if jobs and ask_slurm:
        try:
            slurm_state = slurm.job_state(jobs[-1].job_id)
        except SlurmError as error:
            problem = str(error)
    written = [line for line in read_jsonl(run.metrics) if "step" in line]
    lines = list(kept_lines(written))
    training = [line for line in lines if "loss" in line]
    last: Mapping[str, Any] = training[-1] if training else {}
    scores = {line["set"]: line["wer"] for line in lines if "set" in line}
    begun = [line for line in written if line.get("event") in ("started", "restored")]
    max_steps = begun[-1]["max_steps"] if begun else None
    left_s = (max_steps - last["step"]) * last["step_time_s"] if max_steps and last else None
    saved = checkpoints.whole(run.checkpoints)
    lives = read_lives(run, written)
    return {
        "name": run.path.name,
        "state": _state(run, slurm_state),
        "job_id": jobs[-1].job_id if jobs else None,
        "reason": slurm_state.reason if slurm_state and slurm_state.state == "PENDING" else None,
        "expected_start": slurm_state.start if slurm_state and slurm_state.state == "PENDING" else None,
        "nodes": slurm_state.nodes if slurm_state else None,
        "attempts": run.newest_attempt(),
        "step": last.get("step", 0),
        "max_steps": max_steps,
        "loss": last.get("loss"),
        "wer": scores,
        "audio_s_per_s": last.get("audio_s_per_s"),
        "memory_bytes": last.get("memory_bytes"),
        "left_s": left_s,
        "ledger": run_ledger(lives).shares,
        "stragglers": _stragglers(lives[-1].ledger.ranks) if lives else {},
        "checkpoint": saved[-1].name if saved else None,
        "then": then.shown(run),
        "starts": _starts(run),
        "slurm_problem": problem,
    }


def _stragglers(ranks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rank and host -> how much longer than the median rank it works on the same; those that matter."""
    return {
        f"rank {rank['rank']} ({rank['host']})": rank["straggler"] for rank in ranks if rank["straggler"] > _STRAGGLER
    }


def _starts(run: RunDir) -> list[dict[str, Any]]:
    """Each start of a run: when, where, with which copy of the code, and how it ended, where that is known."""
    kinds = {line["start"]: line["kind"] for line in verdicts(run)}
    return [
        {
            "start": start.name,
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time)),
            "hosts": list(start.hosts),
            "code": Path(start.code).name if start.job_id else None,
            "verdict": kinds.get(start.name),
        }
        for start in starts(run)
    ]


def _state(run: RunDir, slurm_state: slurm.JobState | None) -> str:
    """One word: what Slurm says of a live job, else what the run's files say."""
    if run.done.exists():
        return "done"
    if slurm_state is not None and slurm_state.is_live:
        return slurm_state.state.lower()
    if lock.holder(run.path / "lock.json") is not None:
        return "running"
    statuses = {outcome["status"] for outcome in run.outcomes().values()}
    for status_ in ("failed", "stopped"):
        if status_ in statuses:
            return status_
    return "ended" if run.newest_attempt() else "new"


def readable(row: Mapping[str, Any], num_parts: int | None = None) -> dict[str, str]:
    """What is shown of a run, as text: empty where it is not known, or does not matter any more.

    Args:
        row: of `describe`.
        num_parts: of its ledger, the largest first; None is all of them.
    """
    shares = sorted(row["ledger"].items(), key=lambda item: -item[1])[:num_parts]
    late = [f"{name} is {score:.0%} slower" for name, score in row["stragglers"].items()]
    return {
        "name": str(row["name"]),
        "state": str(row["state"]),
        "step": f"{row['step']}/{row['max_steps']}" if row["max_steps"] else str(row["step"]),
        "loss": "" if row["loss"] is None else f"{row['loss']:.4g}",
        "wer": ", ".join(f"{name} {wer:.2%}" for name, wer in row["wer"].items()),
        "audio_s_per_s": "" if row["audio_s_per_s"] is None else f"{row['audio_s_per_s']:,.0f}",
        "memory": "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.1f} GB",
        "left": "" if row["left_s"] is None or row["state"] in OVER else _duration(row["left_s"]),
        "ledger": ", ".join([f"{name_of(part)} {share:.0%}" for part, share in shares] + late),
    }


_IN_OTHER_WORDS = ("max_steps", "memory_bytes", "left_s", "stragglers")  # what `readable` says elsewhere


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _status_parser() -> argparse.ArgumentParser:
    return _parser("status", "How a run is.")


def _why_parser() -> argparse.ArgumentParser:
    return _parser("why", "Why the last attempt of a run ended.")


def _cancel_parser() -> argparse.ArgumentParser:
    return _parser("cancel", "End a run's job without saving.")


def _list_runs_parser() -> argparse.ArgumentParser:
    return _parser("ls", "Every run below a folder.", run=False)


def _parser(verb: str, meaning: str, *, run: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"wavefleet {verb}", description=meaning, allow_abbrev=False)
    if run:
        parser.add_argument("run", metavar="RUN", help="a run directory, or its name in runs/")
    else:
        parser.add_argument("folder", nargs="?", default="runs", help="the folder that runs are in (%(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser
