"""The corpus on a node's own disk: ranks read a verified copy, or the shared one, and say so."""

import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import launch.node.stage
from asr_train.data import stage
from asr_train.data.corpus import Corpus
from asr_train.files import read_json, write_json


@pytest.fixture
def shared(tiny_corpus, tmp_path):
    """A corpus of its own, which may be damaged."""
    return Corpus.open(shutil.copytree(tiny_corpus.path, tmp_path / "shared" / tiny_corpus.path.name))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "node"
    path.mkdir()
    return path


def rows(corpus):
    return [corpus.train.waveform(row) for row in range(len(corpus.train))]


# Copying


def test_a_copy_holds_what_the_corpus_holds(shared, folder):
    said = []
    path = stage.copied(shared, folder, said.append)
    assert path == folder / shared.path.name
    copy = Corpus.open(path)
    assert (copy.hash, set(copy.sets)) == (shared.hash, set(shared.sets))
    for ours, theirs in zip(rows(copy), rows(shared), strict=True):
        assert np.array_equal(ours, theirs)
    assert [line.partition(":")[0] for line in said] == [f"the corpus is copied to {path}"]


def test_a_copy_that_does_not_verify_is_not_read(shared, folder, monkeypatch):
    real = stage.file_hash
    monkeypatch.setattr(stage, "file_hash", lambda path, name: "bad" if path.suffix == ".arrow" else real(path, name))
    said = []
    assert stage.copied(shared, folder, said.append) == shared.path
    assert "is not what was written to it" in said[0]
    assert f"it is read from {shared.path}" in said[0]
    assert list(folder.iterdir()) == []


def test_without_room_nothing_is_copied(shared, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = []
    assert stage.copied(shared, folder, said.append) == shared.path
    assert "are free" in said[0]
    assert list(folder.iterdir()) == []


def test_a_copy_that_an_earlier_attempt_left_is_used_again(shared, folder, monkeypatch):
    path = stage.copied(shared, folder, lambda _: None)
    monkeypatch.setattr(stage, "_copy", lambda *_: pytest.fail("copied again"))
    assert stage.copied(shared, folder, lambda _: None) == path


@pytest.mark.parametrize("damage", ["a flipped bit", "half copied", "another corpus"])
def test_what_was_left_is_not_trusted_unseen(shared, folder, damage):
    path = stage.copied(shared, folder, lambda _: None)
    shard = path / "train" / "shard-00000.arrow"
    if damage == "a flipped bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "half copied":
        (path / "copied.json").unlink()
        shard.unlink()
    else:
        write_json(path / "copied.json", {**read_json(path / "copied.json"), "hash": "of another"})
    said = []
    assert stage.copied(shared, folder, said.append) == path
    assert "is copied to" in said[0]
    assert np.array_equal(rows(Corpus.open(path))[3], rows(shared)[3])


# Ranks


def test_the_first_rank_of_a_node_copies_and_the_others_wait_for_it(shared, folder, monkeypatch):
    monkeypatch.setenv(stage.VARIABLE, str(folder))
    found, copies = {}, []
    waits = threading.Event()

    def say(text):
        copies.append(text)

    def rank(number):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        found[number] = stage.on_this_node(shared, say)

    monkeypatch.setattr(stage.time, "sleep", lambda _: waits.wait(0.05))
    second = threading.Thread(target=rank, args=(1,))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    rank(0)
    second.join(10)
    assert {corpus.path for corpus in found.values()} == {folder / shared.path.name}
    assert len(copies) == 1


def test_nothing_is_copied_unasked(shared, monkeypatch):
    monkeypatch.delenv(stage.VARIABLE, raising=False)
    assert stage.on_this_node(shared, pytest.fail) is shared


# The node's folder


def test_both_programs_mean_the_same_files():
    assert (launch.node.stage.VARIABLE, launch.node.stage.WHERE) == (stage.VARIABLE, stage.WHERE)


def test_the_folder_is_the_nodes_own_and_goes_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_NODE", str(tmp_path))
    with launch.node.stage.corpus_folder("$SCRATCH_OF_NODE/corpora", "abc-1") as environ:
        folder = tmp_path / "corpora" / "wavefleet-abc-1"
        assert environ == {stage.VARIABLE: str(folder)}
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "corpus").mkdir()
        (folder / "corpus" / "shard").touch()
    assert not folder.exists()
    assert (tmp_path / "corpora").exists()


def test_the_ranks_wait_for_this_attempts_copy_and_no_earlier_ones(tmp_path):
    left = tmp_path / "wavefleet-abc-1"
    left.mkdir()
    write_json(left / stage.WHERE, {"corpus": "/gone"})
    (left / "tiny").mkdir()
    with launch.node.stage.corpus_folder(str(tmp_path), "abc-1"):
        assert [path.name for path in left.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("$NO_SUCH_VARIABLE/x", "not set on this node"),
        ("scratch", "should be absolute"),
        ("{tmp}/file", "File exists"),
        ("{tmp}/no/such/folder", "No such file"),
        ("{tmp}/link", "somebody else's"),
    ],
)
def test_where_there_is_no_folder_the_shared_corpus_is_read(tmp_path, capsys, wanted, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link" / "wavefleet-abc-1").symlink_to(tmp_path / "elsewhere")
    with launch.node.stage.corpus_folder(wanted.format(tmp=tmp_path), "abc-1") as environ:
        assert environ == {}
    said = capsys.readouterr().err
    assert message in said
    assert "the corpus is read where it is" in said
    assert (tmp_path / "elsewhere").exists()


def test_nothing_is_made_unasked():
    before = dict(os.environ)
    with launch.node.stage.corpus_folder(None, "abc-1") as environ:
        assert environ == {}
    assert dict(os.environ) == before
