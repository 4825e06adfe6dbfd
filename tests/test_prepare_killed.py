"""A prepare that is interrupted, or not alone: nothing is done twice, and nothing left behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from bad_rows import noise
from conftest import RATE, encoded, write_jsonl, write_speech

from asr_train import prepare as prepare_module
from asr_train.data.corpus import Corpus
from asr_train.errors import CorpusError, run_main
from asr_train.geometry import WAV2VEC2
from asr_train.lock import HeartbeatLock
from asr_train.prepare import main, prepare


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
    assert "waiting" not in err  # said once
    assert "rows kept" in err
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
