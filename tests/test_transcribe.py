"""Speech in, text out: the pipeline's text up to one window, and no seams beyond."""

import json
import subprocess
import sys
from itertools import pairwise

import jiwer
import numpy as np
import pytest
import soundfile
import soxr
import tiny
import torch
from conftest import RATE, merged
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, pipeline

from asr_train.data.text import Vocabulary
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, RecipeError, run_main
from asr_train.model import load_exported
from asr_train.model_config import build_processor, feature_extractor
from asr_train.transcribe import BadFile, Transcriber, Transcript, find_audio, main, transcribe

LETTERS = "aeilnorst"
SPOKEN = Vocabulary(("[PAD]", "[UNK]", "|", *LETTERS))
LETTER_SAMPLES, GAP_SAMPLES, SPACE_SAMPLES, EDGE_SAMPLES = 1280, 480, 1600, 1600


def speak(text, generator):
    """A tone a letter, with silence between, a longer one after each word: float32 waveform, label of each sample."""
    pieces = [silence(EDGE_SAMPLES + int(generator.integers(0, 4 * EDGE_SAMPLES)))]
    for word in text.split():
        for letter in word:
            number = LETTERS.index(letter)
            tone = np.sin(2 * np.pi * (300 + 250 * number) * np.arange(LETTER_SAMPLES) / RATE)
            labels = np.zeros(LETTER_SAMPLES, int)
            labels[320:960] = 3 + number
            pieces += [(0.3 * tone * np.hanning(LETTER_SAMPLES), labels), silence(GAP_SAMPLES)]
        waveform, labels = silence(SPACE_SAMPLES + int(generator.integers(0, 2 * EDGE_SAMPLES)))
        labels[320:720] = 2
        pieces.append((waveform, labels))
    waveform, labels = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    waveform += 0.005 * generator.standard_normal(len(waveform))
    return waveform.astype(np.float32), labels


def silence(num_samples):
    return np.zeros(num_samples), np.zeros(num_samples, int)


def sentence(generator, num_words):
    return " ".join("".join(generator.choice(list(LETTERS), generator.integers(1, 7))) for _ in range(num_words))


def save(hf, vocabulary, settings, folder):
    hf.save_pretrained(folder)
    build_processor(vocabulary, feature_extractor(settings, hf.config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def listener(tmp_path_factory):
    """Folder of a small model that understands `speak`.

    Its convolution is a bank of filters at the letters' pitches, the rest is trained frame by frame, for the frames'
    labels are known. Attention, positions and normalisation are real, so what it hears depends on the whole window.
    """
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **merged(tiny.recipe().model.config, tiny.no_dropout()) | {
            "vocab_size": SPOKEN.size, "pad_token_id": 0, "num_hidden_layers": 1, "hidden_size": 32,
            "intermediate_size": 32, "conv_dim": [40], "conv_kernel": [640], "conv_stride": [320], "conv_bias": True,
            "num_conv_pos_embeddings": 16, "do_stable_layer_norm": True,
        }
    )  # fmt: skip
    hf = Wav2Vec2ForCTC(config).train()
    conv = hf.wav2vec2.feature_extractor.conv_layers[0].conv
    times = np.arange(640) / RATE
    waves = [wave(2 * np.pi * (300 + 250 * number) * times) for number in range(9) for wave in (np.sin, np.cos)]
    filters = 0.1 * np.hanning(640) * np.stack([sign * wave for wave in waves for sign in (1, -1)])
    with torch.no_grad():
        conv.weight[:36, 0] = torch.from_numpy(filters).float()
        conv.weight[36:] = 0
        conv.bias[:] = torch.tensor([0.0] * 36 + [5.0, 5.0, -5.0, -5.0])  # so that layer norm leaves loudness
    hf.freeze_feature_encoder()
    parameters = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    generator = np.random.default_rng(0)
    num_steps = 400
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, 2 * (num_steps - step) / num_steps)
        waveform, labels = speak(sentence(generator, 6), generator)
        values = torch.from_numpy((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7))
        logits = hf(values[None]).logits[0]
        wanted = torch.from_numpy(labels[np.arange(len(logits)) * 320 + 320])
        loss = nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save(hf.eval(), SPOKEN, tiny.recipe().model, tmp_path_factory.mktemp("listener"))


def transcriber(folder, **settings):
    return Transcriber(*load_exported(folder), **settings)


FAMILIES = {
    "layer norm": ("wav2vec2", {"do_stable_layer_norm": True}),
    "group norm": ("wav2vec2", {"feat_extract_norm": "group"}),
    "hubert": ("hubert", {}),
    "data2vec": ("data2vec-audio", {}),
    "sew": ("sew", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipelines_text_and_word_times_up_to_one_window(family, tmp_path):
    architecture, config = FAMILIES[family]
    model = tiny.model(architecture, config)
    with torch.no_grad():
        model.hf.lm_head.weight.mul_(5)
    folder = save(model.hf, tiny.VOCABULARY, tiny.recipe(architecture, config).model, tmp_path)
    ours, theirs = transcriber(folder), pipeline("automatic-speech-recognition", model=str(folder))
    heard = set()
    for seed, seconds in enumerate((0.05, 0.5, 3.333, 12)):
        waveform = (0.2 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)
        text, words = ours.text_and_words(waveform)
        expected = theirs(waveform, return_timestamps="word")
        assert text == expected["text"]
        heard |= set(text)
        assert [(word.text, word.start_s, word.end_s) for word in words] == [
            (chunk["text"], *map(pytest.approx, chunk["timestamp"])) for chunk in expected["chunks"]
        ]
    assert len(heard) > 2


def test_less_than_a_frame_is_no_text(listener):
    assert transcriber(listener).text_and_words(np.zeros(639, np.float32)) == ("", [])
    assert transcriber(listener).text_and_words(np.zeros(640, np.float32)) == ("", [])


def test_three_joined_clips_give_the_joined_texts_wherever_the_cuts_fall(listener):
    """Every 0.05 s of one window's step in turn: the ends and middles of overlaps fall on every part of a word."""
    generator = np.random.default_rng(7)
    ours = transcriber(listener, window_s=4, overlap_s=1.5)
    alone = transcriber(listener)
    texts = [sentence(generator, 10) for _ in range(3)]
    clips = [speak(text, generator)[0] for text in texts]
    heard = [alone.text_and_words(clip)[0] for clip in clips]
    assert heard == texts
    joined = np.concatenate(clips)
    assert len(joined) > 4 * 4 * RATE
    in_a_word = 0
    for shift_samples in range(0, int(2.5 * RATE), 800):
        shifted = np.concatenate([0.005 * generator.standard_normal(shift_samples).astype(np.float32), joined])
        text, words = ours.text_and_words(shifted)
        assert text.split() == " ".join(heard).split(), f"shifted by {shift_samples} samples"
        middles = np.arange(1, len(shifted) // 40_000) * 2.5 + 0.75
        in_a_word += sum(any(word.start_s < middle < word.end_s for word in words) for middle in middles)
    assert in_a_word > 100


def test_long_audio_as_the_pipeline_hears_it(listener):
    generator = np.random.default_rng(11)
    text = sentence(generator, 60)
    waveform, _ = speak(text, generator)
    heard, words = transcriber(listener, window_s=6, overlap_s=2).text_and_words(waveform)
    theirs = pipeline("automatic-speech-recognition", model=str(listener))
    expected = theirs(waveform, chunk_length_s=6, stride_length_s=1)["text"]
    assert len(waveform) > 5 * 6 * RATE
    assert heard.split() == text.split()
    assert jiwer.wer(expected, heard) <= 0.005
    assert words[-1].end_s == pytest.approx(len(waveform) / RATE, abs=0.3)
    assert all(first.end_s <= second.start_s for first, second in pairwise(words))


@pytest.mark.parametrize(
    ("form", "rate", "channels"), [("WAV", 8000, 1), ("FLAC", 44_100, 2), ("OGG", 48_000, 1), ("MP3", 16_000, 2)]
)
def test_other_formats_rates_and_channels(listener, tmp_path, form, rate, channels):
    text = "tone aria lesion"
    waveform, _ = speak(text, np.random.default_rng(3))
    path = tmp_path / f"clip.{form.lower()}"
    resampled = soxr.resample(waveform, RATE, rate)
    soundfile.write(path, np.stack([resampled] * channels, axis=1), rate, format=form)
    (found,) = transcribe(listener, [path])
    assert found.text == text
    assert found.duration_s == pytest.approx(len(waveform) / RATE, abs=0.2)
    assert isinstance(found, Transcript)


def test_windows_that_cannot_be_joined_are_refused(listener):
    for window_s, overlap_s in ((10, 6), (0.5, 0.1), (10, 0), (float("nan"), 1)):
        with pytest.raises(RecipeError, match="--overlap-s"):
            transcriber(listener, window_s=window_s, overlap_s=overlap_s)


@pytest.fixture
def folder(tmp_path):
    """Audio files of every kind, one of them broken, and something else."""
    root = tmp_path / "clips"
    (root / "deep").mkdir(parents=True)
    for name, text in (("one.wav", "tone"), ("deep/two.flac", "aria lesion"), ("three.ogg", "snore")):
        soundfile.write(root / name, speak(text, np.random.default_rng(1))[0], RATE)
    (root / "broken.wav").write_bytes(b"RIFF and then nothing")
    (root / "notes.txt").write_text("no audio")
    return root


def run(capsys, *arguments):
    code = run_main(main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bad_files_are_listed_at_the_end_and_the_others_transcribed(listener, folder, capsys):
    code, out, err = run(capsys, listener, folder, folder / "gone.wav")
    assert code == EXIT_FAILED
    lines = dict(line.split("\t") for line in out.splitlines())
    assert lines == {
        str(folder / "deep" / "two.flac"): "aria lesion",
        str(folder / "one.wav"): "tone",
        str(folder / "three.ogg"): "snore",
    }
    assert "2 of 5 files could not be transcribed" in err
    assert f"{folder / 'broken.wav'}: unreadable audio" in err
    assert f"{folder / 'gone.wav'}: missing file" in err


def test_one_file_prints_its_text_alone(listener, folder, capsys):
    assert run(capsys, listener, folder / "one.wav")[:2] == (EXIT_DONE, "tone\n")


def test_where_nothing_is_heard_that_is_said(listener, tmp_path, capsys):
    soundfile.write(tmp_path / "quiet.wav", np.zeros(RATE), RATE)
    code, out, err = run(capsys, listener, tmp_path / "quiet.wav")
    assert (code, out) == (EXIT_DONE, "\n")
    assert "nothing was heard in 1 of 1 files" in err


def test_jsonl_has_word_times(listener, folder, capsys):
    code, out, _ = run(capsys, listener, folder / "deep" / "two.flac", "--format", "jsonl")
    line = json.loads(out)
    assert code == EXIT_DONE
    assert line["file"] == str(folder / "deep" / "two.flac")
    assert line["text"] == "aria lesion"
    assert [word["text"] for word in line["words"]] == ["aria", "lesion"]
    waveform, labels = speak("aria lesion", np.random.default_rng(1))
    spoken_s = np.flatnonzero(labels > 2) / RATE
    between_s = np.flatnonzero(labels == 2)[0] / RATE
    truth = [(spoken_s[0], spoken_s[spoken_s < between_s][-1]), (spoken_s[spoken_s > between_s][0], spoken_s[-1])]
    found = [(word["start_s"], word["end_s"]) for word in line["words"]]
    assert found == [(pytest.approx(start_s, abs=0.04), pytest.approx(end_s, abs=0.04)) for start_s, end_s in truth]
    assert line["duration_s"] == round(len(waveform) / RATE, 3)


def test_out_writes_a_file_for_each_input(listener, folder, tmp_path, capsys):
    (folder / "one.flac").write_bytes((folder / "deep" / "two.flac").read_bytes())
    out = tmp_path / "out"
    code, printed, _ = run(capsys, listener, folder, "--format", "srt", "--out", out)
    assert code == EXIT_FAILED
    assert printed == ""
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert found.keys() == {"one.wav.srt", "one.flac.srt", "three.srt", "deep/two.srt"}
    assert found["one.wav.srt"].startswith("1\n00:00:00,")
    assert "aria lesion" in found["deep/two.srt"]
    run(capsys, listener, folder / "one.wav", "--format", "vtt", "--out", out)
    assert (out / "one.vtt").read_text().startswith("WEBVTT\n\n00:00:00.")
    code, _, err = run(
        capsys, listener, folder / "one.wav", folder / "deep", folder / "deep" / ".." / "one.wav", "--out", out
    )
    assert code == EXIT_USAGE
    assert "the same name" in err


def test_a_folder_without_audio_and_a_folder_without_a_model_are_refused(listener, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, listener, tmp_path / "empty")
    assert code == EXIT_USAGE
    assert "holds no audio files" in err
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    code, _, err = run(capsys, tmp_path / "empty", tmp_path / "a.wav")
    assert code == EXIT_FAILED
    assert str(tmp_path / "empty") in err
    assert list(find_audio([tmp_path])) == [tmp_path / "a.wav"]
    (found,) = transcribe(listener, [tmp_path / "none.wav"])
    assert found == BadFile(tmp_path / "none.wav", f"missing file: {tmp_path / 'none.wav'}")


def test_transcripts_reach_a_pipe(listener, folder):
    """As a program of its own; a progress bar must not take stdout over."""
    done = subprocess.run(
        [sys.executable, "-m", "asr_train.transcribe", str(listener), str(folder / "one.wav")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "tone\n"), done.stderr
