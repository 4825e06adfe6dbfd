"""The index of utterances by rounded length."""

import pickle

import numpy as np
import pytest

from asr_train.data import lengths
from asr_train.data.lengths import LengthIndex, rounded_lengths
from asr_train.errors import CorpusError
from asr_train.files import write_json


def some_lengths(num_utterances=3000):
    return np.random.default_rng(0).integers(1600, 480_000, num_utterances)


def test_rounded_lengths_waste_at_most_10_ms_or_a_percent():
    steps = rounded_lengths(30 * 16_000)
    assert steps[-1] >= 30 * 16_000
    assert np.all(np.diff(steps) <= np.maximum(160, 0.01 * steps[1:]))
    assert np.array_equal(rounded_lengths(60 * 16_000)[: len(steps)], steps)  # a longer corpus keeps the same


def test_index_holds_every_utterance_under_its_rounded_length():
    num_samples = some_lengths()
    index = LengthIndex.build(num_samples)
    assert np.array_equal(np.sort(index.order), np.arange(len(num_samples)))
    for j, length in enumerate(index.lengths):
        ids = index.order[index.starts[j] : index.starts[j + 1]]
        shorter = rounded_lengths(int(length))[-2]
        assert len(ids) and np.all(np.diff(ids) > 0)
        assert np.all((num_samples[ids] <= length) & (num_samples[ids] > shorter))
        assert index.samples[j] == num_samples[ids].sum()
    assert index.starts[-1] == len(num_samples)


def test_building_in_chunks_changes_nothing(monkeypatch):
    whole = LengthIndex.build(some_lengths())
    monkeypatch.setattr(lengths, "_CHUNK", 700)
    parts = LengthIndex.build(some_lengths().astype(np.int32))
    assert parts.hash == whole.hash
    assert np.array_equal(parts.order, whole.order)


def test_save_and_open(tmp_path):
    index = LengthIndex.build(some_lengths())
    index.save(tmp_path / "index")
    opened = LengthIndex.open(tmp_path / "index")
    assert opened.hash == index.hash
    for name in ("order", "lengths", "starts", "samples"):
        assert np.array_equal(getattr(opened, name), getattr(index, name))
    assert isinstance(opened.order, np.memmap)
    assert LengthIndex.build(some_lengths(2999)).hash != index.hash


def test_data_workers_get_the_path_and_not_the_arrays(tmp_path):
    index = LengthIndex.build(some_lengths())
    index.save(tmp_path)
    opened = LengthIndex.open(tmp_path)
    assert len(pickle.dumps(opened)) < 1000 < len(pickle.dumps(index))
    for found in (pickle.loads(pickle.dumps(opened)), pickle.loads(pickle.dumps(index))):
        assert np.array_equal(found.order, index.order)


def test_what_cannot_be_an_index_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="no utterances"):
        LengthIndex.build(np.array([], dtype=np.int64))
    with pytest.raises(CorpusError, match=r"cannot be read.*prepare"):
        LengthIndex.open(tmp_path / "missing")
    index = LengthIndex.build(some_lengths())
    index.save(tmp_path / "torn")
    (tmp_path / "torn" / "order.npy").write_bytes(b"")
    with pytest.raises(CorpusError, match="cannot be read"):
        LengthIndex.open(tmp_path / "torn")
    index.save(tmp_path / "old")
    write_json(tmp_path / "old" / "index.json", {"format": 0, "num_utterances": 3000, "hash": ""})
    with pytest.raises(CorpusError, match="format 0"):
        LengthIndex.open(tmp_path / "old")
