import io
import json
import pickle
import shutil

import datasets
import numpy as np
import pytest
import soundfile
from conftest import RATE

from asr_train.data.corpus import Corpus, corpus_path
from asr_train.errors import CorpusError
from asr_train.geometry import WAV2VEC2
from asr_train.prepare import prepare


def test_every_row_of_the_manifest_is_in_the_corpus(tiny_corpus, tiny_speech):
    for name, corpus_set in tiny_corpus.sets.items():
        rows = [json.loads(line) for line in (tiny_speech / name / "manifest.jsonl").open()]
        assert len(corpus_set) == len(rows)
        for number, row in enumerate(rows):
            expected = soundfile.read(tiny_speech / name / row["audio_filepath"], dtype="int16")[0]
            assert corpus_set.id(number) == row["id"]
            assert corpus_set.raw_text(number) == row["text"]
            assert corpus_set.text(number) == row["text"].lower()
            assert np.array_equal(corpus_set.waveform(number), expected)
            assert corpus_set.num_samples[number] == len(expected)
            assert corpus_set.num_labels[number] == len(corpus_set.labels(number)) == len(row["text"])
            assert tiny_corpus.vocabulary.decode(corpus_set.labels(number)) == row["text"].lower()
            assert corpus_set.source(number) == f"{tiny_speech / name / 'manifest.jsonl'}:{number + 1}"


def test_a_set_goes_to_a_worker_as_its_path(tiny_corpus):
    tiny_corpus.train.waveform(0)
    data = pickle.dumps(tiny_corpus.train)
    assert len(data) < 1_000
    assert np.array_equal(pickle.loads(data).waveform(7), tiny_corpus.train.waveform(7))


def test_datasets_reads_the_shards(tiny_corpus):
    dataset = datasets.Dataset.from_file(str(tiny_corpus.path / "train" / "shard-00000.arrow"))
    assert dataset.column_names == ["id", "audio", "num_samples", "text", "raw_text", "labels", "source"]
    assert np.array_equal(np.frombuffer(dataset[3]["audio"], "<i2"), tiny_corpus.train.waveform(3))
    assert dataset[3]["labels"] == tiny_corpus.train.labels(3).tolist()


@pytest.mark.parametrize("num_proc", [1, 3])
def test_many_small_shards_hold_the_same_rows_in_the_same_order(tiny_recipe, tiny_corpus, num_proc, tmp_path):
    changes = {"data.shard_rows": 7, "data.num_proc": num_proc, "data.corpus_root": str(tmp_path)}
    corpus = prepare(tiny_recipe(**changes), progress=False)
    assert len(list((corpus.path / "train").glob("shard-*.arrow"))) == 6
    for name, expected in tiny_corpus.sets.items():
        found = corpus.sets[name]
        assert np.array_equal(found.num_samples, expected.num_samples)
        assert np.array_equal(found.num_labels, expected.num_labels)
        assert [found.id(row) for row in range(len(found))] == [expected.id(row) for row in range(len(expected))]
        for row in reversed(range(len(found))):
            assert np.array_equal(found.waveform(row), expected.waveform(row))
        with pytest.raises(IndexError):
            found.id(len(found))


def test_flac_keeps_the_samples_in_fewer_bytes(tiny_recipe, tiny_corpus, tmp_path):
    corpus = prepare(tiny_recipe(**{"data.encoding": "flac", "data.corpus_root": str(tmp_path)}), progress=False)
    for row in range(len(corpus.train)):
        assert np.array_equal(corpus.train.waveform(row), tiny_corpus.train.waveform(row))
    sizes = [(made.path / "train" / "shard-00000.arrow").stat().st_size for made in (corpus, tiny_corpus)]
    assert sizes[0] < 0.9 * sizes[1]


def test_the_index_covers_the_training_set(tiny_corpus):
    order = tiny_corpus.train.index.order
    assert sorted(order.tolist()) == list(range(len(tiny_corpus.train)))


def test_bytes_are_pcm16_at_16_khz(tiny_corpus):
    stream = io.BytesIO()
    soundfile.write(stream, tiny_corpus.train.waveform(0), RATE, format="WAV", subtype="PCM_16")
    assert stream.getvalue()[44:] == tiny_corpus.train.waveform(0).tobytes()


def test_what_is_no_complete_corpus_is_refused(tiny_corpus, tmp_path):
    with pytest.raises(CorpusError, match="does not exist"):
        Corpus.open(tmp_path / "none")
    copy = shutil.copytree(tiny_corpus.path, tmp_path / "copy")
    assert len(Corpus.open(copy).train) == 40
    info = json.loads((copy / "corpus.json").read_text())
    (copy / "corpus.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(CorpusError, match="format 99"):
        Corpus.open(copy)
    (copy / "corpus.json").write_text('{"format"')
    with pytest.raises(CorpusError, match="damaged"):
        Corpus.open(copy)
    (copy / "corpus.json").unlink()
    with pytest.raises(CorpusError, match="not complete"):
        Corpus.open(copy)


def test_damaged_parts_are_named(tiny_corpus, tmp_path):
    copy = shutil.copytree(tiny_corpus.path, tmp_path / "copy")
    (copy / "train" / "shard-00000.arrow").write_bytes(b"")
    (copy / "dev" / "num_samples.npy").unlink()
    corpus = Corpus.open(copy)
    with pytest.raises(CorpusError, match=r"train/shard-00000\.arrow"):
        corpus.train.waveform(0)
    with pytest.raises(CorpusError, match=r"dev/num_samples\.npy"):
        len(corpus.sets["dev"])


@pytest.mark.parametrize(
    "changes",
    [
        {"text.case": "upper"},
        {"text.remove": "e"},
        {"data.max_duration_s": 2.5},
        {"data.encoding": "flac"},
        {"eval.sets": {}},
        {"eval.sets.test": {"kind": "csv", "path": "/x.csv"}},
        {"data.train.test_fraction": 0.1},
    ],
)
def test_a_recipe_that_changes_the_data_has_another_corpus(tiny_recipe, changes):
    assert corpus_path(tiny_recipe(**changes), WAV2VEC2) != corpus_path(tiny_recipe(), WAV2VEC2)


def test_what_does_not_change_the_data_keeps_the_corpus(tiny_recipe):
    same = {"max_steps": 9, "optim.lr": 1.0, "data.num_proc": 7, "data.max_rejected_percent": 50.0, "eval.every": "5"}
    assert corpus_path(tiny_recipe(**same), WAV2VEC2) == corpus_path(tiny_recipe(), WAV2VEC2)
