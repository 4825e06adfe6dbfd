"""`python benchmarks/loader.py`: audio-seconds a second of one core, from the data on disk to a collated batch.

Ours, the Hugging Face guide's lists of float32, `datasets` decoding audio as it is read, and lhotse, all from the same
utterances. benchmarks/README.md says what each does.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import soundfile
import soxr
import torch
from guide import Collator, prepared, processor_of
from measuring import apart, count, hardware, markdown, shown, shown_bars, spread, versions
from prepare import Clip, demo_clips, prompt_clips
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging as transformers_logging

from asr_train.data.batch import BatchSettings, input_values
from asr_train.data.corpus import Corpus
from asr_train.data.loader import RankTurns, TurnBatches, open_loader
from asr_train.data.plan import Plan, PlanSettings
from asr_train.errors import EXIT_DONE, CorpusError, run_main
from asr_train.files import write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe

RESULTS = Path(__file__).resolve().parent / "results" / "loader.json"
BATCH = 8  # utterances, the guide's
UNIT_S = 200  # of audio, our recipes' and lhotse's batches
MIN_SPEEDUP = 20  # expected of ours beside the guide's
_LIBRARIES = ("wavefleet", "datasets", "lhotse", "torch", "transformers", "numpy", "pyarrow", "soundfile")
_SAME_SHARE = 1e-3  # of samples, counted by their energy: floats, and the epsilon of normalisation

Batches: TypeAlias = Iterable[Any]


@dataclass(frozen=True)
class Side:
    """One way from disk to batch.

    Attributes:
        name: in the table.
        what: what a batch holds.
        batches: makes the batches of one pass over a folder's utterances, from its opened data; called once.
        read: from a batch, how many utterances it has and how many samples they are.
    """

    name: str
    what: str
    batches: Callable[[Path], Callable[[], Batches]]
    read: Callable[[Any], tuple[int, float]]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/loader.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--utterances", type=count, default=400, help="at most (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=6, help="timed runs each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a run, at least (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR",
        help="use the recordings of Debian's asterisk-core-sounds-en-wav under DIR, not the built-in synthetic speech",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="few utterances, one short run: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    utterances, rounds, seconds = arguments.utterances, arguments.rounds, arguments.seconds
    if arguments.smoke:
        utterances, rounds, seconds = 2 * BATCH, 1, 0.0
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="wavefleet-bench-") as name:
        folder = Path(name)
        machine = hardware()
        num_utterances, num_samples = apart(partial(write_all, folder, arguments.prompts, utterances))
        runs = measure(folder, rounds, seconds, num_utterances, num_samples)
    audio_s = num_samples / SAMPLE_RATE
    result: dict[str, Any] = {
        "benchmark": "loader",
        "speech": "synthetic (built-in demo)" if arguments.prompts is None else "recorded prompts",
        "utterances": num_utterances,
        "audio_s": audio_s,
        "rounds": rounds,
        "hardware": machine,
        "versions": versions(*_LIBRARIES) | {"libsndfile": soundfile.__libsndfile_version__},
        "sides": summarise(runs),
    }
    result["bars"] = bars(result["sides"])
    write_json(arguments.out, result)
    print(render(result))
    print(f"written: {arguments.out}")
    return EXIT_DONE


# --- the same utterances for all --------------------------------------------------------------------------------


def write_all(folder: Path, prompts: Path | None, most: int) -> tuple[int, int]:
    """WAV and FLAC files of 16 kHz and 16 bits, our corpora of them, the guide's data set; utterances and samples.

    Raises:
        CorpusError: there is nothing to measure with.
    """
    clips: Iterable[Clip] = demo_clips() if prompts is None else prompt_clips(prompts)
    num_samples, texts = [], []
    for form in ("wav", "flac"):
        (folder / form).mkdir()
    for number, clip in enumerate(islice(clips, most)):
        samples = clip.samples
        if clip.rate_hz != SAMPLE_RATE:
            samples = soxr.resample(samples, clip.rate_hz, SAMPLE_RATE, quality="HQ")
        for form in ("wav", "flac"):
            soundfile.write(folder / form / f"{number:05d}.{form}", samples, SAMPLE_RATE, subtype="PCM_16")
        num_samples.append(len(samples))
        texts.append(clip.text)
    if not texts:
        raise CorpusError("no utterances to measure with: no recording in the folder has a text")
    manifest = folder / "manifest.tsv"
    lines = [f"wav/{number:05d}.wav\t{text}" for number, text in enumerate(texts)]
    manifest.write_text("\n".join(["audio\ttext", *lines]) + "\n", encoding="utf-8")
    for encoding in ("pcm16", "flac"):
        make_corpus(folder, encoding)
    prepared(make_corpus(folder, "pcm16"), folder / "guide")
    return len(texts), sum(num_samples)


def make_corpus(folder: Path, encoding: str) -> Corpus:
    """Our corpus of the folder's utterances; made where there is none."""
    source = {"kind": "tsv", "path": str(folder / "manifest.tsv")}
    recipe = decode_recipe(
        {
            "name": "bench", "max_steps": 1,
            "data": {"train": source, "corpus_root": str(folder / "ours"), "num_proc": 1, "encoding": encoding,
                     "max_duration_s": 1e6, "min_duration_s": 0.0},
        }
    )  # fmt: skip
    return prepare(recipe, progress=False)


# --- the sides --------------------------------------------------------------------------------------------------


def ours(
    folder: Path, encoding: str = "pcm16", *, on_device_too: bool = True, of_like_count: bool = False
) -> Callable[[], Batches]:
    """The loader of a training, in this process: units of the plan, read and padded as int16.

    Args:
        folder: of the utterances.
        encoding: of the corpus.
        on_device_too: also do what comes after the copy to the device: normalise, as float32.
        of_like_count: as many utterances a batch as the guide has, in place of units of equal cost.
    """
    corpus = make_corpus(folder, encoding)
    settings = PlanSettings(
        unit_audio_s=UNIT_S, unit_utterances=BATCH, units_per_step=1,
        order="grouped" if of_like_count else "cost", quadratic=1.73e-4,  # wav2vec2-base's, see batching.py
    )  # fmt: skip
    plan = Plan(corpus.train.index, settings, 0)
    batch_settings = BatchSettings(
        geometry=corpus.geometry, normalize=True, masks=None, hidden_size=768, num_layers=12, layerdrop=0.0
    )
    batches = TurnBatches(plan, corpus.train, batch_settings, 0)
    epochs = iter(range(1_000_000_000))

    def one_pass() -> Batches:
        turns = RankTurns(plan, 0, 1, next(epochs), 0)
        with open_loader(batches, turns, num_workers=0, pin_memory=False) as found:
            for _, batch in islice(found, plan.steps_per_epoch):
                yield (batch, input_values(batch)) if on_device_too else (batch, None)

    return one_pass


def _read_ours(found: Any) -> tuple[int, float]:
    batch, values = found
    return len(batch.ids), int(batch.num_samples.sum()) if values is None else _energy(values)


def guide(folder: Path, form: str | None) -> Callable[[], Batches]:
    """The guide's data set through torch's DataLoader and its collator, in batches of like length.

    Args:
        folder: of the utterances.
        form: what rows are given as: Python's lists (None), the default, or `numpy` arrays.
    """
    corpus = make_corpus(folder, "pcm16")
    dataset = prepared(corpus, folder / "guide")
    lengths = dataset["input_length"][:]
    return _loaded(dataset.with_format(form), lengths, Collator(processor_of(corpus)))


def decoding(folder: Path) -> Callable[[], Batches]:
    """`datasets` with the audio files' bytes in it, decoded and normalised row by row as they are read."""
    corpus = make_corpus(folder, "pcm16")
    processor, train = processor_of(corpus), corpus.train
    files = sorted((folder / "wav").iterdir())
    columns = {
        "audio": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "labels": [train.labels(row).tolist() for row in range(len(train))],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("audio", datasets.Audio(decode=False))
    dataset.save_to_disk(folder / "decoding")

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        values = []
        for audio in rows["audio"]:
            samples, _ = soundfile.read(BytesIO(audio["bytes"]), dtype="float32")  # torchcodec's place
            values.append(processor(samples, sampling_rate=SAMPLE_RATE).input_values)
        return {"input_values": values, "labels": rows["labels"]}

    opened = datasets.load_from_disk(folder / "decoding").with_transform(transform)
    return _loaded(opened, train.num_samples.tolist(), Collator(processor))


def _loaded(dataset: Any, lengths: list[int], collator: Collator) -> Callable[[], Batches]:
    sampler = LengthGroupedSampler(BATCH, lengths=lengths)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=BATCH, sampler=sampler, collate_fn=collator)
    return lambda: loader


def _read_guide(batch: Any) -> tuple[int, float]:
    return len(batch["labels"]), _energy(batch["input_values"])


def lhotse_batches(folder: Path, *, in_memory: bool) -> Callable[[], Batches]:
    """The speech data set of lhotse, over its bucketing sampler: float32 as it is, texts as they are."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment  # noqa: PLC0415 - its import is this side's
    from lhotse.dataset import BucketingSampler, K2SpeechRecognitionDataset  # noqa: PLC0415
    from lhotse.dataset.input_strategies import AudioSamples  # noqa: PLC0415

    form = "flac" if in_memory else "wav"
    cuts = []
    for file in sorted((folder / form).iterdir()):
        recording = Recording.from_file(file, recording_id=file.stem)
        said = SupervisionSegment(file.stem, file.stem, 0.0, recording.duration, text=file.stem)
        cuts.append(MonoCut(file.stem, 0.0, recording.duration, 0, supervisions=[said], recording=recording))
    found = CutSet.from_cuts(cuts)
    if in_memory:
        found = CutSet.from_cuts([cut.move_to_memory(audio_format="flac") for cut in found])
    dataset = K2SpeechRecognitionDataset(input_strategy=AudioSamples())

    def one_pass() -> Batches:
        sampler = BucketingSampler(found, max_duration=UNIT_S, num_buckets=min(10, len(cuts) // BATCH), shuffle=True)
        return (dataset[batch] for batch in sampler)

    return one_pass


def _read_lhotse(batch: Any) -> tuple[int, float]:
    return len(batch["supervisions"]["text"]), int(batch["supervisions"]["num_samples"].sum())


def _energy(values: torch.Tensor) -> float:
    """Of normalised waveforms: their number of samples, for each has a variance of 1 and its padding none."""
    return float(values.double().square().sum())


_FLOATS = "float32 normalised, labels"
SIDES = {
    "ours": Side("ours", "int16, labels", partial(ours, on_device_too=False), _read_ours),
    "ours_device": Side("ours, with the device's part", _FLOATS, ours, _read_ours),
    "ours_8": Side("the same, 8 utterances a batch", _FLOATS, partial(ours, of_like_count=True), _read_ours),
    "ours_flac": Side("the same as ours, from a FLAC corpus", _FLOATS, partial(ours, encoding="flac"), _read_ours),
    "guide": Side("the guide: Arrow lists", _FLOATS, partial(guide, form=None), _read_guide),
    "guide_numpy": Side("the guide's, as numpy arrays", _FLOATS, partial(guide, form="numpy"), _read_guide),
    "decoding": Side("datasets, decoding WAV", _FLOATS, decoding, _read_guide),
    "lhotse_wav": Side("lhotse, WAV files", "float32, texts", partial(lhotse_batches, in_memory=False), _read_lhotse),
    "lhotse_flac": Side(
        "lhotse, FLAC in memory", "float32, texts", partial(lhotse_batches, in_memory=True), _read_lhotse
    ),
}


# --- measuring --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Whole passes over the utterances: audio, and what they took."""

    audio_s: float
    wall_s: float
    cpu_s: float


_OPENED: dict[str, Callable[[], Batches]] = {}  # of this process


def open_and_check(key: str, folder: Path) -> tuple[int, float]:
    """Open a side's data, and make one pass to warm up; utterances and samples of it."""
    torch.set_num_threads(1)
    _OPENED[key] = SIDES[key].batches(folder)
    counts = [SIDES[key].read(batch) for batch in _OPENED[key]()]
    return sum(number for number, _ in counts), sum(samples for _, samples in counts)


def run(key: str, seconds: float, audio_s: float) -> Run:
    """Passes over a side's batches, as many as last long enough."""
    num_passes = 0
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    while not num_passes or time.perf_counter() - wall_s < seconds:
        for _ in _OPENED[key]():
            pass
        num_passes += 1
    return Run(num_passes * audio_s, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def measure(folder: Path, rounds: int, seconds: float, num_utterances: int, num_samples: int) -> dict[str, list[Run]]:
    """Side -> timed runs; each has a process of its own, and they take turns, forth and back.

    Raises:
        CorpusError: a side did not give every utterance once.
    """
    context = multiprocessing.get_context("fork")
    pools = {key: ProcessPoolExecutor(1, context) for key in SIDES}
    for key, pool in pools.items():
        found = pool.submit(open_and_check, key, folder).result()
        if found[0] != num_utterances or abs(found[1] / num_samples - 1) > _SAME_SHARE:
            expected = f"{num_utterances} utterances of {num_samples:,} samples"
            raise CorpusError(f"{SIDES[key].name}: {found[0]} utterances of {found[1]:,.0f} samples, not {expected}")
    runs: dict[str, list[Run]] = {key: [] for key in SIDES}
    for number in range(rounds):
        for key in SIDES if number % 2 == 0 else reversed(SIDES):
            runs[key].append(pools[key].submit(run, key, seconds, num_samples / SAMPLE_RATE).result())
    for pool in pools.values():
        pool.shutdown()
    return runs


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Audio-seconds a second, by CPU and by wall time, and beside the guide's runs of the same round."""
    return {
        key: {
            "audio_s_per_cpu_s": spread([run.audio_s / run.cpu_s for run in found]),
            "audio_s_per_s": spread([run.audio_s / run.wall_s for run in found]),
            "to_guide": spread(
                [(run.audio_s / run.cpu_s) / (theirs.audio_s / theirs.cpu_s)
                 for run, theirs in zip(found, runs["guide"], strict=True)]
            ),
        }
        for key, found in runs.items()
    }  # fmt: skip


def bars(sides: dict[str, Any]) -> list[dict[str, Any]]:
    """What was expected, and whether it was found."""
    found = sides["ours"]["to_guide"]["median"]
    return [
        {"bar": "ours, times the guide's, by CPU time", "at_least": MIN_SPEEDUP,
         "found": found, "met": found >= MIN_SPEEDUP}
    ]  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    """The table, and the bars, as Markdown."""
    columns = ("from", "a batch holds", "audio-s/s a core, CPU", "wall", "times the guide's, CPU")
    table = [
        [
            SIDES[key].name,
            SIDES[key].what,
            shown(found["audio_s_per_cpu_s"], ",.0f"),
            shown(found["audio_s_per_s"], ",.0f"),
            shown(found["to_guide"], ",.1f"),
        ]
        for key, found in result["sides"].items()
    ]
    machine = result["hardware"]
    lines = [
        *markdown(columns, table, num_left=2),
        "",
        f"{result['speech']}, {result['utterances']} utterances, {result['audio_s']:,.0f} s; batches of {UNIT_S} s of"
        f" audio (ours, lhotse) or {BATCH} utterances, one process and one thread each; {machine['cpu']},"
        f" {machine['cores']} cores, load average {machine['load_average_before'][0]:g}; medians and quartiles of"
        f" {result['rounds']} runs.",
        "",
        *shown_bars(result["bars"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_main(main))
