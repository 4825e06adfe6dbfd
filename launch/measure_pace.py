"""How fast a training gets on here: its first steps, in a run directory that is thrown away.

It is the training program itself, as `wavefleet train` would start it, on the recipe's own corpus; killed as soon as
enough steps are in its ledger, so that it evaluates nothing and saves nothing.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import psutil

from asr_train import pace
from asr_train.config import Recipe
from asr_train.errors import TrainingError, say
from asr_train.files import read_jsonl, write_text
from asr_train.pace import Pace
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir
from launch.child import Signals, nobody, run_child
from launch.node.placement import Placement, place

WARMUP_STEPS: Final = 5  # one ledger line, whose steps do not count
NUM_STEPS: Final = 20
_NEVER: Final = 1_000_000  # steps; no training that is measured comes so far
_NUM_TOLD: Final = 15  # lines of its output, where it failed without a word of its own
_END_S: Final = 30.0  # for killed processes to be gone


def measured(recipe: Recipe, *, accelerate: str | None = None, processes: int | None = None) -> Pace:
    """Train 20 steps on this machine after a few to warm up; shows how far it is.

    Args:
        recipe: what is trained; where it is going to be trained does not matter.
        accelerate: as `wavefleet train` takes it.
        processes: the same.

    Raises:
        RecipeError: this machine cannot train so.
        TrainingError: it failed, with its message.
    """
    placement = place(recipe, accelerate=accelerate, processes=processes)
    say(f"measuring {NUM_STEPS} steps on this machine: {placement}")
    with tempfile.TemporaryDirectory(prefix="wavefleet-pace-") as name:
        run = RunDir(Path(name) / "run")
        _train(_measured_recipe(recipe, run), run, placement, Path(name))
        found = pace.of_run(run, place="a trial on this machine")
    if found is None:
        raise TrainingError("the trial on this machine has no step in its ledger that took any time")
    return found


def _measured_recipe(recipe: Recipe, run: RunDir) -> Recipe:
    """The same training, without anything besides its steps; the sets stay, for the corpus is known by them."""
    return replace(
        recipe,
        run_dir=str(run.path),
        max_steps=_NEVER,
        max_epochs=None,
        model=replace(recipe.model, freeze_transformer_steps=0),
        eval=replace(recipe.eval, every=None),
        checkpoint=replace(recipe.checkpoint, every=None),
        log=replace(recipe.log, every=WARMUP_STEPS, trained_ids=False, trackers=(), prometheus=None),
        limits=replace(recipe.limits, max_time_s=None),
    )


def _train(recipe: Recipe, run: RunDir, placement: Placement, folder: Path) -> None:
    """Start it, and kill it when it has made enough steps."""
    recipe_file, output_file = folder / "recipe.yaml", folder / "output.txt"
    write_text(recipe_file, dump_recipe(recipe))
    made, wanted = 0, WARMUP_STEPS + NUM_STEPS
    descendants: list[psutil.Process] = []

    with output_file.open("wb") as output, (signals := Signals()).installed():

        def is_over(child: psutil.Process) -> bool:
            nonlocal made
            if (now := _steps_made(run)) > made:
                made = now
                say(f"measuring: {min(made, wanted)} of {wanted} steps")
            over = made >= wanted or signals.first is not None
            if over:
                descendants.extend(child.children(recursive=True))
            return over

        command, environ = placement.command([str(recipe_file)]), placement.environ(os.environ)
        run_child(command, env=environ, receivers=nobody, signals=signals, is_over=is_over, output=output)
    psutil.wait_procs(descendants, timeout=_END_S)
    if signals.first is not None:
        raise KeyboardInterrupt
    if made < wanted:
        raise TrainingError(f"measuring on this machine failed: {_why(run, output_file)}")


def _steps_made(run: RunDir) -> int:
    """Steps that the newest ledger line counts."""
    return max((line["step"] for line in read_jsonl(run.metrics) if line.get("event") == "ledger"), default=0)


def _why(run: RunDir, output_file: Path) -> str:
    """What the rank wrote that failed by itself; else the end of what was printed."""
    outcomes: Sequence[dict[str, object]] = sorted(run.outcomes().values(), key=lambda one: bool(one.get("lost_peer")))
    if outcomes:
        return str(outcomes[0].get("message"))
    lines = output_file.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.rpartition("error: ")[2] for line in lines if "error: " in line]
    return errors[0] if errors else "\n".join(lines[-_NUM_TOLD:])
