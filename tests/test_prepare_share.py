"""A corpus prepared by several processes, a share of the shards each: the same corpus; what failed alone is pending."""

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import write_jsonl, write_speech

from asr_train.data.corpus import Corpus
from asr_train.errors import CorpusError, run_main
from asr_train.lock import HeartbeatLock
from asr_train.prepare import SHARES, prepare
from asr_train.prepare_share import main, plan_shares, share_of, write_share


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    """Twelve rows of training and three of evaluation, two a shard: eight shards."""
    changes = {
        "data.train.path": str(write_speech(tmp_path / "speech", 12)),
        "eval.sets.dev.path": str(write_speech(tmp_path / "dev", 3, seed=3, name="dev")),
        "data.shard_rows": 2,
        "data.max_rejected_percent": 10.0,
    }

    def make(root="corpora", **more):
        return tiny_recipe(**{**changes, "data.corpus_root": str(tmp_path / root), **more})

    return make


def content(path):
    """Name -> bytes of everything that a corpus holds, but for what names its folder or the time."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "corpus.json"
    }


def test_every_shard_is_in_one_share_and_shares_differ_by_one_at_most():
    for num_shards, num_shares in [(8, 3), (1, 4), (7, 7), (1000, 17), (0, 2)]:
        shares = [share_of(range(num_shards), number, num_shares) for number in range(1, num_shares + 1)]
        assert [shard for share in shares for shard in share] == list(range(num_shards))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_make_the_corpus_that_one_process_makes(recipe):
    whole = prepare(recipe("whole"), progress=False)
    shared = recipe("shared")
    assert plan_shares(shared, 3)["pending"] == [1, 2, 3]
    for number in (3, 1):
        write_share(shared, number, 3, progress=False)
    assert plan_shares(shared, 3)["pending"] == [2]
    path = write_share(shared, 2, 3, progress=False)
    assert plan_shares(shared, 3)["pending"] == []
    with pytest.raises(CorpusError, match="not complete"):
        Corpus.open(path)
    corpus = prepare(shared, progress=False)
    assert corpus.path == path
    assert corpus.hash == whole.hash
    assert content(corpus.path) == content(whole.path)
    assert plan_shares(shared, 3) == {"corpus": str(path), "state": "complete"}


def test_more_shares_than_shards_leaves_some_with_nothing_to_do(recipe):
    assert len(plan_shares(recipe(), 20)["pending"]) == 8


def test_a_share_of_a_corpus_that_was_not_begun_or_from_other_sources_is_refused(recipe, tmp_path):
    with pytest.raises(CorpusError, match="not begun"):
        write_share(recipe(), 1, 2)
    plan_shares(recipe(), 2)
    manifest = tmp_path / "speech" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.open()]
    write_jsonl(manifest, [{**rows[0], "text": "two"}, *rows[1:]])
    with pytest.raises(CorpusError, match=f"the sources that {socket.gethostname()} lists are not those"):
        write_share(recipe(), 1, 2)
    assert not list((tmp_path / "corpora").glob("*/train/*"))


@pytest.fixture
def without_a_file(tmp_path):
    """One file of the second of three shares, away while the function is not called."""
    file = tmp_path / "speech" / "utterance-007.wav"
    away = file.rename(tmp_path / "away.wav")
    return lambda: away.rename(file)


def test_a_share_whose_files_are_missing_fails_and_is_done_again_when_they_are_there(recipe, without_a_file):
    whole_recipe, shared = recipe("whole"), recipe("shared")
    plan_shares(shared, 3)
    for number in (1, 3):
        write_share(shared, number, 3, progress=False)
    with pytest.raises(CorpusError) as caught:
        write_share(shared, 2, 3, progress=False)
    assert f"1 of the 6 rows of this share have no file on {socket.gethostname()}" in str(caught.value)
    assert "utterance-007.wav" in str(caught.value)
    assert plan_shares(shared, 3)["pending"] == []  # nothing can be done better now
    without_a_file()
    assert plan_shares(shared, 3)["pending"] == [2]
    write_share(shared, 2, 3, progress=False)
    assert prepare(shared, progress=False).hash == prepare(whole_recipe, progress=False).hash
    assert content(prepare(shared).path) == content(prepare(whole_recipe).path)


def test_files_that_stay_away_are_refused_within_the_limit(recipe, without_a_file):
    shared = recipe()
    plan_shares(shared, 3)
    for number in (1, 3):
        write_share(shared, number, 3, progress=False)
    with pytest.raises(CorpusError):
        write_share(shared, 2, 3, progress=False)
    corpus = prepare(shared, progress=False)
    assert corpus.info["sets"]["train"]["rejected"] == {"missing file": 1}


def test_prepare_waits_while_a_share_is_written(recipe):
    shared = recipe()
    path = Path(plan_shares(shared, 2)["corpus"])
    thread = threading.Thread(target=prepare, args=[shared], kwargs={"progress": False})
    with HeartbeatLock(path / SHARES / "1-of-2.json"):
        assert plan_shares(shared, 2)["state"] == "busy"
        thread.start()
        time.sleep(1)
        assert not (path / "train").exists()
    thread.join(300)
    assert len(Corpus.open(path).train) == 12


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/2", ""])
def test_a_share_that_is_none_is_refused(text, capsys):
    assert run_main(main, ["demo", f"--share={text}"]) == 2
    assert "should be I/N, as in 3/10" in capsys.readouterr().err
