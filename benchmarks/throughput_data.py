"""What `throughput.py` trains on: corpora prepared by ours, and the same utterances as the guide's `map` has them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
from length_sets import length_set

from asr_train import resources
from asr_train.config import Recipe
from asr_train.data.corpus import Corpus, shard_path
from asr_train.data.demo import demo_rows
from asr_train.data.finish import finish_set
from asr_train.data.telephone import SOUNDS, TEXTS, rows
from asr_train.errors import CorpusError
from asr_train.files import read_json, write_json
from asr_train.geometry import SAMPLE_RATE
from asr_train.recipe import decode_recipe, read_values

_SHORT_S = (1.0, 2.0)  # of the many short utterances
_LONGEST_S = 30  # a recipe's default
_LETTERS = "etaoinshrdlu"
_LETTERS_A_SECOND = 14  # of read speech

Clip = tuple[npt.NDArray[np.int16], int, str]  # samples, rate, text


@dataclass(frozen=True)
class Speech:
    """A prepared set of utterances, for every variant."""

    name: str
    source: dict[str, Any]  # of our recipe: data and name
    model: Path  # a folder of transformers, with its processor
    nested: Path  # the guide's `map`: Arrow, input_values [[float]]
    flat: Path  # an expert's: input_values [float], length
    copies: int  # of the file of nested and flat, as the corpus has copies of its shard
    audio_s: float
    utterances: int


def prompt_clips() -> Iterator[Clip]:
    """Debian's recorded telephone prompts that have a text, in random order, without the few over 30 s."""
    listed = list(rows(TEXTS, SOUNDS))
    for place in np.random.default_rng(0).permutation(len(listed)).tolist():
        row = listed[place]
        path = SOUNDS / row["audio_filepath"]
        if row["text"] and path.is_file():
            samples, rate = soundfile.read(path, dtype="int16")
            if len(samples) <= _LONGEST_S * rate:
                yield samples, rate, row["text"]


def demo_clips() -> Iterator[Clip]:
    """The built-in demo speech, where the recordings are not installed."""
    for row in demo_rows("train")[:500]:
        yield row.synthesise(), SAMPLE_RATE, row.text


def noise_clips(seconds: npt.NDArray[np.floating[Any]]) -> Iterator[Clip]:
    """Noise of given lengths, with as many letters as would be read in that time: arithmetic does not ask for sense."""
    random = np.random.default_rng(0)
    for duration_s in seconds.tolist():
        letters = random.choice([*_LETTERS, " "], max(1, int(duration_s * _LETTERS_A_SECOND)))
        noise = (random.standard_normal(round(duration_s * SAMPLE_RATE)) * 3000).astype(np.int16)
        yield noise, SAMPLE_RATE, "".join(letters).strip() or "e"


def librispeech_clips(number: int) -> Iterator[Clip]:
    """LibriSpeech-like lengths."""
    return noise_clips(length_set("LibriSpeech-like", number) / SAMPLE_RATE)


def short_clips(number: int) -> Iterator[Clip]:
    """Utterances of 1 to 2 s, a shard of them."""
    return noise_clips(np.random.default_rng(1).uniform(*_SHORT_S, number))


def recipe_values(size: str) -> dict[str, Any]:
    """Text and model of a recipe: `tiny`, the shipped telephone recipe's, or `base`, wav2vec2-base; both unmasked."""
    values = read_values(resources.find("recipes", "telephone"))
    values = {key: values[key] for key in ("text", "model", "spec_augment")}
    if size == "base":
        values["model"] = {"layerdrop": values["model"]["layerdrop"]}
    return values


def make_speech(
    folder: Path, name: str, clips: Iterator[Clip], *, most: int, copies: int = 1, size: str = "tiny"
) -> Speech:
    """Write recordings, prepare them by both ways, check that both have the same labels, and make the model."""
    from asr_train.prepare import prepare  # noqa: PLC0415 - imports transformers, which takes seconds

    place = folder / name.replace(" ", "-")
    source = {"name": place.name, "max_steps": 1_000_000, "data": write_clips(place, clips, most)}
    nested, flat, model = place / "nested.arrow", place / "flat.arrow", place / "model"
    recipe = decode_recipe({**source, **recipe_values(size)})
    corpus = prepare(recipe, progress=False)
    _make_model(model, recipe, corpus)
    _map(corpus, nested, flat)
    for path in place.glob("*.wav"):
        path.unlink()
    if copies > 1:
        _copy(corpus.path, copies)
    train = Corpus.open(corpus.path).train
    audio_s = float(train.num_samples.sum()) / SAMPLE_RATE
    return Speech(name, source, model, nested, flat, copies, audio_s, len(train))


def write_clips(place: Path, clips: Iterator[Clip], most: int) -> dict[str, Any]:
    """Write recordings and their manifest into a new folder; the data of a recipe that trains on them."""
    place.mkdir()
    manifest = place / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as lines:
        for number, (samples, rate, text) in enumerate(islice(clips, most)):
            soundfile.write(place / f"{number:05d}.wav", samples, rate)
            lines.write(json.dumps({"audio_filepath": f"{number:05d}.wav", "text": text, "id": str(number)}) + "\n")
    listed = {"kind": "jsonl", "path": str(manifest)}
    return {"train": listed, "corpus_root": str(place), "num_proc": 1, "max_rejected_percent": 100.0}


def _map(corpus: Corpus, nested: Path, flat: Path) -> None:
    """What the guide's `map` leaves in its cache, and the same with flat lists and their lengths.

    Raises:
        CorpusError: the labels are not the corpus's.
    """
    import datasets  # noqa: PLC0415
    from transformers import Wav2Vec2Processor  # noqa: PLC0415

    datasets.disable_progress_bars()
    processor: Any = Wav2Vec2Processor.from_pretrained(corpus.processor_dir)
    train = corpus.train
    listed = datasets.Dataset.from_dict({"row": list(range(len(train)))})

    def as_written(entry: dict[str, Any]) -> Any:
        samples = train.waveform(entry["row"]).astype(np.float32) / 32768
        encoded = processor(samples, sampling_rate=SAMPLE_RATE, text=train.text(entry["row"]))
        encoded["input_length"] = len(encoded["input_values"][0])
        return encoded

    def flattened(entry: dict[str, Any]) -> Any:
        encoded = as_written(entry)
        values = encoded["input_values"][0]
        return {"input_values": values, "labels": encoded["labels"], "length": len(values)}

    for change, path in ((as_written, nested), (flattened, flat)):
        mapped = listed.map(change, remove_columns=["row"], cache_file_name=str(path))
        if mapped["labels"][:] != [train.labels(row).tolist() for row in range(len(train))]:
            raise CorpusError("the processor and the corpus do not give the same labels")


def _copy(path: Path, copies: int) -> None:
    """Make a corpus so many times as long: its one shard under further names."""
    train = path / "train"
    for number in range(1, copies):
        os.link(shard_path(train, 0), shard_path(train, number))
    info = read_json(path / "corpus.json")
    info["sets"]["train"] |= finish_set(train, copies)
    write_json(path / "corpus.json", info)


def _make_model(folder: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Random weights and their processor in a folder, from which every variant loads."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCTC  # noqa: PLC0415

    from asr_train.model import mask_settings  # noqa: PLC0415
    from asr_train.model_config import build_processor, feature_extractor, load_model_config  # noqa: PLC0415

    config = load_model_config(recipe.model, vocabulary=corpus.vocabulary)
    masks = mask_settings(recipe.spec_augment, config)
    config.mask_time_prob, config.mask_feature_prob = masks.time_prob, masks.feature_prob
    config.layerdrop = recipe.model.layerdrop
    config.ctc_loss_reduction, config.ctc_zero_infinity = "mean", True
    torch.manual_seed(0)
    model = AutoModelForCTC.from_config(config)
    model.save_pretrained(folder)
    build_processor(corpus.vocabulary, feature_extractor(recipe.model, config)).save_pretrained(folder)
