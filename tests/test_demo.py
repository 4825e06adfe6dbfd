"""The demo corpus: what its three sets promise, and that its speech is a function of the row alone."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import espeakng_loader
import numpy as np
import psutil
import pytest

from asr_train.data import demo
from asr_train.data.demo import HELDOUT_VOICES, TRAIN_VOICES, DemoRow, demo_rows, split_of
from asr_train.data.demo_grammar import PATTERNS, all_words
from asr_train.errors import CorpusError

SPLITS = ("train", "heldout_sentences", "heldout_voices")
ROW = DemoRow("x", "please freeze my card", TRAIN_VOICES[0], 180, 50, 7, 30.0)


def words(split: str) -> list[str]:
    return [word for row in demo_rows(split) for word in row.text.split()]


def test_no_sentence_is_in_two_sets_or_twice_in_one() -> None:
    texts = {split: [row.text for row in demo_rows(split)] for split in SPLITS}
    for split in SPLITS:
        assert len(set(texts[split])) == len(texts[split])
    for one, other in combinations(SPLITS, 2):
        assert set(texts[one]).isdisjoint(texts[other])


def test_held_out_sets_are_large_enough_and_say_known_words() -> None:
    for split in SPLITS[1:]:
        assert len(demo_rows(split)) >= 300
        assert len(words(split)) >= 1500
        assert set(words(split)) <= set(words("train"))
    assert set(words("train")) == all_words()


def test_voices_of_heldout_voices_are_never_trained_on() -> None:
    voices = {split: {row.voice for row in demo_rows(split)} for split in SPLITS}
    assert voices["train"] == set(TRAIN_VOICES)
    assert voices["heldout_voices"] == set(HELDOUT_VOICES)
    assert len(voices["train"]) >= 20
    assert len(voices["heldout_voices"]) >= 5
    assert voices["heldout_sentences"] <= voices["train"]
    variants = [{voice.partition("+")[2] for voice in group} for group in (TRAIN_VOICES, HELDOUT_VOICES)]
    assert variants[0].isdisjoint(variants[1])  # another accent alone makes no new voice


def test_ids_are_unique_and_name_the_intent() -> None:
    ids = [row.id for split in SPLITS for row in demo_rows(split)]
    assert len(set(ids)) == len(ids)
    assert {name.rsplit("-", 1)[1] for name in ids} == set(PATTERNS)
    assert len(PATTERNS) == 14


def test_texts_hold_lower_case_words_only() -> None:
    for split in SPLITS:
        for row in demo_rows(split):
            assert row.text == " ".join(row.text.split()) and row.text.replace(" ", "").isalpha()
            assert row.text == row.text.lower()


def test_a_sentence_belongs_to_one_set_whatever_the_sizes() -> None:
    for split in SPLITS:
        assert all(split_of(row.text) == split for row in demo_rows(split)[:50])


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(KeyError):
        demo_rows("dev")  # type: ignore[arg-type]


def test_an_intent_that_runs_out_of_sentences_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.NUM_ROWS, "train", 6000)
    with pytest.raises(CorpusError, match=r"train: the intent '\w+' has no new sentence for row \d+ of 6000"):
        demo_rows.__wrapped__("train")


def test_speech_is_mono_16_khz_int16_of_a_plausible_length() -> None:
    speech = ROW.synthesise()
    assert speech.dtype == np.int16 and speech.ndim == 1
    assert 0.8 * 16_000 < len(speech) < 2.5 * 16_000  # four words at 180 a minute: 1.3 s
    slow = replace(ROW, words_per_minute=120).synthesise()
    assert len(slow) > 1.25 * len(speech)


def test_every_voice_speaks_and_differs_from_the_others() -> None:
    spectra = {}
    for voice in TRAIN_VOICES + HELDOUT_VOICES:
        speech = replace(ROW, voice=voice).synthesise()
        assert np.abs(speech).max() > 5000
        frames = np.lib.stride_tricks.sliding_window_view(speech.astype(float), 512)[::160]
        power = np.abs(np.fft.rfft(frames * np.hanning(512))) ** 2
        power = power[power.sum(1) > 1e-3 * power.sum(1).max()]  # where there is speech
        bands = power[:, :256].reshape(-1, 32, 8).sum(2)
        spectra[voice] = np.log(bands / bands.sum(1, keepdims=True) + 1e-6).mean(0)
    for voice in HELDOUT_VOICES:
        nearest = min(np.sqrt(np.mean((spectra[voice] - spectra[other]) ** 2)) for other in TRAIN_VOICES)
        assert nearest > 0.15, voice


def test_the_same_row_gives_the_same_samples_whatever_was_said_before() -> None:
    rows = [replace(ROW, voice=voice, pitch=40) for voice in (*TRAIN_VOICES[:3], *HELDOUT_VOICES[:2])]
    first = [row.synthesise() for row in rows]
    again = [pickle.loads(pickle.dumps(row)).synthesise() for row in reversed(rows)]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_process_makes_the_same_corpus() -> None:
    program = (
        "import hashlib, sys; from asr_train.data.demo import demo_rows; print([hashlib.sha256("
        "repr(demo_rows(s)).encode() + demo_rows(s)[5].synthesise().tobytes()).hexdigest()"
        " for s in ('train', 'heldout_sentences', 'heldout_voices')])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_noise_lies_as_far_below_the_speech_as_the_row_says() -> None:
    for snr_db in (5.0, 20.0):
        clean = replace(ROW, snr_db=120.0).synthesise().astype(float)
        noisy = replace(ROW, snr_db=snr_db).synthesise().astype(float)
        gain = noisy @ clean / (clean @ clean)  # the level changes with the noise
        noise = noisy - gain * clean
        assert 20 * np.log10(gain * clean.std() / noise.std()) == pytest.approx(snr_db, abs=0.5)


def test_without_espeak_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    assert demo_rows("train")  # listing needs no synthesiser
    with pytest.raises(CorpusError, match=r"pip install 'wavefleet\[demo\]'"):
        ROW.synthesise()


def test_an_unknown_voice_is_refused_by_name_and_leaves_no_thread() -> None:
    """A thread of an unloaded library crashes or hangs the process some time later."""
    ROW.synthesise()
    num_threads = psutil.Process().num_threads()
    with pytest.raises(CorpusError, match="gmw/en-XX"):
        replace(ROW, voice="gmw/en-XX+m1").synthesise()
    assert psutil.Process().num_threads() == num_threads


def test_a_folder_without_espeaks_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """eSpeak NG's own answer is to end the process; and the next text must be spoken as ever."""
    speech = ROW.synthesise()
    num_threads = psutil.Process().num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(espeakng_loader, "get_data_path", lambda: tmp_path / "none")
        with pytest.raises(CorpusError, match=f"{tmp_path / 'none'}.*reinstall"):
            ROW.synthesise()
    assert psutil.Process().num_threads() == num_threads
    np.testing.assert_array_equal(ROW.synthesise(), speech)


def test_every_voice_is_one_that_espeak_has() -> None:
    data = Path(espeakng_loader.get_data_path())
    for voice in TRAIN_VOICES + HELDOUT_VOICES:  # eSpeak NG itself passes over a variant that it lacks
        accent, _, variant = voice.partition("+")
        assert (data / "lang" / accent).is_file() and (data / "voices" / "!v" / variant).is_file(), voice
