"""`python benchmarks/gpu.py`: training on a GPU: how fast, how much of its peak, what it waits for; beside Trainer.

Each part takes minutes and can be run by itself; its result is added to the file. benchmarks/README.md says what is
measured.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_sides as sides
import numpy as np
from gpu_sides import KERNELS, Setup
from measuring import count, hardware, markdown, spread, versions

from asr_train import compiling
from asr_train.errors import EXIT_DONE, run_main
from asr_train.files import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
BARS = {"base": 10_000, "large": 4_000}  # useful audio-s/s on an H200
JUDGED_DEVICE = "H200"
MIN_TIMES_TRAINER = 2
UNITS_S = (50, 100, 200, 400, 1000)
_LIBRARIES = ("wavefleet", "torch", "transformers", "accelerate", "datasets", "numpy")
_LIMIT_S = 150  # of one training, start-up in it; a longer one is ended and said to be
_MODELS = ("base", "large", "xls-r-300m")

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure; may be repeated; default all")
    parser.add_argument("--utterances", type=count, default=2400, help="of made-up speech (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=20, help="timed steps each (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=2, help="runs beside Trainer (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps, on any device: does it run?")
    parser.add_argument("--folder", type=Path, help="where speech and runs go; removed afterwards")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.utterances, arguments.steps, arguments.rounds = 24, 2, 1
    machine = hardware()
    device = _in_a_process(sides.device_name)["value"]
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "smoke": arguments.smoke,
        "device": device,
        "hardware": machine,
        "versions": versions(*_LIBRARIES),
        "parts": dict.fromkeys(PARTS),
    }
    if arguments.out.exists():
        before = read_json(arguments.out)
        if all(before.get(key) == result[key] for key in ("smoke", "device", "versions")):
            result["parts"] |= before["parts"]
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-", dir=arguments.folder) as folder:
        bench = Bench(Path(folder), arguments, is_gpu=device is not None)
        for name in arguments.part or PARTS:
            start = time.monotonic()
            rows = PARTS[name](bench)
            result["parts"][name] = {"seconds": round(time.monotonic() - start, 1), "rows": rows}
            result["bars"] = bars(result)
            write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


class Bench:
    """The speech, and trainings one after another, each in a process of its own: nothing of one is left in the next."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, *, is_gpu: bool) -> None:
        self._folder, self._arguments = folder, arguments
        self.is_gpu, self.is_smoke, self.rounds = is_gpu, arguments.smoke, arguments.rounds
        self.values = self._value(sides.make_corpus, folder, arguments.utterances, 8 if self.is_smoke else 1)
        self._number = 0

    def models(self, *names: str) -> tuple[str, ...]:
        """These models, or in a smoke run a tiny one."""
        return ("tiny",) if self.is_smoke else names

    def precisions(self, *names: str) -> tuple[str, ...]:
        """These, as far as the device has them."""
        return names if self.is_gpu else ("fp32",)

    def train(self, **choices: Any) -> Row:
        """One training of ours: what was chosen, and what was measured, or why it failed."""
        if self.is_smoke:
            choices |= {"warmup": 1, "unit_audio_s": choices.get("unit_audio_s", 200) / 50, "step_audio_s": 8}
        if not self.is_gpu:
            choices["precision"] = "fp32"
        setup = Setup(**{"timed": self._arguments.steps, **choices})
        if setup.compile and not self.is_gpu:
            compiling._BACKEND = "aot_eager"  # generated C++ takes a minute
        return choices | self._measured(sides.train_ours, setup, self.values, self._next_folder())

    def train_guide(self, shape: str, *, tuned: bool) -> Row:
        """One training by Trainer."""
        precision = "fp16" if self.is_gpu else "fp32"
        return self._measured(
            _train_guide, shape, precision, self.values, self._next_folder(), 1 if self.is_smoke else 3, tuned
        )

    def flops(self, precision: str) -> float:
        """What a plain matrix product reaches, TFLOP/s."""
        size, repeats = (8192, 20) if self.is_gpu else (512, 3)
        return float(self._value(sides.matrix_tflops, precision, size, repeats))

    def ctc(self, backend: str, *sizes: int) -> Row:
        """Milliseconds of one kernel."""
        found = _in_a_process(sides.ctc_ms, backend, *sizes, 3 if self.is_smoke else 20)
        return {"ms": found["value"], "failed": found["failed"]}

    def _next_folder(self) -> Path:
        self._number += 1
        return self._folder / f"run-{self._number}"

    def _measured(self, function: Callable[..., Any], *arguments: Any) -> Row:
        found = _in_a_process(function, *arguments)
        return {"failed": found["failed"], **(found["value"] or {})}

    def _value(self, function: Callable[..., Any], *arguments: Any) -> Any:
        found = _in_a_process(function, *arguments)
        if found["failed"]:
            raise RuntimeError(found["failed"])
        return found["value"]


def _train_guide(shape: str, precision: str, values: Any, folder: Path, epochs: int, tuned: bool) -> Row:
    return sides.train_guide(shape, precision, values, folder, epochs=epochs, tuned=tuned)


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What a function returned in a fork of this process, which has imported everything and touched no device."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def work() -> None:
        if sides.device_name() is None:
            sides.torch.set_num_threads(1)  # threads that wait for each other on a busy machine take minutes
        try:
            found = {"value": function(*arguments), "failed": None}
        except BaseException as error:  # a benchmark goes on with the next one, and shows this
            traceback.print_exc()
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            found = {"value": None, "failed": f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]}
        sending.send(found)

    process = context.Process(target=work)
    process.start()
    sending.close()
    try:
        found: dict[str, Any] = {"value": None, "failed": f"took over {_LIMIT_S} s"}
        if receiving.poll(_LIMIT_S):
            found = receiving.recv()
    except EOFError:
        found = {"value": None, "failed": "the process died"}
    finally:
        process.join(5)
        process.kill()
        process.join()
    return found


# --- parts ------------------------------------------------------------------------------------------------------


def _models(bench: Bench) -> list[Row]:
    """Every shape and precision, gradient checkpointing off and on."""
    peaks = {precision: bench.flops(precision) for precision in bench.precisions("bf16", "fp16")}
    rows = []
    for shape in bench.models(*_MODELS):
        for precision, peak in peaks.items():
            for checkpointing in (False,) if precision == "fp16" else (False, True):
                row = bench.train(shape=shape, precision=precision, checkpointing=checkpointing)
                rows.append(_summed(row) | {"peak_tflops": peak})
    return rows


def _units(bench: Bench) -> list[Row]:
    """Units of 50 to 1,000 s, the same audio a step."""
    sizes = UNITS_S[-2:] if bench.is_smoke else UNITS_S
    return [
        _summed(bench.train(shape=shape, unit_audio_s=unit_s))
        for shape in bench.models("base", "large")
        for unit_s in sizes
    ]


def _attention(bench: Bench) -> list[Row]:
    """Each of torch's kernels alone: without a mask (base) and with one (XLS-R)."""
    kernels = ("math",) if bench.is_smoke else (None, *KERNELS)
    return [
        _summed(bench.train(shape=shape, kernel=kernel))
        for shape in bench.models("base", "xls-r-300m")
        for kernel in kernels
    ]


def _compile(bench: Bench) -> list[Row]:
    """Layers compiled or not; steps of one unit, so that a step that meets a new shape can be told from others."""
    steps = {} if bench.is_smoke else {"timed": 150}
    return [
        _summed(bench.train(shape=shape, compile=is_compiled, step_audio_s=200, **steps))
        for shape in bench.models("base", "large")
        for is_compiled in (False, True)
    ]


def _ctc(bench: Bench) -> list[Row]:
    """Both kernels of the training's CTC loss, for units of 200 s."""
    rows = []
    for utterance_s in (4, 14) if not bench.is_smoke else (4,):
        sizes = (200 // utterance_s, utterance_s * 50 - 1, utterance_s * 14)
        rows += [
            {
                "backend": backend,
                "utterances": sizes[0],
                "frames": sizes[1],
                "labels": sizes[2],
                **bench.ctc(backend, *sizes),
            }
            for backend in ("native", "cudnn")
        ]
    return rows


def _trainer(bench: Bench) -> list[Row]:
    """Ours beside Trainer at the guide's batch, in turn, forth and back."""
    (shape,) = bench.models("base")
    precision = "fp16" if bench.is_gpu else "fp32"
    ours = {"shape": shape, "precision": precision, "checkpointing": True, "recipe": {"optim": {"lr": 1e-5}}}
    ways: dict[str, Callable[[], Row]] = {
        "Trainer, the guide as written": lambda: bench.train_guide(shape, tuned=False),
        "Trainer, numpy arrays and four workers": lambda: bench.train_guide(shape, tuned=True),
        "ours, the guide's batch": lambda: bench.train(as_the_guide=True, **ours),
        "ours, units of 200 s": lambda: bench.train(step_audio_s=200, **ours),
    }
    runs: dict[str, list[Row]] = {name: [] for name in ways}
    for number in range(bench.rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            runs[name].append(ways[name]())
    rows = []
    for name, found in runs.items():
        failed = next((run["failed"] for run in found if run["failed"]), None)
        rates = [run["audio_s_per_s"] for run in found if not run["failed"]]
        peak = max((run["peak_bytes"] for run in found if not run["failed"]), default=None)
        rows.append(
            {"way": name, "failed": failed, "audio_s_per_s": spread(rates) if rates else None, "peak_bytes": peak}
        )
    return rows


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "models": _models, "units": _units, "attention": _attention, "compile": _compile, "ctc": _ctc, "trainer": _trainer,
}  # fmt: skip


def _summed(row: Row) -> Row:
    """A training's row: its step times as percentiles, those of shapes met for the first time apart."""
    times = row.pop("step_ms", None)
    is_unseen = row.pop("is_unseen", None)
    row.pop("recipe", None)
    if times is None:
        return row
    for name, chosen in (("unseen", times[is_unseen]), ("seen", times[~is_unseen])):
        row[f"steps_{name}"] = len(chosen)
        for percent in (50, 99):
            row[f"p{percent}_ms_{name}"] = float(np.percentile(chosen, percent)) if len(chosen) else None
    return row


# --- bars and tables --------------------------------------------------------------------------------------------


def bars(result: dict[str, Any]) -> list[Row]:
    """What was expected, and whether it was found; open where nobody has measured it on the device it is meant for."""
    is_judged = not result["smoke"] and result["device"] is not None and JUDGED_DEVICE in result["device"]["name"]
    parts = {name: part["rows"] if part and is_judged else [] for name, part in result["parts"].items()}
    found = []
    for shape, limit in BARS.items():
        rates = [row["audio_s_per_s"] for row in parts["models"] if row["shape"] == shape and not row["failed"]]
        found.append(_bar(f"{shape}, {JUDGED_DEVICE}, useful audio-s/s", limit, max(rates, default=None)))
    rates = {row["way"]: row["audio_s_per_s"]["median"] for row in parts["trainer"] if row["audio_s_per_s"]}
    ours, guide = (rates.get(name) for name in ("ours, the guide's batch", "Trainer, the guide as written"))
    times = ours / guide if ours and guide else None
    return [*found, _bar("times Trainer's at the guide's batch", MIN_TIMES_TRAINER, times)]


def _bar(name: str, limit: float, value: float | None) -> Row:
    return {"bar": name, "at_least": limit, "found": value, "met": None if value is None else value >= limit}


def render(result: dict[str, Any]) -> str:
    """Every part's table, and the bars, as Markdown."""
    lines: list[str] = []
    for name, part in result["parts"].items():
        if part is not None:
            lines += [*TABLES[name](part["rows"]), ""]
    device, machine = result["device"], result["hardware"]
    where = f"{device['name']}, CUDA {device['cuda']}" if device else "no GPU"
    what = "a smoke run, which measures nothing" if result["smoke"] else f"torch {result['versions']['torch']}"
    lines += [f"{where}; {machine['cpu']}, {machine['cores']} cores; {what}.", ""]
    for bar in result["bars"]:
        verdict = "open" if bar["met"] is None else f"{bar['found']:.2f}, {'met' if bar['met'] else 'NOT met'}"
        lines.append(f"- {bar['bar']}: expected at least {bar['at_least']:,}: {verdict}")
    return "\n".join(lines)


_MEASURED = (
    "useful audio-s/s", "TFLOP/s", "of a matrix product's, %", "data wait, %", "idle, %", "syncs a step", "GB, peak",
    "ms, p50", "p99", "new shapes, p50", "p99",
)  # fmt: skip


def _cell(value: Any, form: str = "") -> str:
    return "" if value is None else f"{value:{form}}"


def _training_table(*chosen: tuple[str, str]) -> Callable[[list[Row]], list[str]]:
    """A table of trainings; `chosen` are the columns of what was chosen: (heading, key)."""

    def table(rows: list[Row]) -> list[str]:
        headings = [*(heading for heading, _ in chosen), *_MEASURED]
        cells = []
        for row in rows:
            names = [_cell(row.get(key)) for _, key in chosen]
            if row["failed"]:
                cells.append([*names, row["failed"].replace("|", "/"), *[""] * 10])
                continue
            peak = row.get("peak_tflops")
            cells.append(
                [
                    *names,
                    f"{row['audio_s_per_s']:,.0f}",
                    f"{row['tflops']:.2f}",
                    _cell(None if peak is None else 100 * row["tflops"] / peak, ".0f"),
                    f"{100 * row['data_wait_share']:.1f}",
                    _cell(None if row["idle_share"] is None else 100 * row["idle_share"], ".0f"),
                    _cell(row["syncs"], ".1f"),
                    f"{row['peak_bytes'] / 1e9:.1f}",
                    *(
                        _cell(row[f"p{percent}_ms_{kind}"], ".0f")
                        for kind in ("seen", "unseen")
                        for percent in (50, 99)
                    ),
                ]
            )
        return markdown(headings, cells, num_left=len(chosen))

    return table


def _ctc_table(rows: list[Row]) -> list[str]:
    cells = [
        [
            row["backend"],
            *(str(row[key]) for key in ("utterances", "frames", "labels")),
            row["failed"] or f"{row['ms']:.2f}",
        ]
        for row in rows
    ]
    return markdown(("CTC by", "utterances", "frames", "labels", "ms, forward and backward"), cells)


def _trainer_table(rows: list[Row]) -> list[str]:
    reference = rows[0]["audio_s_per_s"]
    cells = []
    for row in rows:
        rate = row["audio_s_per_s"]
        if rate is None or reference is None:
            cells.append([row["way"], row["failed"] or "", "", ""])
            continue
        low, high = rate["quartiles"]
        times = rate["median"] / reference["median"]
        cells.append(
            [
                row["way"],
                f"{rate['median']:,.0f} ({low:,.0f}-{high:,.0f})",
                f"{times:.1f}",
                f"{row['peak_bytes'] / 1e9:.1f}",
            ]
        )
    return markdown(("base, fp16, checkpointing", "useful audio-s/s", "times the guide's", "GB, peak"), cells)


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "models": _training_table(("model", "shape"), ("precision", "precision"), ("checkpointing", "checkpointing")),
    "units": _training_table(("model", "shape"), ("s a unit", "unit_audio_s")),
    "attention": _training_table(("model", "shape"), ("attention by", "kernel")),
    "compile": _training_table(("model", "shape"), ("compiled", "compile")),
    "ctc": _ctc_table,
    "trainer": _trainer_table,
}


if __name__ == "__main__":
    sys.exit(run_main(main))
