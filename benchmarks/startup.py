"""`python benchmarks/startup.py`: how long until a command has answered, and until a training has made its first step.

benchmarks/README.md says what is timed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from measuring import count, hardware, markdown, shown, shown_bars, spread, versions
from model_shapes import TINY_SHAPE

from asr_train.errors import EXIT_DONE, WavefleetError, run_main
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.run_dir import RunDir, read_metrics
from launch.node.placement import usable_gpus

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "startup.json"
_WAVEFLEET = ("-m", "launch.cli")
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "wavefleet --help": (*_WAVEFLEET, "--help"),
    "wavefleet submit --dry-run": (
        *_WAVEFLEET, "submit", "demo", "--cluster", "test", "cluster.processes_per_node=1", "--dry-run",
    ),
    "python -c 'import submitit'": ("-c", "import submitit"),
    "torchrun --help": ("-m", "torch.distributed.run", "--help"),
    "accelerate launch --help": ("-m", "accelerate.commands.launch", "--help"),
}  # fmt: skip
_CONFIG = str(ROOT / "accelerate_configs" / ("one_gpu.yaml" if usable_gpus() else "cpu.yaml"))
_ONE = ("--num_machines", "1", "--num_processes", "1", *(() if usable_gpus() else ("--cpu",)))
TRAININGS = {
    "wavefleet train": (*_WAVEFLEET, "train"),
    "accelerate launch": ("-m", "accelerate.commands.launch", "--config_file", _CONFIG, *_ONE, "-m", "asr_train"),
    "python -m asr_train": ("-m", "asr_train"),
}
LIMITS_S = {"wavefleet --help": 0.5, "wavefleet submit --dry-run": 1.0}  # expected
_LIBRARIES = ("wavefleet", "submitit", "pydantic", "numpy", "torch", "accelerate")


@dataclass(frozen=True)
class Timed:
    """One start of a program: seconds on the clock, and of CPU time, user and system, of it and its children."""

    wall_s: float
    cpu_s: float


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/startup.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=10, help="timed starts each (default: %(default)s)")
    parser.add_argument("--trainings", type=count, default=5, help="timed trainings each (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one start of each, a tiny model, no peers of a training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as folder:
        runs = measure(1 if arguments.smoke else arguments.rounds, Path(folder))
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as folder:
        training = train(1 if arguments.smoke else arguments.trainings, Path(folder), is_smoke=arguments.smoke)
    result: dict[str, Any] = {
        "benchmark": "startup",
        "rounds": 1 if arguments.smoke else arguments.rounds,
        "hardware": machine,
        "versions": versions(*_LIBRARIES),
        "commands": {
            name: {
                "wall_s": spread([run.wall_s for run in timed]),
                "cpu_s": spread([run.cpu_s for run in timed]),
            }
            for name, timed in runs.items()
        },
    }
    result["training"] = training
    result["bars"] = bars(result)
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def measure(rounds: int, folder: Path) -> dict[str, list[Timed]]:
    """Every command, in turn, forth and back; after a start of each that is not counted and fills the caches."""
    for command in COMMANDS.values():
        start(command, folder)
    runs: dict[str, list[Timed]] = {name: [] for name in COMMANDS}
    for number in range(rounds):
        for name in list(COMMANDS) if number % 2 == 0 else reversed(COMMANDS):
            runs[name].append(start(COMMANDS[name], folder))
    return runs


def start(arguments: Sequence[str], folder: Path) -> Timed:
    """Run this Python with arguments to its end, in an empty folder.

    Raises:
        WavefleetError: it failed, or left something there.
    """
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()  # ends with the program
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise WavefleetError(f"{' '.join(arguments)} failed: {said.decode(errors='replace')}")
    if any(folder.iterdir()):
        raise WavefleetError(f"{' '.join(arguments)} left files behind: {[path.name for path in folder.iterdir()]}")
    return Timed(wall_s, used.ru_utime + used.ru_stime)


# --- a training's first step -------------------------------------------------------------------------------------


def train(rounds: int, folder: Path, *, is_smoke: bool) -> dict[str, Any]:
    """Seconds until the first step of each way to start the same training, in turn, forth and back; and of each stage.

    The corpus is prepared before; the first round is not counted, but for a smoke run's.
    """
    recipe = _training_recipe(folder, {"config": TINY_SHAPE} if is_smoke else {})
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ways = {"wavefleet train": TRAININGS["wavefleet train"]} if is_smoke else TRAININGS
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    stages: dict[str, list[float]] = {}
    _run(["-m", "launch.cli", "prepare", str(recipe)], folder, environ)
    for number in range(rounds if is_smoke else rounds + 1):
        is_counted = is_smoke or number > 0
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            begun = time.time()
            _run([*ways[name], str(recipe)], folder, environ)
            first = next(line for line in read_metrics(RunDir(folder / "run")) if "loss" in line)
            seconds[name] += [first["time"] - begun] * is_counted
            shutil.rmtree(folder / "run")
        found = json.loads(_run([str(Path(__file__).with_name("startup_stages.py")), str(recipe)], folder, environ))
        for stage, elapsed_s in found.items():
            stages.setdefault(stage, []).extend([elapsed_s] * is_counted)
        shutil.rmtree(folder / "run")
    return {
        "rounds": rounds,
        "ways": [{"way": name, "first_step_s": spread(found)} for name, found in seconds.items()],
        "stages": [{"stage": stage, "seconds": spread(found)} for stage, found in stages.items()],
    }


def _training_recipe(folder: Path, model: dict[str, Any]) -> Path:
    """Forty utterances of noise, and a recipe that makes one step on a few of them."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(40):
        samples = (random.standard_normal(int(random.uniform(1, 2) * SAMPLE_RATE)) * 3000).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", samples, SAMPLE_RATE)
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", "text": "noise and nothing else"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "name": "startup", "run_dir": str(folder / "run"), "max_steps": 1, "unit_audio_s": 4, "units_per_step": 1,
        "data": {"train": {"kind": "jsonl", "path": str(folder / "manifest.jsonl")}, "corpus_root": str(folder),
                 "num_proc": 1},
        "model": {"freeze_feature_encoder": True, **model}, "log": {"every": 1},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _run(arguments: Sequence[str], folder: Path, environ: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise WavefleetError(f"{' '.join(arguments)} failed: {done.stderr}")
    return done.stdout


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected, and whether it was found; judged to two decimals, as it is shown."""
    found = {name: round(result["commands"][name]["wall_s"]["median"], 2) for name in LIMITS_S}
    return [
        {"bar": f"{name}, seconds", "at_most": limit, "found": found[name], "met": found[name] <= limit}
        for name, limit in LIMITS_S.items()
    ]


def render(result: dict[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    rows = [
        [name, shown(timed["wall_s"], ".2f"), shown(timed["cpu_s"], ".2f"), f"{min(timed['wall_s']['runs']):.2f}"]
        for name, timed in result["commands"].items()
    ]
    training = result["training"]
    ways = [[entry["way"], shown(entry["first_step_s"], ".2f")] for entry in training["ways"]]
    stages = [[entry["stage"], shown(entry["seconds"], ".2f")] for entry in training["stages"]]
    machine = result["hardware"]
    lines = [
        *markdown(("command", "s, wall", "s, CPU", "s, wall, fastest"), rows),
        "",
        *markdown(("a training by", "s until its first step is made"), ways),
        "",
        *markdown(("of that, in the training program", "s"), stages),
        "",
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average_before'][0]:g}; medians and "
        f"quartiles of {result['rounds']} starts and {training['rounds']} trainings each.",
        "",
    ]
    return "\n".join([*lines, *shown_bars(result["bars"])])


if __name__ == "__main__":
    sys.exit(run_main(main))
