"""What to do next, said after each verb, on stderr: all of it is here. `-q` leaves it out.

A step is a command with its meaning. Words in capitals (FILE) are for the user to fill in.
"""

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from asr_train.errors import EXIT_DONE, EXIT_NO_CHECKPOINT, EXIT_STOPPED, EXIT_USAGE, WavefleetError, say
from asr_train.recipe import load_recipe, run_directory
from launch.runs import open_run

SILENCE: Final = "WAVEFLEET_NEXT_STEPS"
"""Environment variable; `off` leaves the steps out, for programs that call verbs one after the other."""


class Step(NamedTuple):
    """A command, and what it is for."""

    command: str
    meaning: str


class Ended(NamedTuple):
    """A verb that has ended: what it was given, and its exit code."""

    options: argparse.Namespace
    rest: Sequence[str]
    exit_code: int


def suggest(verb: str, options: argparse.Namespace, rest: Sequence[str], exit_code: int) -> None:
    """Say what may follow a verb; nothing where the command itself was wrong."""
    if exit_code == EXIT_USAGE or os.environ.get(SILENCE) == "off":
        return
    steps = list(_STEPS[verb](Ended(options, rest, exit_code)))
    width = max((len(step.command) for step in steps), default=0)
    for number, step in enumerate(steps):
        say(f"{'next: ' if number == 0 else '      '}{step.command:<{width}}   {step.meaning}")


def _after_new(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE:
        file = ended.options.out or f"{ended.options.name}.yaml"
        yield Step(f"wavefleet prepare {_quoted(file)}", "decode, check and index the speech")
        yield Step(f"wavefleet show {_quoted(file)}", "every field with its meaning")


def _after_show(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet prepare {_words(ended.options.recipe, *ended.options.overrides)}", "make its corpus")


def _after_prepare(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE:
        # a job array's arguments are recipe, overrides and options; `train` takes the same recipe
        overrides = [word for word in ended.options.overrides if not word.startswith("cluster.")]
        words = _words(ended.options.recipe, *overrides)
        yield Step(f"wavefleet plan {words}", "its steps, memory and time, before it is started")
        yield Step(f"wavefleet train {words}", "train on this machine")


def _after_train(ended: Ended) -> Iterator[Step]:
    run = _run_of(ended)
    if ended.exit_code == EXIT_DONE:
        yield Step(f"wavefleet evaluate {run}", "its errors, and the worst utterances")
        yield Step(f"wavefleet report {run}", "a page of what it did, which opens offline")
        yield Step(f"wavefleet export {run}", "a model folder that transformers loads")
    elif ended.exit_code == EXIT_STOPPED:
        yield Step(f"wavefleet train {_words(*ended.rest)}", "goes on where it stopped")
    elif ended.exit_code == EXIT_NO_CHECKPOINT:
        yield Step(f"wavefleet checkpoints {run} --verify", "what is wrong with each")
    else:
        yield Step(f"wavefleet why {run}", "the evidence")
        yield Step(f"wavefleet train {_words(*ended.rest)}", "goes on from the newest checkpoint")


def _after_submit(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE and not ended.options.dry_run:
        yield from _watching(_run_of(ended))


def _after_retry(ended: Ended) -> Iterator[Step]:
    yield from _watching(_quoted(ended.options.run))


def _watching(run: str) -> Iterator[Step]:
    yield Step(f"wavefleet status {run}", "job, step, loss, WER, time left")
    yield Step(f"wavefleet logs {run} --follow", "what its ranks write")


def _after_plan(ended: Ended) -> Iterator[Step]:
    if ended.options.cluster is not None:
        nodes = [] if ended.options.nodes is None else ["--nodes", str(ended.options.nodes)]
        name = [] if ended.options.name is None else ["--name", ended.options.name]
        words = [ended.options.recipe, *ended.options.overrides, "--cluster", ended.options.cluster, *nodes, *name]
        yield Step(f"wavefleet submit {_words(*words)}", "have it done")
        return
    name = [] if ended.options.name is None else [f"name={ended.options.name}"]
    command = _words(ended.options.recipe, *ended.options.overrides, *name)
    yield Step(f"wavefleet train {command}", "train on this machine")


def _after_doctor(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet plan RECIPE --cluster {_quoted(ended.options.cluster)}", "what a job there would be")


def _after_sweep(ended: Ended) -> Iterator[Step]:
    if not ended.options.list:
        yield Step(f"wavefleet sweep {_words(*ended.rest)} --list", "how its runs are")


def _after_ls(ended: Ended) -> Iterator[Step]:
    if any(Path(ended.options.folder).glob("*/run.json")):
        yield Step("wavefleet status RUN", "more of one")
    else:
        yield Step("wavefleet train RECIPE", "makes one")


def _after_status(ended: Ended) -> Iterator[Step]:
    run, path = _quoted(ended.options.run), None
    with suppress(WavefleetError):
        path = open_run(ended.options.run).path
    if path is not None and (path / "done.json").exists():
        yield Step(f"wavefleet report {run}", "a page of what it did, which opens offline")
    else:
        yield Step(f"wavefleet why {run}", "why its last attempt ended")
    if path is None or any((path / name).is_dir() for name in ("logs", "slurm")):  # a single process has none here
        yield Step(f"wavefleet logs {run}", "what its ranks wrote")


def _after_why(ended: Ended) -> Iterator[Step]:
    run = _quoted(ended.options.run)
    with suppress(WavefleetError):
        if open_run(ended.options.run).done.exists():
            yield Step(f"wavefleet report {run}", "a page of what it did, which opens offline")
            return
    yield Step(f"wavefleet logs {run} --first-error", "the log around the first error")


def _after_report(ended: Ended) -> Iterator[Step]:
    runs = ended.options.runs
    if ended.exit_code == EXIT_DONE and len(runs) == 1 and ended.options.audio is None:
        yield Step(f"wavefleet report {_quoted(runs[0])} --audio", "the same, with recordings of the worst utterances")


def _after_logs(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet why {_quoted(ended.options.run)}", "the verdict, with its evidence")


def _after_request(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet checkpoints {_quoted(ended.options.run)}", "shows when it is written")


def _after_cancel(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet retry {_quoted(ended.options.run)}", "another job, from its newest checkpoint")


def _after_reconcile(ended: Ended) -> Iterator[Step]:
    if not ended.options.act:
        yield Step(f"wavefleet reconcile {_words(ended.options.folder)} --act", "does what is listed")


def _after_nodes(ended: Ended) -> Iterator[Step]:
    yield Step(f"wavefleet doctor --cluster {_quoted(ended.options.cluster)}", "what that cluster can do")


def _after_checkpoints(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE:
        yield Step(f"wavefleet export {_quoted(ended.options.run)}", "the model of the best one")


def _after_evaluate(ended: Ended) -> Iterator[Step]:
    target = getattr(ended.options, "target", None)  # a job's command line is its own
    if ended.exit_code == EXIT_DONE and target is not None:
        if (target / "run.json").exists():
            yield Step(f"wavefleet export {_quoted(target)}", "a model folder that transformers loads")
        else:
            yield Step(f"wavefleet transcribe {_quoted(target)} FILE", "audio in, text out")


def _after_export(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE:
        folder = ended.options.out or ended.options.run / "export"
        yield Step(f"wavefleet transcribe {_quoted(folder)} FILE", "audio in, text out")


def _after_transcribe(ended: Ended) -> Iterator[Step]:
    if ended.exit_code == EXIT_DONE and getattr(ended.options, "format", None) == "text":
        inputs: list[Path] = ended.options.inputs
        shown = _words(*map(str, (ended.options.model, *inputs[:3]))) + (" ..." if len(inputs) > 3 else "")
        yield Step(f"wavefleet transcribe {shown} --format srt", "subtitles; jsonl has the times of words")


def _nothing(ended: Ended) -> Iterator[Step]:
    yield from ()


_STEPS: Final[dict[str, Callable[[Ended], Iterator[Step]]]] = {
    "new": _after_new,
    "show": _after_show,
    "prepare": _after_prepare,
    "train": _after_train,
    "submit": _after_submit,
    "plan": _after_plan,
    "doctor": _after_doctor,
    "retry": _after_retry,
    "sweep": _after_sweep,
    "ls": _after_ls,
    "status": _after_status,
    "why": _after_why,
    "watch": _nothing,  # who watched knows
    "report": _after_report,
    "logs": _after_logs,
    "stop": _after_request,
    "save": _after_request,
    "cancel": _after_cancel,
    "reconcile": _after_reconcile,
    "nodes": _after_nodes,
    "checkpoints": _after_checkpoints,
    "evaluate": _after_evaluate,
    "export": _after_export,
    "transcribe": _after_transcribe,
    "completion": _nothing,  # what it prints is for the shell, and says where to put it
}
"""Verb -> what may follow it."""


def _run_of(ended: Ended) -> str:
    """The run directory of a recipe with changes; RUN where that cannot be told."""
    overrides = [word for word in ended.options.overrides if not word.startswith("cluster.")]
    with suppress(WavefleetError):
        return _quoted(run_directory(load_recipe(ended.options.recipe, overrides)))
    return "RUN"


def _quoted(path: Path | str) -> str:
    """A path for a shell, from here where it is below."""
    shown = Path(path)
    if shown.is_absolute() and shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    return shlex.quote(str(shown))


def _words(*words: str) -> str:
    return shlex.join(words)
