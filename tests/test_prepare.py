"""`python -m asr_train.prepare`: what is refused and why, what is kept, interrupted and simultaneous prepares."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import RATE, encoded, speech, write_jsonl, write_speech
from transformers import Wav2Vec2CTCTokenizer

from asr_train import prepare as prepare_module
from asr_train.data.corpus import Corpus
from asr_train.data.rows import SourceError
from asr_train.errors import CorpusError, RecipeError, run_main
from asr_train.geometry import WAV2VEC2
from asr_train.lock import HeartbeatLock
from asr_train.prepare import is_prepared, main, prepare
from asr_train.recipe import load_recipe

TONE = speech("good text", 1.0)


def noise(seconds):
    return (0.1 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)


# name -> bytes of the audio file (None: there is none), text, reason in training, reason in evaluation
BAD_ROWS = {
    "good": (encoded(TONE), "good text", None, None),
    "gone": (None, "good text", "missing file", "missing file"),
    "garbage": (b"garbage" * 99, "good text", "unreadable audio", "unreadable audio"),
    "cut": (encoded(noise(1))[:9_000], "good text", "truncated audio", "truncated audio"),
    "cut-flac": (encoded(noise(1), form="FLAC")[:9_000], "good text", "truncated audio", "truncated audio"),
    "empty": (encoded(TONE[:0]), "good text", "no samples", "no samples"),
    "nan": (encoded(np.append(TONE, np.float32(np.nan)), subtype="FLOAT"), "good text", "NaN", "NaN"),
    "silent": (encoded(0 * TONE), "good text", "silence", None),
    "short": (encoded(TONE[:800]), "go", "too short", None),
    "no-frame": (encoded(TONE[:300]), "g", "too short", None),
    "long": (encoded(noise(4)), "good text", "too long", None),
    "no-text": (encoded(TONE), None, "empty text", "empty text"),
    "only-removed": (encoded(TONE), " ?! ", "empty text", "empty text"),
    "crowded": (encoded(TONE[:4_000]), "oodd teg " * 3, "unalignable", None),
}


def bad_manifest(folder):
    folder.mkdir()
    rows = []
    for name, (data, text, _, _) in BAD_ROWS.items():
        if data is not None:
            (folder / f"{name}.wav").write_bytes(data)
        rows.append({"id": name, "audio": f"{name}.wav", "text": text})
    return str(write_jsonl(folder / "m.jsonl", rows))


@pytest.fixture
def bad_recipe(tiny_recipe, tmp_path):
    path = bad_manifest(tmp_path / "bad")
    source = {"kind": "jsonl", "path": path}

    def make(**changes):
        values = {"data.train": source, "eval.sets": {"dev": source}, "text.remove": "?!", "data.max_duration_s": 3.0}
        limits = {"data.max_rejected_percent": 95.0, "data.corpus_root": str(tmp_path / "corpora")}
        return tiny_recipe(**{**values, **limits, **changes})

    return make


def rejected(path):
    return [json.loads(line) for line in (path / "rejected.jsonl").open()]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_every_bad_row_is_refused_with_its_reason(bad_recipe, num_proc):
    corpus = prepare(bad_recipe(**{"data.num_proc": num_proc, "data.shard_rows": 4}), progress=False)
    found = {(entry["set"], entry["id"]): entry["reason"] for entry in rejected(corpus.path)}
    for name, (_, _, training, evaluation) in BAD_ROWS.items():
        assert found.get(("train", name)) == training, name
        assert found.get(("dev", name)) == evaluation, name
    for position, name in enumerate(BAD_ROWS):
        for entry in rejected(corpus.path):
            if entry["id"] == name:
                assert entry["row"] == position
                assert entry["source"].endswith(f"m.jsonl:{position + 1}")
                assert entry["value"]
    kept = {name for name, (_, _, _, evaluation) in BAD_ROWS.items() if evaluation is None}
    dev = corpus.sets["dev"]
    assert {dev.id(row) for row in range(len(dev))} == kept
    assert dev.num_refused == len(BAD_ROWS) - len(kept)
    assert [corpus.train.id(row) for row in range(len(corpus.train))] == ["good"]


def test_the_summary_counts_every_reason_and_shows_texts(bad_recipe, capsys):
    corpus = prepare(bad_recipe())
    shown = capsys.readouterr().err
    summary = json.loads((corpus.path / "summary.json").read_text())
    for name, column in (("train", 2), ("dev", 3)):
        expected = Counter(row[column] for row in BAD_ROWS.values() if row[column])
        assert summary["sets"][name]["rejected"] == expected == corpus.info["sets"][name]["rejected"]
        assert summary["sets"][name]["rows"] == len(BAD_ROWS) - expected.total()
    text = (corpus.path / "summary.txt").read_text()
    for words in ("truncated audio", "unalignable", "12 frames, the text needs 32", "good text", "[PAD] [UNK] |"):
        assert words in text
        assert words in shown


def test_too_many_refused_rows_are_an_error_and_nothing_is_lost(bad_recipe, capsys):
    recipe = bad_recipe(**{"data.max_rejected_percent": 60.0})
    with pytest.raises(CorpusError) as caught:
        prepare(recipe, progress=False)
    message = str(caught.value)
    assert "set train: 13 of 14 rows (92.9 %)" in message
    assert "truncated audio 2" in message
    assert "set dev" not in message  # 9 of 14 are kept
    listed = Path(message.partition("every refused row is in ")[2].partition(",")[0])
    assert len(rejected(listed.parent)) == 13 + 8
    assert is_prepared(recipe) is None
    before = {path: path.stat().st_mtime_ns for path in shards(recipe)}
    corpus = prepare(bad_recipe(), progress=False)  # the limit raised: what was done is kept
    assert {path: path.stat().st_mtime_ns for path in shards(recipe)} == before
    with pytest.raises(CorpusError, match=r"92\.9 %"):  # and lowered again
        prepare(recipe, progress=False)
    assert Corpus.open(corpus.path)


def shards(recipe):
    return sorted(Path(recipe.data.corpus_root).rglob("*.arrow"))


def test_an_empty_set_is_an_error(bad_recipe, tmp_path):
    empty = write_jsonl(tmp_path / "bad" / "e.jsonl", [{"audio": "gone.wav", "text": "a"}])
    with pytest.raises(CorpusError, match="set dev: no rows are left: missing file 1"):
        prepare(
            bad_recipe(
                **{"eval.sets": {"dev": {"kind": "jsonl", "path": str(empty)}}, "data.max_rejected_percent": 100}
            ),
            progress=False,
        )


def test_bad_input_of_all_sets_is_listed_at_once(tiny_recipe, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"audio": "a.wav"}])
    sets = {"one": {"kind": "jsonl", "path": str(bad)}, "two": {"kind": "csv", "path": str(tmp_path / "none.csv")}}
    with pytest.raises(SourceError) as caught:
        prepare(tiny_recipe(**{"eval.sets": sets, "data.train.path": "/gone.jsonl"}), progress=False)
    assert len(caught.value.problems) == 3


def test_names_of_sets_that_a_corpus_has_already_are_refused(tiny_recipe):
    source = {"kind": "jsonl", "path": "/x.jsonl"}
    for name in ("train", "processor"):
        with pytest.raises(RecipeError, match=f"eval.sets.{name}"):
            prepare(tiny_recipe(**{"eval.sets": {name: source}}))


# --- the vocabulary ---------------------------------------------------------------------------------------------


def manifest_of(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number}.wav").write_bytes(encoded(speech(text or "a", 2.0, seed=number)))
    rows = [{"id": f"r{number}", "audio": f"{number}.wav", "text": text} for number, text in enumerate(texts)]
    return {"kind": "jsonl", "path": str(write_jsonl(folder / "m.jsonl", rows))}


def upper_tokenizer(folder, **special):
    folder.mkdir()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABDEHLORW'"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **special).save_pretrained(folder)
    return str(folder)


def test_the_vocabulary_comes_from_training_texts_alone(tiny_recipe, tmp_path):
    train, dev = manifest_of(tmp_path / "t", ["abba", "a cab"]), manifest_of(tmp_path / "d", ["dab", "abc"])
    recipe = tiny_recipe(**{"data.train": train, "eval.sets": {"dev": dev}, "data.corpus_root": str(tmp_path)})
    corpus = prepare(recipe, progress=False)
    assert corpus.vocabulary.tokens == ("[PAD]", "[UNK]", "|", "a", "b", "c")
    dev_set = corpus.sets["dev"]
    assert dev_set.labels(0).tolist() == []  # d is unknown: kept, scored, without labels
    assert dev_set.text(0) == "dab"
    assert dev_set.labels(1).tolist() == [3, 4, 5]
    assert dev_set.num_labels.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("policy", "train_texts", "dev_text", "dev_labels"),
    [
        ("reject", ["HELLO"], "ZEBRA", []),
        ("remove", ["HELLO", "BRAED"], "ZEBRA", "EBRA"),
        ("unk", ["HELLO", "BRAZED"], "ZEBRA", "<unk>EBRA"),
        (None, ["HELLO", "BRAZED"], "ZEBRA", "<unk>EBRA"),
    ],
)
def test_characters_outside_a_given_vocabulary(tiny_recipe, tmp_path, policy, train_texts, dev_text, dev_labels):
    changes = {
        "text.processor": upper_tokenizer(tmp_path / "p"),
        "text.case": "upper",
        "text.unknown_characters": policy,
        "data.train": manifest_of(tmp_path / "t", ["hello", "brazed"]),
        "eval.sets": {"dev": manifest_of(tmp_path / "d", ["zebra"])},
        "data.corpus_root": str(tmp_path),
        "data.max_rejected_percent": 50,
    }
    corpus = prepare(tiny_recipe(**changes), progress=False)
    assert [corpus.train.text(row) for row in range(len(corpus.train))] == train_texts
    dev = corpus.sets["dev"]
    assert dev.text(0) == dev_text  # the reference stays whole
    ids = {token: number for number, token in enumerate(corpus.vocabulary.tokens)}
    expected = [ids["<unk>"], *(ids[c] for c in "EBRA")] if "<unk>" in dev_labels else [ids[c] for c in dev_labels]
    assert dev.labels(0).tolist() == expected
    if policy == "reject":
        entry = rejected(corpus.path)[0]
        assert (entry["id"], entry["reason"], entry["value"]) == ("r1", "unknown characters", "Z")
    assert "Z x1" in (corpus.path / "summary.txt").read_text()


def test_texts_in_the_wrong_case_for_a_given_vocabulary_are_refused(tiny_recipe, tmp_path):
    """With `unk` every label would be [UNK], and training would go on in silence."""
    changes = {"text.processor": upper_tokenizer(tmp_path / "p"), "data.corpus_root": str(tmp_path)}
    with pytest.raises(CorpusError, match=r"lacks \d+ % .*text\.case: lower"):
        prepare(tiny_recipe(**changes), progress=False)


@pytest.mark.parametrize("processor", [False, True])
def test_a_word_delimiter_in_transcripts_is_refused_unless_removed(tiny_recipe, tmp_path, processor):
    changes = {"data.train": manifest_of(tmp_path / "t", ["all bad", "all | old"]), "data.corpus_root": str(tmp_path)}
    changes |= {"eval.sets": {}, "text.case": "upper"}
    if processor:
        changes["text.processor"] = upper_tokenizer(tmp_path / "p")
    with pytest.raises(CorpusError, match=r"'\|' in 'ALL \| OLD'"):
        prepare(tiny_recipe(**changes), progress=False)
    corpus = prepare(tiny_recipe(**changes, **{"text.remove": "|"}), progress=False)
    assert corpus.train.text(1) == "ALL OLD"


def test_labels_in_alignment_are_those_after_normalisation(tiny_recipe, tmp_path):
    """25 frames for 27 characters: unalignable as it came, alignable once the digits are removed."""
    folder = tmp_path / "t"
    source = manifest_of(folder, ["abc"])
    (folder / "0.wav").write_bytes(encoded(speech("abc", 0.51)))
    rows = [{"id": "r0", "audio": "0.wav", "text": "abc 01234567890123456789012345"}]
    write_jsonl(folder / "m.jsonl", rows)
    changes = {"data.train": source, "eval.sets": {}, "data.corpus_root": str(tmp_path)}
    with pytest.raises(CorpusError, match="unalignable 1"):
        prepare(tiny_recipe(**changes), progress=False)
    assert len(prepare(tiny_recipe(**changes, **{"text.remove_digits": True}), progress=False).train) == 1


# --- the command ------------------------------------------------------------------------------------------------


def test_command_line(tiny_recipe_file, tmp_path, capsys):
    recipe = str(tiny_recipe_file(**{"data.corpus_root": str(tmp_path / "c")}))
    assert run_main(main, [recipe]) == 0
    first = capsys.readouterr().out
    assert "prepared: " in first
    assert "train 40 rows, dev 12 rows" in first
    assert run_main(main, [recipe]) == 0
    assert "already prepared: " in capsys.readouterr().out
    assert run_main(main, [recipe, "data.max_duration_s=2.9", "data.max_rejected_percent=99"]) == 0
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert run_main(main, [recipe, "text.caze=upper"]) == 2
    assert "did you mean text.case?" in capsys.readouterr().err
    assert run_main(main, [recipe, "data.train.0.path=/gone.jsonl"]) == 4
    assert "/gone.jsonl: no such file" in capsys.readouterr().err


def test_a_second_prepare_opens_no_source(tiny_recipe, tiny_corpus, monkeypatch):
    monkeypatch.setattr(prepare_module, "open_sources", None)
    assert prepare(tiny_recipe()).hash == tiny_corpus.hash
    assert is_prepared(tiny_recipe()) == tiny_corpus.path


def test_a_model_of_other_convolutions_has_its_own_corpus(tiny_recipe, tiny_corpus):
    """Alignability depends on the frames; and transformers' config of three layers needs no count of them."""
    stack = {"conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 4]}
    corpus = prepare(tiny_recipe(**{"model.config": stack}), progress=False)
    assert corpus.path != tiny_corpus.path
    assert (corpus.geometry.kernels, corpus.geometry.strides) == ((10, 8, 4), (5, 8, 4))


def test_what_nobody_reads_and_what_the_terminal_has_no_letters_for_is_no_reason_to_fail(tiny_recipe_file, tmp_path):
    """Standard output is closed by its reader before the work is done, `| head` say, and nothing is UTF-8."""
    recipe = str(tiny_recipe_file(**{"data.corpus_root": str(tmp_path / "\u0642"), "name": "arabic"}))
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "asr_train.prepare", recipe]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ascii_only)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0, said
    assert "rows kept" in said and "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True, env=ascii_only, check=True)
    assert again.stdout.startswith(f"already prepared: {tmp_path}/\\u0642/arabic-")


def test_a_manifest_that_changed_since_is_said(tiny_recipe_file, tmp_path, capsys):
    manifest = write_speech(tmp_path / "s", 3)
    changes = {"data.train.path": str(manifest), "data.corpus_root": str(tmp_path / "c")}
    recipe = str(tiny_recipe_file(**changes))
    assert run_main(main, [recipe]) == 0
    write_speech(tmp_path / "s", 4)
    capsys.readouterr()
    assert run_main(main, [recipe]) == 4
    assert f"files that have changed since:\n  {manifest}" in capsys.readouterr().err
    assert len(prepare(load_recipe(recipe)).train) == 3  # a training goes on, and says so
    assert f"note: corpus {tmp_path}" in capsys.readouterr().err


# --- interrupted, and at once -----------------------------------------------------------------------------------


@pytest.fixture
def slow_recipe(tiny_recipe_file, tmp_path):
    """A recipe of 30 shards that take a while: two minutes of 48 kHz noise each, to be resampled, by 2 workers."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for number in range(4):
        data = encoded(np.tile(noise(1), 90), 48_000)
        (folder / f"{number}.wav").write_bytes(data)
    with (folder / "t.csv").open("w") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "audio", "text", "offset", "duration"])
        writer.writerows(
            [f"r{number}", f"{number % 4}.wav", "some words", 0, 29.9 - number / 100] for number in range(120)
        )
    changes = {"data.train": {"kind": "csv", "path": str(folder / "t.csv")}, "data.shard_rows": 4, "eval.sets": {}}
    return tiny_recipe_file(**changes, **{"data.corpus_root": str(tmp_path / "corpora"), "data.num_proc": 2})


def start(recipe):
    command = [sys.executable, "-m", "asr_train.prepare", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        found += Path(f"/proc/{pid}/task/{task}/children").read_text().split()
    return [int(child) for child in found]


def kill_once(recipe, corpora, at_least):
    """Start a prepare, SIGKILL it once it has written some shards; the shards and when they were written."""

    def done():
        return {path: path.stat().st_mtime_ns for path in corpora.glob("*/train/shard-*.arrow")}

    process = start(recipe)
    wait_for(lambda: len(done()) >= at_least or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(is_running, workers)))  # no orphan goes on, or waits for ever
    assert at_least <= len(done()) < 30, "the kill came too late to test anything"
    assert not list(corpora.glob("*/corpus.json"))
    return done()


def test_killed_at_any_moment_prepare_goes_on_where_it_was(slow_recipe, tmp_path):
    corpora = tmp_path / "corpora"
    first = kill_once(slow_recipe, corpora, 1)
    kept = kill_once(slow_recipe, corpora, len(first) + 5)
    assert first.items() <= kept.items()  # shards of before the kill were not written again
    out, err = start(slow_recipe).communicate(timeout=300)
    assert "prepared: " in out, err
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    corpus = Corpus.open(next(corpora.iterdir()))
    assert [corpus.train.id(row) for row in range(120)] == [f"r{number}" for number in range(120)]
    assert corpus.train.num_samples.tolist() == [round((29.9 - n / 100) * RATE) for n in range(120)]
    left = [
        path.name for path in corpus.path.rglob("*") if path.name.endswith((".tmp", ".rejected.jsonl", "lock.json"))
    ]
    assert left == []


def test_two_at_once_make_one_corpus(slow_recipe, tmp_path):
    both = [start(slow_recipe), start(slow_recipe)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("rows kept" in err for _, err in said) == 1  # one prepared and reported
    corpus = Corpus.open(next((tmp_path / "corpora").iterdir()))
    assert [corpus.train.id(row) for row in range(120)] == [f"r{number}" for number in range(120)]


def test_prepare_waits_for_another_process_and_says_so(tiny_recipe_file, tiny_recipe, tmp_path):
    changes = {"data.corpus_root": str(tmp_path / "c")}
    path = prepare_module.corpus_path(tiny_recipe(**changes), WAV2VEC2)
    with HeartbeatLock(path / "lock.json"):
        process = start(tiny_recipe_file(**changes))
        assert process.stderr.readline().startswith(f"waiting for process {os.getpid()} on ")
        time.sleep(1.5)
        assert process.poll() is None
        assert not (path / "train").exists()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""  # said once
    assert "train 40 rows" in out


def test_a_dead_holder_of_the_lock_is_no_holder(tiny_recipe, tmp_path):
    recipe = tiny_recipe(**{"data.corpus_root": str(tmp_path / "c")})
    path = prepare_module.corpus_path(recipe, WAV2VEC2)
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    with HeartbeatLock(path / "lock.json"):
        held = json.loads((path / "lock.json").read_text())
    (path / "lock.json").write_text(json.dumps({**held, "pid": int(process.stdout)}))
    assert len(prepare(recipe, progress=False).train) == 40


def test_shards_of_another_listing_are_not_kept(tiny_recipe, tmp_path):
    """The manifest changed between an interrupted prepare and the next: no mixture of the two."""
    manifest = write_speech(tmp_path / "s", 6, name="old")
    changes = {"data.train.path": str(manifest), "data.corpus_root": str(tmp_path / "c"), "data.shard_rows": 2}
    changes["data.max_rejected_percent"] = 0.0
    rows = [json.loads(line) for line in manifest.open()]
    write_jsonl(manifest, [*rows[:5], {**rows[5], "audio_filepath": "gone.wav"}])
    with pytest.raises(CorpusError):
        prepare(tiny_recipe(**changes), progress=False)
    write_speech(tmp_path / "s", 6, seed=5, name="new")
    corpus = prepare(tiny_recipe(**changes), progress=False)
    assert [corpus.train.id(row) for row in range(6)] == [f"new-{number:03d}" for number in range(6)]


def test_ctrl_c_ends_prepare_at_once_and_keeps_what_is_done(slow_recipe, tmp_path):
    process = start(slow_recipe)
    wait_for(lambda: list(tmp_path.glob("corpora/*/train/shard-*.arrow")))
    workers = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert "prepared" not in out
    wait_for(lambda: not any(map(is_running, workers)))
    assert not list(tmp_path.glob("corpora/*/lock.json"))


def test_a_corpus_that_cannot_be_written_is_said(tiny_recipe_file, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert run_main(main, [str(tiny_recipe_file(**{"data.corpus_root": str(tmp_path / "file")}))]) == 4
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_through_worker_processes(tiny_recipe, tiny_corpus, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = range(12)
    dev = tiny_corpus.sets["dev"]
    audio = [{"bytes": encoded(dev.waveform(row)), "path": None} for row in rows]
    table = {"audio": audio, "transcription": [dev.raw_text(row) for row in rows]}
    folder = tmp_path / "hub"
    folder.mkdir()
    dataset = datasets.Dataset.from_dict(table).cast_column("audio", datasets.Audio(decode=False))
    dataset.to_parquet(folder / "train.parquet")
    changes = {"data.train": {"kind": "hub", "dataset": str(folder), "streaming": streaming}, "data.num_proc": 2}
    changes |= {"data.shard_rows": 3, "data.corpus_root": str(tmp_path / "c")}
    corpus = prepare(tiny_recipe(**changes), progress=False)
    assert [corpus.train.id(row) for row in rows] == [str(row) for row in rows]
    for row in rows:
        assert np.array_equal(corpus.train.waveform(row), dev.waveform(row))
        assert corpus.train.text(row) == dev.text(row)


def test_a_killed_worker_is_said(slow_recipe):
    process = start(slow_recipe)
    worker = wait_for(lambda: [pid for pid in children(process.pid) if b"spawn_main" in cmdline(pid)])[0]
    time.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 4
    assert "a worker process of prepare was killed" in err
    assert "Traceback" not in err


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
