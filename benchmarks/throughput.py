"""`python benchmarks/throughput.py`: training end to end on CPU, beside transformers' Trainer and an accelerate loop.

Every variant trains the same model on the same utterances, in short slices by turns, at 1 and at 2 processes.
benchmarks/README.md says what is counted.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import throughput_data as data
import torch
from measuring import count, hardware, markdown, shown, shown_bars, spread, versions
from throughput_arena import CLOSE_TURNS, Contestant, Turn, by_turns, contest
from throughput_data import Speech
from throughput_variants import VARIANTS, Task, Tuning, epoch_steps

from asr_train.data.telephone import SOUNDS
from asr_train.errors import EXIT_DONE, WavefleetError, run_main
from asr_train.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "throughput.json"
PEERS = {"guide": 1.5, "tuned": 1.3, "bare": 0.95}  # expected of ours, as multiples of theirs
MAX_DATA_WAIT = 0.01
MAX_FIRST_STEP = {"guide": 0.5, "tuned": 1.0}
STARTING = ("guide", "tuned", "accelerate", "ours")  # on the many short utterances
CLOSE = ("ours", "bare")
WORKERS = (0, 1)  # of Trainer, what the expert tries; ours has its default of one
IMPORTS = {
    "ours": "import asr_train.train; from transformers import Wav2Vec2ForCTC",
    "theirs": "import datasets; from transformers import Trainer, TrainingArguments, Wav2Vec2ForCTC, Wav2Vec2Processor",
}
_LIBRARIES = ("wavefleet", "torch", "transformers", "accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class Size:
    """How much is run."""

    rounds: int
    starts: int  # timed
    batch: int  # utterances, twice a step, in the guide
    base_batch: int  # of the base model
    prompts: int  # utterances
    base_prompts: int
    librispeech: int
    short: tuple[int, int]  # utterances, and how often they are there


FULL = Size(
    rounds=2, starts=3, batch=8, base_batch=2, prompts=160, base_prompts=12, librispeech=64, short=(500, 100)
)  # fmt: skip
SMOKE = Size(rounds=1, starts=1, batch=2, base_batch=0, prompts=48, base_prompts=0, librispeech=0, short=(40, 2))
_BASE_ROUNDS = 1  # at most


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/throughput.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=count, default=FULL.rounds, help="slices each (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one process, one step a slice: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    size = SMOKE if arguments.smoke else replace(FULL, rounds=arguments.rounds)
    torch.set_num_threads(1)
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        result: dict[str, Any] = {
            "benchmark": "throughput",
            "rounds": size.rounds,
            "starts": size.starts,
            "hardware": machine,
            "versions": versions(*_LIBRARIES),
        }
        for found in measure(Path(name), size):  # written as it goes on, so that nothing is lost of what was measured
            result |= found
            result["bars"] = bars(result)
            write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


def measure(folder: Path, size: Size) -> Iterator[dict[str, Any]]:
    """All that is measured so far, time and again, in the order of the tables."""
    is_smoke = size == SMOKE
    speech = apart(partial(_prepared, folder, size))
    tuning = Tuning(size.batch)
    task = Task(speech["prompts"], "tiny", size.batch, 2, 1, tuning, tuning, folder)
    found: dict[str, Any] = {"tunings": [], "rows": [], "imports": imports(0 if is_smoke else size.starts)}
    found["starting"] = first_steps(replace(task, speech=speech["short"]), size)
    yield found
    for ranks in (1,) if is_smoke else (1, 2):
        here = replace(task, world_size=ranks)
        tasks = [here]
        if not is_smoke:
            tasks.append(replace(here, speech=speech["librispeech"]))
        if not is_smoke and ranks == 1:
            tasks.append(replace(here, speech=speech["few"], size="base", batch=size.base_batch))
        for each in tasks:
            tuned = each
            if not is_smoke:
                tried, tuned = tune(each)
                found["tunings"] += tried
            rounds = size.rounds if each.size == "tiny" else min(_BASE_ROUNDS, size.rounds)
            found["rows"] += compare(tuned, rounds, is_smoke=is_smoke)
            yield found


def apart(function: Callable[[], Any]) -> Any:
    """Call a function in a process of its own, so that this one, which is copied, stays as it is."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(function).result()


def _prepared(folder: Path, size: Size) -> dict[str, Speech]:
    """The sets of utterances and their models, as far as they are wanted."""
    is_recorded = SOUNDS.is_dir()
    name, clips = ("telephone prompts", data.prompt_clips) if is_recorded else ("demo speech", data.demo_clips)
    short, copies = size.short
    found = {
        "prompts": data.make_speech(folder, name, clips(), most=size.prompts),
        "short": data.make_speech(folder, "1 to 2 s", data.short_clips(short), most=short, copies=copies),
    }
    if size != SMOKE:
        most = size.librispeech
        found["few"] = data.make_speech(folder, f"few {name}", clips(), most=size.base_prompts, size="base")
        found["librispeech"] = data.make_speech(folder, "LibriSpeech-like", data.librispeech_clips(most), most=most)
    return found


# --- measuring --------------------------------------------------------------------------------------------------


def tune(task: Task) -> tuple[list[dict[str, Any]], Task]:
    """What the expert tried, and the task with what was fastest: parts of a step on both sides, Trainer's workers."""
    parts = [Tuning(batch) for batch in task.batches]
    tried = _try("tuned", task, parts)
    batch = _fastest(tried).batch
    tried += _try("tuned", task, [Tuning(batch, workers) for workers in WORKERS if workers != Tuning(batch).workers])
    ours = _try("ours", task, parts)
    return tried + ours, replace(task, trainer=_fastest(tried), ours=_fastest(ours))


def _try(variant: str, task: Task, choices: Sequence[Tuning]) -> list[dict[str, Any]]:
    """An epoch of each choice, after two steps that are not counted."""
    tasks = {one: replace(task, trainer=one, ours=one) for one in choices}
    steps = {one: apart(partial(epoch_steps, variant, tasks[one])) for one in choices}
    with contest({one: (variant, tasks[one]) for one in choices}) as found:
        for contestant in found.values():
            contestant.train(1)
        turns = by_turns(found, 1, steps)
    tried = [
        {
            "set": task.speech.name, "model": task.size, "ranks": task.world_size, "variant": variant,
            "tuning": asdict(one), "audio_s_per_s": turn.audio_s_per_s,
        }
        for one, (turn,) in turns.items()
    ]  # fmt: skip
    for one in tried:
        print(f"{one['set']}, {task.size}, {task.world_size}: {variant}, {one['tuning']} {one['audio_s_per_s']:.1f}",
              file=sys.stderr, flush=True)  # fmt: skip
    return tried


def _fastest(tried: Sequence[dict[str, Any]]) -> Tuning:
    return Tuning(**max(tried, key=lambda one: one["audio_s_per_s"])["tuning"])


def compare(task: Task, rounds: int, *, is_smoke: bool = False) -> list[dict[str, Any]]:
    """A row for each variant, all on the same task; the first epoch of each is not counted."""
    steps = {variant: 1 if is_smoke else apart(partial(epoch_steps, variant, task)) for variant in VARIANTS}
    with contest({variant: (variant, task) for variant in VARIANTS}) as found:
        for variant, contestant in found.items():
            contestant.train(steps[variant])
        turns = by_turns(found, rounds, steps, close=CLOSE)
        firsts = {variant: contestant.first for variant, contestant in found.items()}
    rows = []
    for variant, slices in turns.items():
        row = {
            "set": task.speech.name, "model": task.size, "ranks": task.world_size, "variant": variant,
            "batch": _batch(variant, task), "utterances": task.speech.utterances, "audio_s": task.speech.audio_s,
            "steps": sum(turn.steps for turn in slices),
            "audio_s_per_s": spread([turn.audio_s_per_s for turn in slices]),
            "audio_s_per_cpu_s": spread([turn.audio_s_per_cpu_s for turn in slices]),
            "ours_to_this": spread(ratios(turns["ours"], slices)),
            "padding": 1 - sum(turn.audio_s for turn in slices) / sum(turn.padded_audio_s for turn in slices),
            "data_wait": sum(turn.data_wait * turn.seconds for turn in slices) / sum(turn.seconds for turn in slices),
            "peak_bytes": max(turn.rank_bytes for turn in [firsts[variant], *slices]),
            "first_step_s": firsts[variant].seconds,
        }  # fmt: skip
        rows.append(row)
        print(f"{row['set']}, {task.size}, {task.world_size}: {variant} {row['audio_s_per_s']['median']:.1f} audio-s/s",
              file=sys.stderr, flush=True)  # fmt: skip
    return rows


def ratios(ours: Sequence[Turn], theirs: Sequence[Turn]) -> list[float]:
    """Of each of theirs, how much faster the slices of ours in that time were: as many as theirs, or several each."""
    each = len(ours) // len(theirs)
    return [
        median(turn.audio_s_per_s for turn in ours[place * each : (place + 1) * each]) / other.audio_s_per_s
        for place, other in enumerate(theirs)
    ]


def _batch(variant: str, task: Task) -> str:
    """Utterances a batch times batches a step, of one rank; ours by its units."""
    if variant in CLOSE:
        values = task.recipe_values
        return f"{values['unit_audio_s']:.0f} s x {values['units_per_step'] // task.world_size}"
    step = task.batch * task.accumulation
    batch = task.trainer.batch if variant == "tuned" else task.batch
    return f"{batch} x {step // batch}"


def first_steps(task: Task, size: Size) -> list[dict[str, Any]]:
    """Seconds from the fork of a process that has imported everything to the end of its first step."""
    runs: dict[str, list[Turn]] = {variant: [] for variant in STARTING}
    for number in range(size.starts):
        for variant in STARTING if number % 2 == 0 else reversed(STARTING):
            if variant == "guide" and number:
                continue  # it takes minutes, all others seconds
            contestant = Contestant(variant, task)
            contestant.close()
            runs[variant].append(contestant.first)
            print(f"first step: {variant} {contestant.first.seconds:.1f} s", file=sys.stderr, flush=True)
    return [
        {
            "variant": variant, "utterances": task.speech.utterances, "audio_s": task.speech.audio_s,
            "seconds": spread([turn.seconds for turn in turns]), "peak_bytes": max(turn.rank_bytes for turn in turns),
        }
        for variant, turns in runs.items()
    ]  # fmt: skip


def imports(rounds: int) -> list[dict[str, Any]]:
    """Seconds to import what each side needs, in a fresh process, forth and back."""
    runs: dict[str, list[float]] = {side: [] for side in IMPORTS}
    for number in range(rounds):
        for side in IMPORTS if number % 2 == 0 else reversed(IMPORTS):
            program = f"import time; start = time.monotonic(); {IMPORTS[side]}; print(time.monotonic() - start)"
            done = subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise WavefleetError(f"{IMPORTS[side]} failed: {done.stderr}")
            runs[side].append(float(done.stdout.split()[-1]))
    return [{"side": side, "seconds": spread(seconds)} for side, seconds in runs.items() if seconds]


# --- what is shown ----------------------------------------------------------------------------------------------


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected, and whether it was found; judged to two decimals, as it is shown."""
    entries: list[dict[str, Any]] = []
    for row in result["rows"]:
        where = f"{row['set']}, {row['model']}, {row['ranks']} {'process' if row['ranks'] == 1 else 'processes'}"
        if row["variant"] in PEERS:
            found, at_least = round(row["ours_to_this"]["median"], 2), PEERS[row["variant"]]
            bar = f"{where}: ours beside {VARIANTS[row['variant']].name}"
            entries.append({"bar": bar, "at_least": at_least, "found": found, "met": found >= at_least})
        if row["variant"] == "ours":
            found, at_most = round(100 * row["data_wait"], 2), 100 * MAX_DATA_WAIT
            bar = f"{where}: ours, waiting for data, %"
            entries.append({"bar": bar, "at_most": at_most, "found": found, "met": found <= at_most})
    seconds = {row["variant"]: row["seconds"]["median"] for row in result["starting"]}
    for variant, at_most in MAX_FIRST_STEP.items():
        found = round(seconds["ours"] / seconds[variant], 2)
        bar = f"time to the first step beside {VARIANTS[variant].name}"
        entries.append({"bar": bar, "at_most": at_most, "found": found, "met": found <= at_most})
    return entries


def render(result: dict[str, Any]) -> str:
    """The tables, and the bars, as Markdown."""
    lines: list[str] = []
    for name, model in dict.fromkeys((row["set"], row["model"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["set"], row["model"]) == (name, model)]
        about = f"{rows[0]['utterances']:,} utterances, {rows[0]['audio_s']:,.0f} s"
        lines += [f"{name} ({about}), {model} model:", "", *_table(rows), ""]
    lines += [*_starting_table(result), ""]
    machine = result["hardware"]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores, one thread a process, load average "
        f"{machine['load_average_before'][0]:g}; medians and quartiles of {result['rounds']} epochs, "
        f"{CLOSE_TURNS} times as many of ours and of the bare loop; of the base model "
        f"{min(_BASE_ROUNDS, result['rounds'])}, and {CLOSE_TURNS} times as many.",
        "",
        *_tried(result["tunings"]),
        *shown_bars(result["bars"]),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [
            VARIANTS[row["variant"]].name,
            str(row["ranks"]),
            row["batch"],
            shown(row["audio_s_per_s"], ".1f"),
            f"{row['audio_s_per_cpu_s']['median']:.1f}",
            "1" if row["variant"] == "ours" else shown(row["ours_to_this"], ".2f"),
            f"{100 * row['padding']:.1f}",
            f"{100 * row['data_wait']:.2f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['first_step_s']:.1f}",
            str(row["steps"]),
        ]
        for row in rows
    ]
    columns = (
        "trained by", "processes", "batch x accumulated", "useful audio-s/s", "of CPU", "ours beside it", "padding, %",
        "waiting for data, %", "MB a process", "s to first step", "steps",
    )  # fmt: skip
    return markdown(columns, cells)


def _starting_table(result: dict[str, Any]) -> list[str]:
    imported = {entry["side"]: shown(entry["seconds"], ".1f") for entry in result["imports"]}
    rows = [
        [
            VARIANTS[row["variant"]].name,
            shown(row["seconds"], ".1f"),
            imported.get("ours" if row["variant"] == "ours" else "theirs", ""),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        for row in result["starting"]
    ]
    first = result["starting"][0]
    about = f"{first['utterances']:,} utterances of 1 to 2 s, one process"
    return [f"To the first step, {about}:", "", *markdown(("", "s", "s, imports before", "MB"), rows)]


def _tried(tunings: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what the expert tried, if anything."""
    if not tunings:
        return []
    sides: dict[tuple[str, ...], list[str]] = {}
    for one in tunings:
        tuning, variant = one["tuning"], VARIANTS[one["variant"]].name
        choice = f"{tuning['batch']}/{tuning['workers']}"
        side = (one["set"], one["model"], str(one["ranks"]), variant)
        sides.setdefault(side, []).append(f"{choice}: {one['audio_s_per_s']:.1f}")
    cells = [[*side, ", ".join(found)] for side, found in sides.items()]
    columns = ("set", "model", "processes", "tuned", "utterances a batch / workers: audio-s/s")
    return ["What the expert tried:", "", *markdown(columns, cells, num_left=4), ""]


if __name__ == "__main__":
    sys.exit(run_main(main))
