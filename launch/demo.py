"""`make demo`: the whole job on the built-in corpus, command by command as a user would type it."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from asr_train.errors import EXIT_DONE, run_main
from asr_train.recipe import load_recipe, run_directory
from asr_train.run_dir import RunDir, read_metrics
from launch import next_steps
from launch.child import run_child
from launch.node.devices import num_cores
from launch.node.placement import usable_gpus

_SETS = {
    "heldout_sentences": "by the voices of the training set; expected: at most 10 %",
    "heldout_voices": "by voices that were never heard; expected: at most 15 %",
}


def main(argv: Sequence[str]) -> int:
    """Prepare, train, evaluate, export, transcribe; then the WER, the run directory, and what to try next."""
    recipe = load_recipe("demo", argv)
    run = RunDir(run_directory(recipe))
    where = Path(os.path.relpath(run.path))
    samples = where / "samples"
    sets = list(recipe.eval.sets)
    processes = min(recipe.units_per_step, usable_gpus() or num_cores())
    commands = [
        ["wavefleet", "prepare", "demo", *argv],
        ["wavefleet", "train", "demo", "--processes", str(processes), *argv],
        ["wavefleet", "evaluate", str(where)],
        ["wavefleet", "export", str(where)],
        *(["python", "-m", "asr_train.samples", "demo", *argv, "--set", name, "--count", "3", "--out", str(samples)]
          for name in sets),
        ["wavefleet", "transcribe", str(where / "export"), str(samples)],
    ]  # fmt: skip
    for command in commands:
        if code := _run(command):
            return code

    print("\nWord error rates, on sentences that were never trained on:")
    scores = {line["set"]: line["wer"] for line in read_metrics(run) if "set" in line}
    for name, wer in scores.items():
        print(f"  {name:<20}{100 * wer:6.2f} %   {_SETS.get(name, '')}")
    print(f"\nRun directory: {where}")
    print("Next:")
    if shutil.which("wavefleet") is None:
        print(f"  source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}")
    print(f"  wavefleet transcribe {where / 'export'} YOUR.wav     any format, any length")
    print("  wavefleet show demo                                every field of the recipe, with its meaning")
    print("  wavefleet train demo optim.lr=5e-4                 another run, beside this one")
    return EXIT_DONE


def _run(command: Sequence[str]) -> int:
    """Show a command and run it, by this very Python."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = ["-m", "launch.cli"] if command[0] == "wavefleet" else []
    environ = {**os.environ, next_steps.SILENCE: "off"}  # the last lines say what is next
    return run_child([sys.executable, *program, *command[1:]], env=environ).exit_code


if __name__ == "__main__":
    sys.exit(run_main(main))
