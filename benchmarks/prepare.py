"""`python benchmarks/prepare.py`: preparing a corpus, beside the Hugging Face guide's `map` with the processor.

The guide "Automatic speech recognition" (https://huggingface.co/docs/transformers/tasks/asr) turns audio into model
inputs with `dataset.map(prepare_dataset)` and a Wav2Vec2 processor. That is run here as it is, in one process, with
one change: soundfile decodes and soxr (HQ) resamples in the place of torchcodec, so that both sides use one decoder
and one resampler, and what differs is what each does with the samples. benchmarks/README.md says what is timed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from measuring import count, hardware, markdown, shown, shown_bars, spread, versions

from asr_train.data.demo import demo_rows
from asr_train.data.telephone import TEXTS, rows
from asr_train.errors import EXIT_DONE, CorpusError, run_main
from asr_train.files import read_jsonl, write_json
from asr_train.geometry import SAMPLE_RATE

RESULTS = Path(__file__).resolve().parent / "results" / "prepare.json"
FORMS = {"wav": 8_000, "mp3": 48_000}  # Hz: MInDS-14's WAV and Common Voice's MP3
FORM_NAMES = {"wav": "WAV, 8 kHz", "mp3": "MP3, 48 kHz"}
SIDES = ("guide", "ours")
SIDE_NAMES = {"guide": "the guide's map", "ours": "prepare"}
MIN_SPEEDUP, MAX_BYTES = 1.5, 0.5  # expected from WAV, as multiples of the guide's
_LIBRARIES = ("wavefleet", "datasets", "transformers", "torch", "pyarrow", "numpy", "soundfile", "soxr")
# One thread a process, nothing from the network, nothing on the terminal but the table.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


@dataclass(frozen=True)
class Clip:
    """One utterance: its text, and mono samples at a rate."""

    text: str
    samples: npt.NDArray[np.int16]
    rate_hz: int


@dataclass(frozen=True)
class Run:
    """One timed preparation, and what it left on disk."""

    wall_s: float
    cpu_s: float  # of the process, all its threads, user and system
    num_bytes: int
    num_samples: int  # at 16 kHz, of all utterances
    labels: str  # hash of all labels, in order


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/prepare.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=count, default=600, help="recordings, at most (default: %(default)s)")
    parser.add_argument("--repeat", type=count, default=3, help="times each is listed (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=6, help="timed runs a side and form (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR",
        help="use the recordings of Debian's asterisk-core-sounds-en-wav under DIR, not the built-in synthetic speech",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    os.environ |= _ENVIRONMENT

    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "hf")
        clips = demo_clips() if arguments.prompts is None else prompt_clips(arguments.prompts)
        num_files = write_files(clips, folder, arguments.files, arguments.repeat)
        machine = hardware()
        runs = measure(folder, arguments.rounds)
    result = {
        "benchmark": "prepare",
        "speech": "synthetic (built-in demo)" if arguments.prompts is None else "recorded prompts",
        "files": num_files,
        "rows": num_files * arguments.repeat,
        "rounds": arguments.rounds,
        "hardware": machine,
        "versions": versions(*_LIBRARIES) | {"libsndfile": soundfile.__libsndfile_version__},
        "forms": {form: summarise(found) for form, found in runs.items()},
    }
    result["bars"] = bars(result["forms"]["wav"])
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


# --- the same files for both sides ------------------------------------------------------------------------------


def demo_clips() -> Iterator[Clip]:
    """The built-in demo speech."""
    return (Clip(row.text, row.synthesise(), SAMPLE_RATE) for row in demo_rows("train"))


def prompt_clips(sounds: Path) -> Iterator[Clip]:
    """Recorded prompts that have a text."""
    for row in rows(TEXTS, sounds):
        path = sounds / row["audio_filepath"]
        if row["text"] and path.is_file():
            samples, rate_hz = soundfile.read(path, dtype="int16")
            yield Clip(row["text"], samples, rate_hz)


def write_files(clips: Iterator[Clip], folder: Path, most: int, repeat: int) -> int:
    """Write `folder/<form>/*`, a manifest beside each form, and the processor that both sides use; count the clips."""
    texts = []
    for form in FORMS:
        (folder / form).mkdir()
    for number, clip in zip(range(most), clips, strict=False):
        texts.append(clip.text.upper())  # as the guide's texts are by then; its own map for that is not timed
        for form, rate_hz in FORMS.items():
            samples = clip.samples
            if clip.rate_hz != rate_hz:
                samples = soxr.resample(samples, clip.rate_hz, rate_hz, quality="HQ")
            soundfile.write(folder / form / f"{number:05d}.{form}", samples, rate_hz)
    if not texts:
        raise CorpusError("no utterances to measure with: no recording in the folder has a text")
    for form in FORMS:
        with (folder / form / "manifest.jsonl").open("w", encoding="utf-8") as manifest:
            for time_listed, (number, text) in product(range(repeat), enumerate(texts)):
                row = {"id": f"{time_listed}-{number}", "audio_filepath": f"{number:05d}.{form}", "text": text}
                manifest.write(json.dumps(row) + "\n")
    _write_processor(texts, folder / "processor")
    return len(texts)


def _write_processor(texts: Sequence[str], folder: Path) -> None:
    """A processor like wav2vec2-base's: waveforms normalised, no attention mask; the characters of these texts."""
    from asr_train.config import ModelSettings  # noqa: PLC0415 - transformers takes seconds, and --help needs none
    from asr_train.data.text import Vocabulary  # noqa: PLC0415
    from asr_train.model_config import build_processor, feature_extractor, load_model_config  # noqa: PLC0415

    settings = ModelSettings()
    extractor = feature_extractor(settings, load_model_config(settings))
    build_processor(Vocabulary.build(texts), extractor).save_pretrained(folder)


# --- the two sides ----------------------------------------------------------------------------------------------


def run_guide(folder: Path, form: str) -> Run:
    """The guide's `map`: each row decoded, normalised, tokenised, and written as lists of float32."""
    import datasets  # noqa: PLC0415 - this side's own process
    from transformers import Wav2Vec2Processor  # noqa: PLC0415

    processor: Any = Wav2Vec2Processor.from_pretrained(folder / "processor")
    listed = list(read_jsonl(folder / form / "manifest.jsonl"))
    columns = {
        "audio": [str(folder / form / row["audio_filepath"]) for row in listed],
        "transcription": [row["text"] for row in listed],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))

    def prepare_dataset(row: dict[str, Any]) -> Any:
        samples, rate_hz = soundfile.read(row["audio"]["path"], dtype="float32")  # torchcodec's place
        if rate_hz != SAMPLE_RATE:
            samples = soxr.resample(samples, rate_hz, SAMPLE_RATE, quality="HQ")
        inputs = processor(samples, sampling_rate=SAMPLE_RATE, text=row["transcription"])
        inputs["input_length"] = len(inputs["input_values"][0])
        return inputs

    out = folder / "out" / "guide"
    out.mkdir(parents=True)
    cache = str(out / "cache.arrow")
    clock = _Clock()
    mapped = dataset.map(prepare_dataset, remove_columns=dataset.column_names, cache_file_name=cache)
    wall_s, cpu_s = clock.read()
    num_samples = sum(mapped["input_length"])
    run = Run(wall_s, cpu_s, _bytes_under(out), num_samples, _hash(mapped["labels"]))
    del mapped
    shutil.rmtree(out)
    return run


def run_ours(folder: Path, form: str) -> Run:
    """`asr_train.prepare`: listed, each row decoded, checked and tokenised, written as PCM16; lengths and index too."""
    from asr_train.prepare import prepare  # noqa: PLC0415 - this side's own process
    from asr_train.recipe import decode_recipe  # noqa: PLC0415

    out = folder / "out" / "ours"
    source = {"kind": "jsonl", "path": str(folder / form / "manifest.jsonl")}
    recipe = decode_recipe(
        {
            "name": "bench",
            "max_steps": 1,
            "data": {"train": source, "corpus_root": str(out), "num_proc": 1, "max_duration_s": 1e6},
            "text": {"case": "upper", "processor": str(folder / "processor")},
        }
    )
    clock = _Clock()
    corpus = prepare(recipe, progress=False)
    wall_s, cpu_s = clock.read()
    train = corpus.train
    labels = _hash(train.labels(row).tolist() for row in range(len(train)))
    run = Run(wall_s, cpu_s, _bytes_under(out), int(train.num_samples.sum()), labels)
    del corpus, train
    shutil.rmtree(out)
    return run


class _Clock:
    """Wall time and this process's CPU time, in seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hash(labels: Any) -> str:
    return hashlib.sha256(json.dumps([list(row) for row in labels]).encode()).hexdigest()


# --- measuring --------------------------------------------------------------------------------------------------


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[Run]]]:
    """Form -> side -> timed runs. Each side has one process for all its runs; sides take turns ABBA.

    Raises:
        CorpusError: the sides did not prepare the same audio and the same labels.
    """
    run: dict[str, Callable[[Path, str], Run]] = {"guide": run_guide, "ours": run_ours}
    context = multiprocessing.get_context("spawn")
    found: dict[str, dict[str, list[Run]]] = {}
    with ProcessPoolExecutor(1, context) as guide, ProcessPoolExecutor(1, context) as ours:
        process = {"guide": guide, "ours": ours}
        for form in FORMS:
            for side in SIDES:  # warm-up: imports, page cache
                process[side].submit(run[side], folder, form).result()
            runs: dict[str, list[Run]] = {side: [] for side in SIDES}
            for number in range(rounds):  # AB BA AB BA
                for side in SIDES if number % 2 == 0 else reversed(SIDES):
                    runs[side].append(process[side].submit(run[side], folder, form).result())
            if len({(each.num_samples, each.labels) for side in SIDES for each in runs[side]}) != 1:
                raise CorpusError(f"{FORM_NAMES[form]}: the two sides did not prepare the same audio and labels")
            found[form] = runs
    return found


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Of one form: audio-seconds a second by wall and by CPU time, bytes, and ours against the guide's."""
    summary: dict[str, Any] = {}
    for side, timed in runs.items():
        audio_s = timed[0].num_samples / SAMPLE_RATE
        summary[side] = {
            "audio_s": audio_s,
            "audio_s_per_s": spread([audio_s / run.wall_s for run in timed]),
            "audio_s_per_cpu_s": spread([audio_s / run.cpu_s for run in timed]),
            "bytes_on_disk": timed[0].num_bytes,
        }
    pairs = list(zip(runs["guide"], runs["ours"], strict=True))
    guide, ours = summary["guide"], summary["ours"]
    guide_cpu_s, ours_cpu_s = (min(run.cpu_s for run in runs[side]) for side in SIDES)
    summary["ours_to_guide"] = {
        "speed": spread([theirs.wall_s / our.wall_s for theirs, our in pairs]),  # of runs that are neighbours in time
        "speed_cpu": spread([theirs.cpu_s / our.cpu_s for theirs, our in pairs]),
        "speed_cpu_fastest": guide_cpu_s / ours_cpu_s,  # of each side's least disturbed run
        "bytes_on_disk": ours["bytes_on_disk"] / guide["bytes_on_disk"],
    }
    return summary


def bars(wav: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected from WAV, and whether it was found; judged to two decimals, as it is shown."""
    ratio = wav["ours_to_guide"]
    speed, speed_cpu = (round(ratio[name]["median"], 2) for name in ("speed", "speed_cpu"))
    size = round(ratio["bytes_on_disk"], 2)
    return [
        {"bar": "from WAV, times as fast by wall time", "at_least": MIN_SPEEDUP, "found": speed,
         "met": speed >= MIN_SPEEDUP},
        {"bar": "from WAV, times as fast by CPU time", "at_least": MIN_SPEEDUP, "found": speed_cpu,
         "met": speed_cpu >= MIN_SPEEDUP},
        {"bar": "from WAV, share of the bytes", "at_most": MAX_BYTES, "found": size, "met": size <= MAX_BYTES},
    ]  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    rows = []
    for form, summary in result["forms"].items():
        ratio = summary["ours_to_guide"]
        for side in SIDES:
            found, ours = summary[side], side == "ours"
            rows.append(
                [
                    FORM_NAMES[form],
                    SIDE_NAMES[side],
                    shown(found["audio_s_per_s"], ",.0f"),
                    shown(found["audio_s_per_cpu_s"], ",.0f"),
                    shown(ratio["speed"], ".2f") if ours else "1",
                    shown(ratio["speed_cpu"], ".2f") if ours else "1",
                    f"{found['bytes_on_disk'] / 1e6:,.1f}",
                ]
            )
    columns = (
        "from", "by", "audio-s/s, wall", "audio-s/s, CPU", "times the guide's, wall", "times, CPU", "MB on disk",
    )  # fmt: skip
    machine, audio_s = result["hardware"], result["forms"]["wav"]["guide"]["audio_s"]
    load = machine["load_average_before"][0]
    ratios = {form: summary["ours_to_guide"]["speed_cpu_fastest"] for form, summary in result["forms"].items()}
    fastest = ", ".join(f"{ratio:.2f} times the guide's from {form.upper()}" for form, ratio in ratios.items())
    lines = [
        *markdown(columns, rows, num_left=2),
        "",
        f"{result['speech']}, {result['files']} files, {result['rows']} rows, {audio_s:,.0f} s; "
        f"{machine['cpu']}, {machine['cores']} cores, load average {load:g}; "
        f"medians and quartiles of {result['rounds']} runs. Each side's fastest run, CPU time: {fastest}.",
        "",
        *shown_bars(result["bars"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
