"""`python benchmarks/plan_scale.py`: how long until a rank knows its units, from a million utterances to a billion.

benchmarks/README.md says what is timed, and how memory is counted.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from length_sets import LENGTH_SETS, length_blocks
from measuring import count, hardware, markdown, memory_bytes, reset_peak_memory, shown, shown_bars, spread, versions

from asr_train.errors import EXIT_DONE, WavefleetError, run_main
from asr_train.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan_scale.json"
WORLD_SIZES = (1, 8, 64, 512, 4096)
UNITS_PER_STEP = 512  # and 4096 where there are 4096 ranks
QUADRATIC = 1.73e-4  # of wav2vec2-base with a frozen feature encoder; it moves shapes, hardly times
UNIT_AUDIO_S = 200.0
PLACES = {"first step": 0.0, "mid-epoch": 0.5, "90 % of the epoch": 0.9}
BAR_SIZE, BAR_S, BAR_BYTES = 100_000_000, 1.0, 10**9  # expected: so many utterances, in so much time and memory
BAR_PLACE_RATIO = 1.5  # of the time at another position to that of the first step; 1 is to be expected, and noise
BAR_STEP_WORLD, BAR_STEP_MS = 512, 1.0
_BYTES_AN_UTTERANCE = 12  # int32: lengths on disk, the index's order in memory while it is built, and again on disk
_LIBRARIES = ("wavefleet", "numpy")


@dataclass(frozen=True)
class Start:
    """One rank's start, in a process of its own: from the index's path to the ids of its units of one step."""

    import_s: float  # the plan's modules; numpy is there already
    units_s: float  # everything after them
    num_ids: int
    peak_bytes: int  # resident, from the imports on: what they take, what the plan takes, and mapped pages
    own_bytes: int  # of these at the end, memory of the process
    mapped_bytes: int  # of these at the end, pages of files: libraries and the index, which the system may take back
    grown_bytes: int  # what the peak added to what the imports had left


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/plan_scale.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", type=count, nargs="+", default=[10**6, 10**7, 10**8, 10**9], metavar="N",
        help="utterances (default: 10^6 to 10^9)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=WORLD_SIZES, metavar="W", help="world sizes (default: 1 to 4096)"
    )
    parser.add_argument("--rounds", type=count, default=4, help="timed starts each (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=50, help="timed steps each (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR",
        help="keep the indexes in DIR, and use those that are there; a billion utterances take 4 GB, and 8 to make",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-", dir=arguments.folder) as scratch:
        folder = arguments.folder or Path(scratch)
        machine = hardware()
        sizes: list[dict[str, Any]] = []
        for size in sorted(arguments.sizes):
            lacking = "" if (folder / str(size)).exists() else _lacking(size, folder)
            found = {"not_run": lacking} if lacking else _measure(size, folder, Path(scratch), arguments)
            sizes.append({"utterances": size, **found})
    result: dict[str, Any] = {
        "benchmark": "plan_scale",
        "lengths": next(iter(LENGTH_SETS)),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "hardware": machine,
        "versions": versions(*_LIBRARIES),
        "sizes": sizes,
    }
    result["bars"] = bars(result)
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def _lacking(size: int, folder: Path) -> str:
    """Why this machine has no room for a corpus of so many utterances; empty if it has."""
    disk, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().available
    if disk < _BYTES_AN_UTTERANCE * size:
        return f"needs {_BYTES_AN_UTTERANCE * size / 1e9:.1f} GB of disk, {disk / 1e9:.1f} are free (--folder)"
    if memory < _BYTES_AN_UTTERANCE * size / 2:
        return f"needs {_BYTES_AN_UTTERANCE * size / 2e9:.1f} GB of memory to build, {memory / 1e9:.1f} are free"
    return ""


def _measure(size: int, folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything about one number of utterances."""
    path = folder / str(size)
    if not path.exists():
        _alone(build, size, scratch / "lengths.npy", path)
        (scratch / "lengths.npy").unlink()
    starts: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for world_size in arguments.ranks:
        _alone(start, path, world_size, 0.0)  # fills the caches of everything but the index
        cold: dict[str, list[Start]] = {place: [] for place in PLACES}
        warm: dict[str, list[Start]] = {place: [] for place in PLACES}
        for number in range(arguments.rounds):
            for place in list(PLACES) if number % 2 == 0 else reversed(PLACES):
                _forget(path)
                cold[place].append(_alone(start, path, world_size, PLACES[place]))
                warm[place].append(_alone(start, path, world_size, PLACES[place]))
        starts[str(world_size)] = {
            place: {"cold": _summarised(cold[place]), "warm": _summarised(warm[place])} for place in PLACES
        }
        _forget(path)
        in_steps = _alone(time_steps, path, world_size, arguments.steps)
        steps[str(world_size)] = {when: spread(found) for when, found in in_steps.items()}
    return {"built": _about(path), "starts": starts, "step_ms": steps}


def _alone(function: Any, *arguments: Any) -> Any:
    """Call a function in a fresh process: nothing is imported, allocated or cached there."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _summarised(starts: Sequence[Start]) -> dict[str, Any]:
    rows = [asdict(each) for each in starts]
    timed = {name: spread([row[name] for row in rows]) for name in ("import_s", "units_s")}
    return timed | {name: max(row[name] for row in rows) for name in rows[0] if name not in timed}


def _forget(path: Path) -> None:
    """Ask the system to drop an index's pages from its cache, so that the next read comes from the disk."""
    for file in path.glob("*.npy"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- what runs in processes of its own --------------------------------------------------------------------------


def build(size: int, lengths: Path, path: Path) -> None:
    """Write the lengths of a corpus, map them, and build its index from that, as `prepare` does once."""
    from asr_train.data.lengths import LengthIndex  # noqa: PLC0415 - timed apart in `start`

    mapped = np.lib.format.open_memmap(lengths, mode="w+", dtype=np.int32, shape=(size,))
    first = 0
    for block in length_blocks(next(iter(LENGTH_SETS)), size):
        mapped[first : first + len(block)] = block
        first += len(block)
    mapped.flush()
    del mapped
    reset_peak_memory()
    clock = time.perf_counter()
    LengthIndex.build(np.load(lengths, mmap_mode="r")).save(path)
    seconds, memory = time.perf_counter() - clock, memory_bytes()
    os.sync()  # pages that are not written yet could not be forgotten
    about = {"seconds": seconds, "peak_bytes": memory["peak"], "index_bytes": _bytes_under(path)}
    write_json(path / "built.json", about)


def _about(path: Path) -> dict[str, Any]:
    """How an index was built, and how large it is."""
    from asr_train.files import read_json  # noqa: PLC0415

    try:
        return dict(read_json(path / "built.json"))
    except OSError as error:
        raise WavefleetError(f"{path} is not an index that this benchmark built: {error}") from error


def _bytes_under(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def start(path: Path, world_size: int, position: float) -> Start:
    """The first rank, which has as many units as any, begins at a position of epoch 1.

    What is there at the end is what its loader needs first.
    """
    clock = time.perf_counter()
    from asr_train.data.plan import units_of_rank  # noqa: PLC0415

    import_s = time.perf_counter() - clock
    reset_peak_memory()
    before = memory_bytes()
    clock = time.perf_counter()
    plan = _open_plan(path, world_size)
    step = int(plan.steps_per_epoch * position)
    turns = units_of_rank(plan.num_units_in(1, step), 0, world_size)
    units = [plan.unit(1, step, turn) for turn in turns if turn is not None]
    units_s = time.perf_counter() - clock
    after = memory_bytes()
    return Start(
        import_s=import_s,
        units_s=units_s,
        num_ids=sum(len(unit.ids) for unit in units),
        peak_bytes=after["peak"],
        own_bytes=after["own"],
        mapped_bytes=after["mapped"],
        grown_bytes=after["peak"] - before["now"],
    )


def time_steps(path: Path, world_size: int, num_steps: int) -> dict[str, list[float]]:
    """Milliseconds in which a rank that is under way finds its units of a step: random steps, and the same again."""
    from asr_train.data.plan import units_of_rank  # noqa: PLC0415

    plan = _open_plan(path, world_size)
    steps = np.random.default_rng(0).permutation(plan.steps_per_epoch)[:num_steps].tolist()
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for when, step in [("cold", step) for step in steps] + [("warm", step) for step in steps]:
        clock = time.perf_counter()
        turns = units_of_rank(plan.num_units_in(0, step), 0, world_size)
        for turn in turns:
            if turn is not None:
                plan.unit(0, step, turn)
        found[when].append((time.perf_counter() - clock) * 1e3)
    return found


def _open_plan(path: Path, world_size: int) -> Any:
    from asr_train.data.plan import LengthIndex, Plan, PlanSettings  # noqa: PLC0415

    settings = PlanSettings(
        unit_audio_s=UNIT_AUDIO_S,
        unit_utterances=None,
        units_per_step=max(world_size, UNITS_PER_STEP),
        order="cost",
        quadratic=QUADRATIC,
    )
    return Plan(LengthIndex.open(path), settings, seed=0)


# --- what is shown ----------------------------------------------------------------------------------------------


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected, and whether it was found; judged to two decimals, as it is shown."""
    entries: list[tuple[str, float, float]] = []
    for found in result["sizes"]:
        if "not_run" in found:
            continue
        name = _power(found["utterances"])
        if found["utterances"] == BAR_SIZE:
            firsts = {world: places["first step"]["cold"] for world, places in found["starts"].items()}
            worst = max(firsts, key=lambda world: firsts[world]["units_s"]["median"])
            entries += [
                (f"10^8 utterances, first step's units, nothing cached, slowest W ({worst}): seconds",
                 firsts[worst]["units_s"]["median"], BAR_S),
                ("the same, peak memory, imports and mapped pages in it: GB",
                 max(each["peak_bytes"] for each in firsts.values()) / 1e9, BAR_BYTES / 1e9),
            ]  # fmt: skip
        step_ms = found["step_ms"].get(str(BAR_STEP_WORLD))
        entries += [
            (f"{name} utterances, time at a later position beside that of the first step: times",
             max(_place_ratio(found, place) for place in PLACES), BAR_PLACE_RATIO),
            *([(f"{name} utterances, a rank's units of a step at W = {BAR_STEP_WORLD}, cached: milliseconds",
               step_ms["warm"]["median"], BAR_STEP_MS)] if step_ms else []),
        ]  # fmt: skip
    return [
        {"bar": bar, "at_most": limit, "found": round(value, 2), "met": round(value, 2) <= limit}
        for bar, value, limit in entries
    ]


def _place_ratio(found: dict[str, Any], place: str) -> float:
    """Time to start at a place beside the first step, runs of one round: the median over rounds and W, all cached."""
    ratios = [
        later / first
        for places in found["starts"].values()
        for later, first in zip(
            places[place]["warm"]["units_s"]["runs"], places["first step"]["warm"]["units_s"]["runs"], strict=True
        )
    ]
    return statistics.median(ratios)


def _power(size: int) -> str:
    exponent = len(str(size)) - 1
    return f"10^{exponent}" if size == 10**exponent else f"{size:,}"


def render(result: dict[str, Any]) -> str:
    """The tables, and the bars, as Markdown."""
    rows, built = [], []
    for found in result["sizes"]:
        name = _power(found["utterances"])
        if "not_run" in found:
            rows.append([name, "", f"not run: {found['not_run']}", *[""] * 7])
            continue
        about = found["built"]
        index_mb, peak_mb = about["index_bytes"] / 1e6, about["peak_bytes"] / 1e6
        built.append([name, f"{index_mb:,.0f}", f"{about['seconds']:,.1f}", f"{peak_mb:,.0f}"])
        for world, places in found["starts"].items():
            first, middle, late = (places[place] for place in PLACES)
            cold = first["cold"]
            rows.append(
                [
                    name,
                    world,
                    shown(cold["units_s"], ".3f"),
                    shown(first["warm"]["units_s"], ".3f"),
                    shown(middle["warm"]["units_s"], ".3f"),
                    shown(late["warm"]["units_s"], ".3f"),
                    shown(found["step_ms"][world]["cold"], ".2f"),
                    shown(found["step_ms"][world]["warm"], ".2f"),
                    f"{cold['peak_bytes'] / 1e6:,.0f}",
                    f"{cold['mapped_bytes'] / 1e6:,.0f}",
                ]
            )
    columns = (
        "utterances", "W", "s, first step, nothing cached", "s, first step", "s, mid-epoch", "s, at 90 %",
        "ms a further step, nothing cached", "ms, cached", "MB, peak", "MB mapped",
    )  # fmt: skip
    machine = result["hardware"]
    return "\n".join(
        [
            *markdown(columns, rows),
            "",
            *markdown(("utterances", "MB of index", "s to build it, once", "MB, peak"), built),
            "",
            f"{result['lengths']} lengths; {machine['cpu']}, {machine['cores']} cores, load average "
            f"{machine['load_average_before'][0]:g}; medians and quartiles of {result['rounds']} starts and "
            f"{result['steps']} steps each.",
            "",
            *shown_bars(result["bars"]),
        ]
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
