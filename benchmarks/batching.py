"""`python benchmarks/batching.py`: what batching costs at 1 to 4096 ranks, beside what others do, without a model.

Every variant's own code makes its batches; a step is as long as its slowest rank, by the model's FLOP count.
benchmarks/README.md says what the columns are.
"""

import argparse
import gc
import multiprocessing
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from batching_variants import STRIDE_SAMPLES, VARIANTS, Step, Task
from length_sets import LENGTH_SETS, length_set
from measuring import count, hardware, markdown, memory_bytes, shown, shown_bars, spread, versions

from asr_train.data import shapes
from asr_train.data.lengths import LengthIndex
from asr_train.errors import EXIT_DONE, run_main
from asr_train.estimate import quadratic_share
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE

RESULTS = Path(__file__).resolve().parent / "results" / "batching.json"
UNITS_S = (200, 50, 100)  # of audio; the bars are for the first
CASES = ((512, 1), (512, 8), (512, 64), (512, 512), (4096, 4096))  # units a step, ranks
FEWER_CASES = ((512, 512),)  # of the peers, at other units than the first
SINGLE_CASES = ((8, 8), (64, 64))  # no accumulation
JUDGED = ((512, 512), (4096, 4096))
MIN_SHARE = {8: 0.97, 64: 0.96, 512: 0.96, 4096: 0.95}  # expected of the plan, by ranks
MAX_PADDING, MAX_SHAPES, MAX_SPREAD, MIN_STEPS = 0.015, 300, 0.3, 50
_FIRST_STEP = 3  # times the limit
_MIN_STEPS_FOR_SPREAD = 4  # shown; fewer say nothing
_ROOM = 1.1  # utterances beyond those of the steps that are replayed, for a last step that is not full
KNOBS: dict[str, tuple[Any, ...]] = {  # constants of the plan's shapes: what the frontier is drawn over
    "_MAX_SHAPES": (64, 128, 256, 512),
    "_TOLERANCE": (0.005, 0.015, 0.03),
    "_MAX_TARGETS": (1, 3, 8),
}
_LIBRARIES = ("wavefleet", "transformers", "accelerate", "torch", "numpy")


class _OutOfTimeError(Exception):
    """A variant took longer than it was given."""


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/batching.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=count, default=8,
                        help="seconds a slow peer has a case, and up to three times as many for its first step "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=count, default=3, help="runs where times are shown (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="8 units a step, few steps: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    machine = hardware()
    quadratic = _quadratic()
    missing = [variant.name for variant in VARIANTS.values() if not variant.is_here]
    for name in missing:
        print(f"not installed, so not run: {name}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as folder:
        replays = list(_replays(Path(folder), quadratic, arguments))
        frontier = _frontier(Path(folder), quadratic, arguments.smoke)
    result: dict[str, Any] = {
        "benchmark": "batching",
        "quadratic": quadratic,
        "limit_s": arguments.limit,
        "rounds": arguments.rounds,
        "hardware": machine,
        "versions": versions(*_LIBRARIES) | {"lhotse": _version_or_none("lhotse")},
        "missing": missing,
        "replays": replays,
        "frontier": frontier,
    }
    result["bars"] = bars(replays)
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def _quadratic() -> float:
    """What attention adds to the cost of a frame, in wav2vec2-base with a frozen feature encoder."""
    from transformers import Wav2Vec2Config  # noqa: PLC0415 - --help needs none

    return quadratic_share(Wav2Vec2Config().to_dict())


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- replaying --------------------------------------------------------------------------------------------------


def _replays(folder: Path, quadratic: float, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every set, unit size, case and variant that is installed."""
    here = [key for key, variant in VARIANTS.items() if variant.is_here]
    for unit_s, name in product(UNITS_S, LENGTH_SETS):
        cases = (*CASES, *SINGLE_CASES) if unit_s == UNITS_S[0] else CASES
        if arguments.smoke:
            cases = ((8, 1), (8, 8)) if unit_s == UNITS_S[0] else ()
        for units_per_step, world_size in cases:
            case = (units_per_step, world_size)
            task = _task(folder, name, unit_s, case, quadratic, 4 if arguments.smoke else MIN_STEPS)
            all_run = unit_s == UNITS_S[0] or case in FEWER_CASES
            runs: dict[str, list[dict[str, Any]]] = {key: [] for key in here if all_run or key == "plan"}
            is_timed = unit_s == UNITS_S[0] and case == JUDGED[0]
            for number in range(arguments.rounds if is_timed else 1):
                for key in list(runs) if number % 2 == 0 else reversed(runs):
                    if number and VARIANTS[key].takes_long:
                        continue  # its time is far from all others', and one run takes all of the limit
                    limit_s = arguments.limit if VARIANTS[key].takes_long else None
                    runs[key].append(_alone(key, task, limit_s))
            print(f"{name}, units of {unit_s} s, W = {world_size}, G = {units_per_step}", file=sys.stderr, flush=True)
            for key, found in runs.items():
                yield {
                    "set": name, "unit_audio_s": unit_s, "units_per_step": units_per_step, "ranks": world_size,
                    "variant": key, "utterances": len(task.lengths),
                    **max(found, key=lambda run: run["steps"]),  # the same in all but for how far it came
                    "plan_us": spread([run["plan_us"] for run in found]) if found[0]["steps"] else None,
                }  # fmt: skip


def _task(folder: Path, name: str, unit_s: int, case: tuple[int, int], quadratic: float, num_steps: int) -> Task:
    """Enough utterances for so many steps."""
    units_per_step, world_size = case
    mean_samples = float(length_set(name, 100_000).mean())
    lengths = length_set(name, ceil(_ROOM * num_steps * units_per_step * unit_s * SAMPLE_RATE / mean_samples))
    index = folder / f"{list(LENGTH_SETS).index(name)}-{len(lengths)}"
    if not index.exists():
        LengthIndex.build(lengths).save(index)
    return Task(lengths, index, unit_s, units_per_step, world_size, quadratic)


def _alone(key: str, task: Task, limit_s: float | None) -> dict[str, Any]:
    """Replay in a process of its own, forked, so that memory is its own and imports are paid already."""
    for package in ("transformers.trainer_pt_utils", "lhotse.dataset"):
        with suppress(ImportError):
            __import__(package)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(replay(key, task, limit_s)))
    gc.collect()
    gc.freeze()  # the child's collector would otherwise touch, and so copy, what it has from here
    process.start()
    send.close()
    try:
        return dict(receive.recv())
    finally:
        process.join()


def replay(key: str, task: Task, limit_s: float | None) -> dict[str, Any]:
    """Run a variant's steps, as many as come within the limit, and add up what they would cost."""
    sums = _Sums(task)
    plan_s, limit_s = 0.0, limit_s or float("inf")
    with _watched_memory() as own_bytes, suppress(_OutOfTimeError, StopIteration), _time_limit(_FIRST_STEP * limit_s):
        clock = time.perf_counter()
        steps = VARIANTS[key].steps(task)
        while plan_s < limit_s:
            step = next(steps)
            plan_s += time.perf_counter() - clock if step.rank_s is None else step.rank_s
            sums.add(step)
            clock = time.perf_counter()
    return sums.summary(plan_s) | {"own_bytes": max(own_bytes) - own_bytes[0]}


class _Sums:
    """What the steps so far would cost, and how mixed they were."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._audio = self._padded = self._cost = self._slowest = 0.0
        self._ratios: list[float] = []
        self._means: list[float] = []
        self._shapes: set[tuple[int, int]] = set()
        self._num_utterances = 0

    def add(self, step: Step) -> None:
        task = self._task
        lengths = task.lengths[step.ids].astype(np.float64)
        firsts = np.cumsum(step.sizes) - step.sizes
        padded = np.maximum.reduceat(lengths, firsts) if step.padded_samples is None else step.padded_samples
        costs = step.sizes * self._costs(padded)
        idle = np.zeros(-len(costs) % task.world_size)  # ranks without a unit in the last turn
        of_ranks = np.append(costs, idle).reshape(-1, task.world_size).sum(axis=0)
        self._slowest += task.world_size * float(of_ranks.max())
        self._ratios.append(float(of_ranks.max() / of_ranks.mean()))
        self._cost += float(self._costs(lengths).sum())
        self._audio += float(lengths.sum())
        self._padded += float((step.sizes * padded).sum())
        self._means.append(float(lengths.mean()))
        self._shapes |= set(zip(step.sizes.tolist(), padded.tolist(), strict=True))
        self._num_utterances += len(lengths)

    def _costs(self, samples: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
        frames = samples / STRIDE_SAMPLES
        return frames + self._task.quadratic * frames**2

    def summary(self, plan_s: float) -> dict[str, Any]:
        """Shares and ratios; only the count of steps if there were none."""
        names = ("share", "padding", "max_to_mean", "shapes", "spread", "spread_to_random", "plan_us")
        num_steps = len(self._means)
        if not num_steps:
            return {"steps": 0, **dict.fromkeys(names)}
        corpus_std = float(self._task.lengths.std(dtype=np.float64))
        spread_of_means = float(np.std(self._means))
        of_random = corpus_std / (self._num_utterances / num_steps) ** 0.5
        values = (
            self._cost / self._slowest,
            1 - self._audio / self._padded,
            float(np.mean(self._ratios)),
            len(self._shapes),
            spread_of_means / corpus_std,
            spread_of_means / of_random,
            plan_s / self._num_utterances * 1e6,
        )
        return {"steps": num_steps, **dict(zip(names, values, strict=True))}


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def out_of_time(number: int, frame: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds if isfinite(seconds) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """The process's own memory, mapped files not in it, 50 times a second; the first is from before."""
    found = [memory_bytes()["own"]]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found.append(memory_bytes()["own"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(memory_bytes()["own"])


# --- the frontier -----------------------------------------------------------------------------------------------


def _frontier(folder: Path, quadratic: float, smoke: bool) -> list[dict[str, Any]]:
    """The plan with other constants, the worst of the three sets each; which of them no other beats in everything."""
    default = tuple(getattr(shapes, name) for name in KNOBS)
    choices = list(product(*KNOBS.values())) if not smoke else [default, tuple(values[0] for values in KNOBS.values())]
    case = (8, 8) if smoke else JUDGED[0]
    tasks = [_task(folder, name, UNITS_S[0], case, quadratic, 4 if smoke else MIN_STEPS) for name in LENGTH_SETS]
    points = []
    for choice in choices if default in choices else [default, *choices]:
        with _changed(choice):
            found = [replay("plan", task, None) for task in tasks]
        worst = {name: max(each[name] for each in found) for name in ("padding", "shapes", "spread")}
        share = min(each["share"] for each in found)
        knobs = {name.lstrip("_").lower(): value for name, value in zip(KNOBS, choice, strict=True)}
        points.append({**knobs, "share": share, **worst, "is_default": choice == default})
    for point in points:
        point["on_frontier"] = not any(_beats(other, point) for other in points)
    return points


@contextmanager
def _changed(choice: tuple[Any, ...]) -> Iterator[None]:
    before = {name: getattr(shapes, name) for name in KNOBS}
    try:
        for name, value in zip(KNOBS, choice, strict=True):
            setattr(shapes, name, value)
        shapes._MIN_TARGETS, least = min(shapes._MIN_TARGETS, shapes._MAX_TARGETS), shapes._MIN_TARGETS
        yield
    finally:
        shapes._MIN_TARGETS = least
        for name, value in before.items():
            setattr(shapes, name, value)


def _goodness(point: dict[str, Any]) -> tuple[float, ...]:
    """Larger is better, as far as the table shows it: share, padding, shapes, spread."""
    return round(point["share"], 3), -round(point["padding"], 3), -point["shapes"], -round(point["spread"], 2)


def _beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
    theirs, ours = _goodness(other), _goodness(point)
    return theirs != ours and all(a >= b for a, b in zip(theirs, ours, strict=True))


# --- what is shown ----------------------------------------------------------------------------------------------


def bars(replays: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was expected of the plan, and whether it was found."""
    entries: list[dict[str, Any]] = []

    def add(bar: str, found: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        limit = {"at_most": at_most} if at_least is None else {"at_least": at_least}
        met = found <= at_most if at_most is not None else found >= (at_least or 0)
        entries.append({"bar": bar, **limit, "found": found, "met": met})

    for row in replays:
        case = (row["units_per_step"], row["ranks"])
        if row["variant"] != "plan" or row["unit_audio_s"] != UNITS_S[0] or case in SINGLE_CASES:
            continue
        where = f"{row['set']}, W = {row['ranks']}"
        if case in CASES and row["ranks"] in MIN_SHARE:
            at_least = 100 * MIN_SHARE[row["ranks"]]
            add(f"{where}: useful share, %", round(100 * row["share"], 2), at_least=at_least)
        if case in JUDGED:
            add(f"{where}: padding, %", round(100 * row["padding"], 2), at_most=100 * MAX_PADDING)
            add(f"{where}: shapes", row["shapes"], at_most=MAX_SHAPES)
            add(f"{where}: spread of steps' mean lengths", round(row["spread"], 2), at_most=MAX_SPREAD)
            add(f"{where}: steps", row["steps"], at_least=MIN_STEPS)
    return entries


def render(result: dict[str, Any]) -> str:
    """The tables, and the bars, as Markdown."""
    lines = []
    for unit_s in UNITS_S:
        rows = [row for row in result["replays"] if row["unit_audio_s"] == unit_s]
        if rows:
            lines += [f"Units of {unit_s} s:", "", *_table(rows), ""]
    lines += [f"The plan's constants at W = G = 512 and units of {UNITS_S[0]} s, worst of the three sets:", ""]
    lines += [*_frontier_table(result["frontier"]), ""]
    machine = result["hardware"]
    first_s = _FIRST_STEP * result["limit_s"]
    missing = f" Not installed, so not run: {', '.join(result['missing'])}." if result["missing"] else ""
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average_before'][0]:g}; planning: "
        f"medians and quartiles of {result['rounds']} runs. batch_rebalance and lhotse ran once, for as many steps as "
        f"came within {result['limit_s']} s, or for the first one, if that came within {first_s} s; "
        f"where none did, it says so.{missing}",
        "",
        *shown_bars(result["bars"]),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each set and variant: shares by ranks, and all else at as many ranks as a step has units."""
    cases = list(dict.fromkeys((row["units_per_step"], row["ranks"]) for row in rows))
    found = {(row["set"], row["variant"], row["units_per_step"], row["ranks"]): row for row in rows}
    judged = JUDGED[0] if JUDGED[0] in cases else cases[-1]
    cells = []
    for name, key in dict.fromkeys((row["set"], row["variant"]) for row in rows):
        shares = [_share(found.get((name, key, *case))) for case in cases]
        row = found.get((name, key, *judged))
        others = [""] * 8 if row is None else _others(row)
        cells.append([name, VARIANTS[key].name, *shares, *others])
    columns = [
        "lengths", "batched by", *(f"W={ranks}, G={units}" for units, ranks in cases), "steps", "padding, %",
        "max/mean", "shapes", "spread", "of random's", "us to plan", "own B",
    ]  # fmt: skip
    return markdown(columns, cells, num_left=2)


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['share']:.1f}" if row["steps"] else "no step"


def _others(row: dict[str, Any]) -> list[str]:
    if not row["steps"]:
        return ["0", *[""] * 7]
    return [
        str(row["steps"]),
        f"{100 * row['padding']:.1f}",
        f"{row['max_to_mean']:.3f}",
        f"{row['shapes']:,}",
        f"{row['spread']:.2f}" if row["steps"] >= _MIN_STEPS_FOR_SPREAD else "",
        f"{row['spread_to_random']:.1f}" if row["steps"] >= _MIN_STEPS_FOR_SPREAD else "",
        shown(row["plan_us"], ".2f"),
        f"{row['own_bytes'] / row['utterances']:.0f}",
    ]


def _frontier_table(points: Sequence[dict[str, Any]]) -> list[str]:
    shown_points = {_goodness(point): point for point in points if point["on_frontier"]}  # one of equal ones
    shown_points |= {_goodness(point): point for point in points if point["is_default"]}
    rows = [
        [
            f"{point['max_shapes']}{' (default)' if point['is_default'] else ''}",
            f"{100 * point['tolerance']:g}",
            str(point["max_targets"]),
            f"{100 * point['share']:.1f}",
            f"{100 * point['padding']:.1f}",
            str(point["shapes"]),
            f"{point['spread']:.2f}",
            "yes" if point["on_frontier"] else "no",
        ]
        for point in sorted(shown_points.values(), key=lambda point: point["shapes"])
    ]
    columns = (
        "shapes, at most", "tolerance, %", "targets, at most", "share, %", "padding, %", "shapes", "spread",
        "on the frontier",
    )  # fmt: skip
    return markdown(columns, rows)


if __name__ == "__main__":
    sys.exit(run_main(main))
