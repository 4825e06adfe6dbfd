"""`train` of a notebook: `wavefleet train` in a child process, and what became of it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from asr_train import checkpoints
from asr_train.config import Recipe
from asr_train.errors import (
    EXIT_DONE,
    EXIT_NO_CHECKPOINT,
    EXIT_STOPPED,
    EXIT_USAGE,
    CheckpointError,
    RecipeError,
    TrainingError,
    WavefleetError,
    say,
)
from asr_train.files import read_json
from asr_train.recipe import dump_recipe, run_directory
from asr_train.run_dir import RunDir, read_metrics
from asr_train.state import TrainState
from launch.local import claim
from launch.next_steps import SILENCE
from launch.node.placement import place
from wavefleet.child import PARENT
from wavefleet.results import Trained

_ERRORS: Final[dict[int, type[WavefleetError]]] = {EXIT_USAGE: RecipeError, EXIT_NO_CHECKPOINT: CheckpointError}
_SHOWN_LINES: Final = 30  # the last ones of a training that failed


def train(recipe: Recipe, *, processes: int | None, accelerate: str | None, allow_change: bool) -> Trained:
    """Train a recipe to its end; see `api.train`."""
    run = RunDir(run_directory(recipe))
    # what the child would refuse, as its own kind of error
    place(recipe, accelerate=accelerate, processes=processes)
    claim(run, recipe, allow_change=allow_change, takes_change=False)
    if run.done.exists() and not allow_change:
        return _result(run, is_done=True)
    options = [] if processes is None else ["--processes", str(processes)]
    options += [] if accelerate is None else ["--accelerate", accelerate]
    options += ["--allow-change"] if allow_change else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        code, said = _follow([sys.executable, "-m", "wavefleet.child", "train", str(file), *options])
    if code not in (EXIT_DONE, EXIT_STOPPED):
        raise _ERRORS.get(code, TrainingError)("\n".join(said[-_SHOWN_LINES:]).removeprefix("error: "))
    return _result(run, is_done=code == EXIT_DONE)


def _follow(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a command to its end; its exit code and the lines that it wrote, shown as they come, unless we are quiet.

    Ctrl-C asks it to save and stop; the second one ends it.
    """
    environ = {**os.environ, SILENCE: "off", PARENT: str(os.getpid())}
    lines: list[str] = []
    is_asked = False
    with subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes once, from us
    ) as process:
        assert process.stdout is not None
        while True:
            try:
                for line in process.stdout:
                    lines.append(line.rstrip("\n"))
                    say(lines[-1])
                return process.wait(), lines
            except KeyboardInterrupt:
                if is_asked:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                    raise
                is_asked = True
                process.send_signal(signal.SIGINT)


def _result(run: RunDir, *, is_done: bool) -> Trained:
    """What a run's files say of it."""
    lines = list(read_metrics(run))
    training = [line for line in lines if "loss" in line]
    numbers = ("step", "attempt", "time", "seconds")
    scores = {
        line["set"]: {key: value for key, value in line.items() if isinstance(value, float) and key not in numbers}
        for line in lines
        if "set" in line
    }
    best = _best(run)
    return Trained(
        run=run.path,
        ended="done" if is_done else "stopped",
        step=max((line["step"] for line in lines), default=0),
        loss=training[-1]["loss"] if training else None,
        best_metric=best[0] if best else None,
        best_value=best[1] if best else None,
        best_step=best[2] if best else None,
        scores=scores,
    )


def _best(run: RunDir) -> tuple[str, float, int] | None:
    """Metric that picks the best model, its best value, and the update that reached it."""
    newest = checkpoints.newest(run.checkpoints)
    if run.done.exists():
        state = TrainState.from_json(read_json(run.done))
    elif newest is not None:
        state = TrainState.from_json(read_json(newest.path / checkpoints.STATE)["train"])
    else:
        return None
    if state.best_metric is None or state.best_value is None or state.best_step is None:
        return None
    return state.best_metric, state.best_value, state.best_step
