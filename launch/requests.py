"""`wavefleet stop RUN` and `save RUN`: ask a live training, by a file in its run directory."""

import argparse
from collections.abc import Sequence

from asr_train import lock
from asr_train.errors import EXIT_DONE, RunError
from asr_train.run_dir import RunDir
from launch.runs import open_run


def stop(argv: Sequence[str]) -> int:
    """Have a training save and stop after its current step."""
    run = _live(_stop_parser(), argv, "stop")
    ask(run, "stop")
    print(f"{run.path}: asked to save and stop; `wavefleet checkpoints {run.path}` shows when it has")
    return EXIT_DONE


def save(argv: Sequence[str]) -> int:
    """Have a training save and go on."""
    run = _live(_save_parser(), argv, "save")
    ask(run, "save")
    print(f"{run.path}: asked to save")
    return EXIT_DONE


def _live(parser: argparse.ArgumentParser, argv: Sequence[str], verb: str) -> RunDir:
    """The run that the command line names.

    Raises:
        RunError: nobody trains it now.
    """
    run = open_run(parser.parse_args(argv).run)
    if lock.holder(run.path / "lock.json") is None:
        raise RunError(f"nobody trains {run.path} now; there is nothing to {verb}")
    return run


def _stop_parser() -> argparse.ArgumentParser:
    return _parser("stop", "save and stop after the current step")


def _save_parser() -> argparse.ArgumentParser:
    return _parser("save", "save after the current step, and go on")


def _parser(verb: str, meaning: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"wavefleet {verb}", description=f"Ask a live training to {meaning}.")
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name in runs/")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def ask(run: RunDir, kind: str) -> None:
    """Make a request, unless it is there: an attempt that is just starting forgets what was asked before it."""
    path = run.control / kind
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.touch()
