"""Predicted against measured time of trainings: each forecast from 20 measured steps, then made.

The forecast is that of `wavefleet plan --measure`: 20 steps of the training program in a run directory that is thrown
away, and the FLOPs of the plan. Then an independent training of the same recipe is started by `wavefleet train`, and
its ledger says how long its steps took. benchmarks/README.md says what is counted.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measuring import count, hardware, markdown, shown, shown_bars, spread, versions
from throughput_data import Clip, demo_clips, librispeech_clips, prompt_clips, recipe_values, write_clips

from asr_train import pace
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.data.telephone import SOUNDS
from asr_train.errors import EXIT_DONE, WavefleetError, run_main
from asr_train.files import read_jsonl, write_json, write_text
from asr_train.forecast import Setup, forecast
from asr_train.memory_estimate import MemorySettings
from asr_train.pace import Pace
from asr_train.recipe import decode_recipe, dump_recipe
from asr_train.run_dir import RunDir
from launch.measure_pace import measured

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "forecast.json"
MAX_ERROR_PERCENT = 25
NUM_STEPS = 60
_IN_STEPS = ("compute", "padding", "data_wait", "peer_wait", "other")  # parts of the ledger
_LIBRARIES = ("wavefleet", "torch", "transformers", "accelerate", "numpy")
_WIDE = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024}


@dataclass(frozen=True)
class Training:
    """What is forecast and then made."""

    data: str
    model: str
    processes: int
    recipe: Recipe
    config: Mapping[str, Any]  # of transformers
    corpus: Corpus


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/forecast.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=3, help="trainings of each recipe (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one training of few steps: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    options = parser.parse_args(argv)
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        trainings = make_trainings(Path(name), is_smoke=options.smoke)
        for rows in measure(trainings, Path(name), 1 if options.smoke else options.rounds):
            result = {
                "benchmark": "forecast", "smoke": options.smoke, "hardware": machine,
                "versions": versions(*_LIBRARIES), "rows": rows, "bars": bars(rows),
            }  # fmt: skip
            write_json(options.out, result)
    print(render(result))
    print(f"written: {options.out}")
    return EXIT_DONE


def make_trainings(folder: Path, *, is_smoke: bool) -> list[Training]:
    """The recipes, their corpora prepared: the tiny model of the telephone recipe, and a wider one."""
    is_recorded = SOUNDS.is_dir()
    name, clips = ("telephone prompts", prompt_clips) if is_recorded else ("demo speech", demo_clips)
    if is_smoke:
        return [*_on(folder, name, clips(), most=24, unit_audio_s=4, sizes={"tiny": (1,)}, max_steps=12)]
    return [
        *_on(folder, name, clips(), most=400, unit_audio_s=5, sizes={"tiny": (1, 2), "wider": (1,)}),
        *_on(folder, "LibriSpeech-like", librispeech_clips(200), most=200, unit_audio_s=20, sizes={"tiny": (2,)}),
    ]


def _on(
    folder: Path,
    name: str,
    clips: Iterator[Clip],
    *,
    most: int,
    unit_audio_s: float,
    sizes: Mapping[str, Sequence[int]],
    max_steps: int = NUM_STEPS,
) -> Iterator[Training]:
    """Trainings on one corpus; of each model size on some numbers of processes."""
    from asr_train.model_config import load_model_config  # noqa: PLC0415 - imports transformers, which takes seconds
    from asr_train.prepare import prepare  # noqa: PLC0415

    place = folder / name.replace(" ", "-")
    data = write_clips(place, clips, most)
    for size, numbers in sizes.items():
        values = recipe_values("tiny")
        if size == "wider":
            values["model"]["config"] |= _WIDE
        recipe = decode_recipe(
            {"name": place.name, "data": data, "max_steps": max_steps, "unit_audio_s": unit_audio_s,
             "units_per_step": 2, "run_dir": str(place / "run"), "log": {"every": 5}, **values}
        )  # fmt: skip
        corpus = prepare(recipe, progress=False)
        config = load_model_config(recipe.model, vocabulary=corpus.vocabulary).to_dict()
        for processes in numbers:
            yield Training(name, size, processes, recipe, config, corpus)


# --- measuring --------------------------------------------------------------------------------------------------


def measure(trainings: Sequence[Training], folder: Path, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Each training forecast and made, forth and back; the rows of the table after every round."""
    found: dict[int, list[dict[str, float]]] = {number: [] for number in range(len(trainings))}
    before: dict[int, Pace] = {}
    for turn in range(rounds):
        for number in list(found) if turn % 2 == 0 else reversed(found):
            training = trainings[number]
            trial = measured(training.recipe, processes=training.processes)
            run = train(training, folder / f"run-{number}-{turn}")
            steps_s, num_steps = time_of_steps(run)
            entry = {
                "num_steps": num_steps,
                "measured_s": steps_s,
                "forecast_s": forecast_s(training, trial),
                "flops_per_s": trial.flops_per_s,
                "step_s": trial.step_s,
            }
            if number in before:
                entry["by_run_before_s"] = forecast_s(training, before[number])
            if (own := pace.of_run(run)) is not None:
                before[number] = own
            found[number].append(entry)
            print(f"{training.data}, {training.model}, {training.processes}: {entry}", file=sys.stderr, flush=True)
        yield [_row(training, found[number]) for number, training in enumerate(trainings)]


def forecast_s(training: Training, known: Pace) -> float:
    """Seconds of all steps, as `wavefleet plan` tells them."""
    train_set = training.corpus.train
    memory = MemorySettings.of(training.recipe, device="cpu", world_size=training.processes)
    setup = Setup(world_size=training.processes, memory=memory, pace=known)
    told = forecast(train_set.index, train_set.num_samples, training.recipe, training.config, setup).chosen.total_s
    assert told is not None
    return told


def train(training: Training, folder: Path) -> RunDir:
    """A training from its start to its end, by the verb.

    Raises:
        WavefleetError: it failed.
    """
    recipe_file = folder.with_suffix(".yaml")
    write_text(recipe_file, dump_recipe(replace(training.recipe, run_dir=str(folder))))
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe_file), "--processes", str(training.processes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != EXIT_DONE:
        raise WavefleetError(f"{' '.join(command)} failed:\n{done.stderr}")
    return RunDir(folder)


def time_of_steps(run: RunDir) -> tuple[float, int]:
    """Seconds from the first step's beginning to the last one's end, without the checkpoint; number of the steps."""
    ledgers = [line for line in read_jsonl(run.metrics) if line.get("event") == "ledger"]
    first, last = (
        np.mean([[rank[f"{part}_s"] for part in _IN_STEPS] for rank in line["ranks"]], axis=0).sum()
        for line in (ledgers[0], ledgers[-1])
    )
    return float(last - first), ledgers[-1]["step"] - ledgers[0]["step"]


# --- what is shown ----------------------------------------------------------------------------------------------


def _row(training: Training, runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    by_before = [error(run, "by_run_before_s") for run in runs if "by_run_before_s" in run]
    return {
        "data": training.data,
        "model": training.model,
        "processes": training.processes,
        "num_steps": runs[0]["num_steps"],
        "measured_s": spread([run["measured_s"] for run in runs]),
        "forecast_s": spread([run["forecast_s"] for run in runs]),
        "error_percent": spread([error(run, "forecast_s") for run in runs]),
        "by_run_before_percent": spread(by_before) if by_before else None,
        "flops_per_s": spread([run["flops_per_s"] for run in runs]),
        "step_s": spread([run["step_s"] for run in runs]),
    }


def error(run: Mapping[str, float], name: str) -> float:
    """How far a forecast is off, in percent of what the run took."""
    return 100 * (run[name] / run["measured_s"] - 1)


def bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Within so many percent, for each training: the median of its rounds, and each of them is in the table."""
    entries = []
    for row in rows:
        found = round(median(abs(each) for each in row["error_percent"]["runs"]), 2)
        name = f"{row['data']}, {row['model']}, {_processes(row)}: the time is off by, %"
        entries.append({"bar": name, "at_most": MAX_ERROR_PERCENT, "found": found, "met": found <= MAX_ERROR_PERCENT})
    return entries


def _processes(row: Mapping[str, Any]) -> str:
    return f"{row['processes']} process{'es' if row['processes'] > 1 else ''}"


def render(result: Mapping[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    signed: Callable[[float], str] = "{:+.0f}".format
    lines = []
    for row in result["rows"]:
        before = row["by_run_before_percent"]
        lines.append(
            [
                row["data"],
                row["model"],
                _processes(row),
                str(row["num_steps"]),
                shown(row["measured_s"], ".1f"),
                shown(row["forecast_s"], ".1f"),
                ", ".join(map(signed, row["error_percent"]["runs"])),
                "" if before is None else ", ".join(map(signed, before["runs"])),
                shown({**row["flops_per_s"], **_scaled(row["flops_per_s"], 1e-9)}, ".1f"),
                shown({**row["step_s"], **_scaled(row["step_s"], 1e3)}, ".0f"),
            ]
        )
    columns = (
        "speech", "model", "on", "steps", "s, measured", "s, forecast", "off by, %, each round",
        "by the round before's run, %", "GFLOP/s of a process", "ms a step besides",
    )  # fmt: skip
    machine, rounds = result["hardware"], len(result["rows"][0]["error_percent"]["runs"])
    about = (
        f"{'Few steps. ' if result['smoke'] else ''}{machine['cpu']}, {machine['cores']} cores, load average "
        f"{machine['load_average_before'][0]}; torch {result['versions']['torch']}; medians and quartiles of "
        f"{rounds} round{'s' if rounds > 1 else ''}."
    )
    return "\n".join([*markdown(columns, lines, num_left=3), "", about, "", *shown_bars(result["bars"])])


def _scaled(found: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {"median": found["median"] * factor, "quartiles": [each * factor for each in found["quartiles"]]}


if __name__ == "__main__":
    sys.exit(run_main(main))
