"""`wavefleet train`: trains on this machine, or on all nodes of the allocation that it is in; says how it ended."""

import argparse
import os
import socket
import time
from collections.abc import Sequence

from asr_train import lock
from asr_train.config import Recipe
from asr_train.errors import EXIT_FAILED, RunError, say, warn
from asr_train.recipe import load_recipe, run_directory
from asr_train.run_dir import START, RunDir, locked_message
from launch import allocation
from launch.child import Ended, Signals, run_child, workers
from launch.ending.collect import conclude
from launch.ending.starts import Start, next_local, retried
from launch.jobs.notify import notify
from launch.node.hang import HangWatch
from launch.node.placement import Placement, place
from launch.verdict import Verdict

_POLL_S = 0.2


def main(argv: Sequence[str]) -> int:
    """Train on this machine; returns 0 done, 2 wrong recipe, 3 stopped and saved, 4 failed, 5 no usable checkpoint."""
    options = _parser().parse_intermixed_args(argv)
    recipe = load_recipe(options.recipe, options.overrides)
    run = RunDir(run_directory(recipe))
    if allocation.is_inside(os.environ):
        claim(run, recipe, allow_change=options.allow_change, takes_change=True)
        return allocation.train(run, recipe, accelerate=options.accelerate, processes=options.processes)
    placement = place(recipe, accelerate=options.accelerate, processes=options.processes)
    claim(run, recipe, allow_change=options.allow_change, takes_change=False)
    say(f"{run.path}: {placement}")
    switches = [flag for flag, given in (("--allow-change", options.allow_change), ("--debug", options.debug)) if given]
    retried(run)
    with (signals := Signals()).installed():
        while True:
            start = Start(
                name=next_local(run),
                hosts=(socket.gethostname(),),
                processes_per_node=placement.num_processes,
                time=time.time(),
            )
            start.write(run)
            with HangWatch(start.ranks(0), recipe.limits, start.hangs(run)) as watch:
                ended = _train(run, start, placement, [options.recipe, *options.overrides, *switches], signals, watch)
            if start.attempt(run) is None and not run.done.exists():
                return _never_began(ended)
            verdict = conclude(run, start)
            if verdict.action != "retry" or ended.stopped_by is not None:
                return _end(run, verdict)
            say(f"{verdict.kind}: {verdict.message}")
            if not _pause(verdict.wait_s, signals):
                return verdict.exit_code


def _train(
    run: RunDir, start: Start, placement: Placement, arguments: Sequence[str], signals: Signals, watch: HangWatch
) -> Ended:
    """One life of the training program."""
    logs = start.logs(run, 0)
    command = placement.command(arguments, log_dir=logs)
    environ = placement.environ({**os.environ, START: start.name, **watch.environment})
    ended = run_child(command, env=environ, receivers=workers, signals=signals, is_over=lambda child: watch.look())
    number = ended.stopped_by
    start.meeting(run, 0).report(
        {
            "exit_code": ended.exit_code,
            "stopped_by": None if number is None else "user",
            "stop_time": signals.time,
        }
    )
    return ended


def _never_began(ended: Ended) -> int:
    """Exit code of a training program that ended before its attempt began."""
    if ended.stopped_by is not None:
        say("stopped before training began; there was nothing to save")
        return 128 + ended.stopped_by
    warn("failed: the training program ended before it began; its messages are above")
    return EXIT_FAILED


def _end(run: RunDir, verdict: Verdict) -> int:
    """Say how it ended, where the training program itself has not."""
    if verdict.kind not in ("done", "stopped_by_user", "time_limit"):
        warn(f"{verdict.kind}: {verdict.message}")
    notify(run, verdict)
    return verdict.exit_code


def _pause(seconds: float, signals: Signals) -> bool:
    """Wait before another attempt; whether nobody asked to stop meanwhile."""
    until = time.monotonic() + seconds
    while signals.first is None and time.monotonic() < until:
        time.sleep(_POLL_S)
    return signals.first is None


def claim(run: RunDir, recipe: Recipe, *, allow_change: bool, takes_change: bool) -> None:
    """Refuse a live run and a run of another recipe before anything is started."""
    run.make()
    path = run.path / "lock.json"
    if held := lock.holder(path):
        raise RunError(locked_message(run, lock.LockHeldError(path, held)))
    if takes_change or not allow_change:  # else the training program itself takes changes, and says which
        run.claim(recipe, allow_change=allow_change)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavefleet train", description=__doc__, allow_abbrev=False)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields to change, optim.lr=1e-5 say")
    parser.add_argument("--accelerate", metavar="FILE", help="accelerate config: a file, or a shipped one by name")
    parser.add_argument("--processes", type=_count, metavar="N", help="processes on this machine, or on each node")
    parser.add_argument("--allow-change", action="store_true", help="go on with a run although its recipe changed")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 1")
    return number
