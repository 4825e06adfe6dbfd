"""`python benchmarks/startup.py`: how long until the command `wavefleet` has answered, beside its neighbours.

benchmarks/README.md says what is timed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import count, hardware, markdown, shown, shown_bars, spread, versions

from asr_train.errors import EXIT_DONE, WavefleetError, run_main
from asr_train.files import write_json

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
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as folder:
        runs = measure(arguments.rounds, Path(folder))
    result: dict[str, Any] = {
        "benchmark": "startup",
        "rounds": arguments.rounds,
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
    machine = result["hardware"]
    lines = [
        *markdown(("command", "s, wall", "s, CPU", "s, wall, fastest"), rows),
        "",
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average_before'][0]:g}; medians and "
        f"quartiles of {result['rounds']} starts each.",
        "",
    ]
    return "\n".join([*lines, *shown_bars(result["bars"])])


if __name__ == "__main__":
    sys.exit(run_main(main))
