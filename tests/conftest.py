"""Fixtures that several test files share: speech-like audio made in code, small recipes, a small prepared corpus."""

import io
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from browser import browser
from slurm_cluster import SlurmCluster

from asr_train.config import Recipe
from asr_train.data.corpus import Corpus
from asr_train.prepare import prepare
from asr_train.recipe import decode_recipe, dump_recipe

# A shell's background job, as CI may be, ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

RATE = 16_000
WORDS = ["one", "two", "tree", "seven", "noon", "sell", "bill", "add", "a", "to", "tell", "soon"]

TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "mask_time_length": 2,
    "mask_feature_length": 2,
}


def speech(text, seconds, seed=0, rate=RATE):
    """A waveform that stands for a text: one tone a character, a little noise; float32 [num_samples]."""
    generator = np.random.default_rng(seed)
    num_samples = round(seconds * rate)
    which = np.minimum(np.arange(num_samples) * len(text) // num_samples, len(text) - 1)
    pitch = np.array([0.0 if character == " " else 200 + 40 * (ord(character) % 32) for character in text])[which]
    tone = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / rate) * (pitch > 0)
    return (tone + 0.01 * generator.standard_normal(num_samples)).astype(np.float32)


def encoded(waveform, rate=RATE, form="WAV", subtype=None):
    """A waveform as the bytes of an audio file."""
    stream = io.BytesIO()
    soundfile.write(stream, waveform, rate, format=form, subtype=subtype)
    return stream.getvalue()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_speech(folder, num_rows, seed=0, seconds=(0.5, 3.0), name="utterance"):
    """WAV files and a manifest in NeMo's form; returns the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        duration_s = float(generator.uniform(*seconds))
        text = " ".join(generator.choice(WORDS, max(1, round(duration_s * 1.5))))
        audio = folder / f"{name}-{number:03d}.wav"
        soundfile.write(audio, speech(text, duration_s, seed=number), RATE, subtype="PCM_16")
        rows.append({"audio_filepath": audio.name, "text": text.title(), "id": f"{name}-{number:03d}"})
    return write_jsonl(folder / "manifest.jsonl", rows)


def merged(values, changes):
    """Nested dicts, one laid over the other; dotted keys name nested ones."""
    result = dict(values)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            result[head] = merged(result.get(head) or {}, {rest: value})
        else:
            result[head] = value
    return result


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """Tests that use the session's cluster are marked `slurm`; those that start one of their own say so."""
    for item in items:
        if "slurm_session" in item.fixturenames:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and tests share the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_speech(tmp_path_factory):
    """Folder with train/manifest.jsonl (40 utterances of 0.5-3 s) and dev/manifest.jsonl (12)."""
    folder = tmp_path_factory.mktemp("speech")
    write_speech(folder / "train", 40, seed=1, name="train")
    write_speech(folder / "dev", 12, seed=2, name="dev")
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_speech, tmp_path_factory):
    """A function: dotted overrides -> a `Recipe` of a tiny layer-norm model on the tiny speech.

    All recipes of a session that keep `data`, `text` and `eval.sets` share one prepared corpus.
    """
    corpora = tmp_path_factory.mktemp("corpora")
    values = {
        "name": "tiny",
        "max_steps": 4,
        "unit_audio_s": 12,
        "units_per_step": 2,
        "data": {
            "train": {"kind": "jsonl", "path": str(tiny_speech / "train" / "manifest.jsonl")},
            "corpus_root": str(corpora),
            "num_proc": 1,
        },
        "eval": {"sets": {"dev": {"kind": "jsonl", "path": str(tiny_speech / "dev" / "manifest.jsonl")}}},
        "model": {"config": TINY_MODEL},
        "log": {"trackers": []},  # TensorBoard, the default where it is installed, is slow to load
    }

    def make(**changes) -> Recipe:
        """`tiny_recipe(max_steps=8, **{"optim.lr": 1e-3})`"""
        return decode_recipe(merged(values, changes))

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tiny_recipe) -> Corpus:
    """The tiny recipe's corpus, prepared."""
    return prepare(tiny_recipe(), progress=False)


@pytest.fixture
def tiny_recipe_file(tiny_recipe, tmp_path):
    """The tiny recipe as a YAML file, for command lines; a function of overrides."""

    def make(**changes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(tiny_recipe(**changes)), encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="module")
def window():
    """A browser for a module's tests; where there is none they are skipped, which `make test` counts as failed."""
    try:
        with browser() as opened:
            yield opened
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def slurm_session():
    """One real Slurm cluster for all tests that use `slurm`."""
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_session):
    """A real Slurm cluster of four nodes, all up, without jobs."""
    yield slurm_session
    slurm_session.restore()
