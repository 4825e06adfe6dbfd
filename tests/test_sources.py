"""Every kind of source gives the same rows: ids, texts, audio."""

import csv
import pickle
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RATE, encoded, speech, write_jsonl

from asr_train.config import DemoSource, FolderSource, HubSource, TableSource
from asr_train.data.audio import AudioError
from asr_train.data.demo import demo_rows
from asr_train.data.rows import SourceError, split_numbers
from asr_train.data.sources import open_source, open_sources

TEXTS = ["one two", "three", "four five six", "seven", "eight nine", "ten"]
WAVEFORMS = [np.round(speech(text, 0.2 + 0.1 * len(text), seed=number) * 32768).astype(np.int16)
             for number, text in enumerate(TEXTS)]  # fmt: skip


def check(listing, texts=TEXTS, waveforms=WAVEFORMS):
    """The listing has these rows; also once it went to a worker and came back."""
    assert list(listing.texts()) == list(texts)
    rows = pickle.loads(pickle.dumps(listing.rows(0, len(listing))))
    assert [row.text for row in rows] == list(texts)
    for row, waveform in zip(rows, waveforms, strict=True):
        assert np.array_equal(row.audio.load(), waveform), row
    assert len({row.id for row in rows}) == len(rows)
    middle = listing.rows(2, min(4, len(rows))) if listing.random_access else rows[2:4]
    assert [row.text for row in middle] == list(texts)[2:4]
    return rows


def wavs(folder, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"u{number}.wav" for number in range(len(TEXTS))]
    for name, waveform in zip(names, WAVEFORMS, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(waveform, form="FLAC" if name.endswith("flac") else "WAV"))
    return names


def test_jsonl_in_nemos_form(tmp_path):
    names = wavs(tmp_path / "audio")
    rows = [
        {"audio_filepath": f"audio/{name}", "text": text, "duration": round(len(waveform) / RATE, 2)}
        for name, text, waveform in zip(names, TEXTS, WAVEFORMS, strict=True)
    ]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    found = check(open_source(TableSource(kind="jsonl", path=str(path))))
    assert found[2].source == f"{path}:3"
    assert found[2].id == "audio/u2.wav"


def test_jsonl_segments_of_one_long_file(tmp_path):
    (tmp_path / "long.wav").write_bytes(encoded(np.concatenate(WAVEFORMS)))
    starts = np.cumsum([0, *map(len, WAVEFORMS)]) / RATE
    rows = [
        {"audio_filepath": "long.wav", "text": text, "offset": start, "duration": len(waveform) / RATE}
        for text, start, waveform in zip(TEXTS, starts, WAVEFORMS, strict=False)
    ]
    check(open_source(TableSource(kind="jsonl", path=str(write_jsonl(tmp_path / "m.jsonl", rows)))))


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_delimited_tables(kind, tmp_path):
    texts = ['he said "no"', "a, b", *TEXTS[2:]] if kind == "csv" else ['a "quote', *TEXTS[1:]]
    options = {} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    with (tmp_path / f"t.{kind}").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream, **options)
        writer.writerow(["id", "path", "sentence"])
        for number, (name, text) in enumerate(zip(wavs(tmp_path / "audio"), texts, strict=True)):
            writer.writerow([f"row-{number}", name, text])
    source = TableSource(kind=kind, path=str(tmp_path / f"t.{kind}"), audio_root=str(tmp_path / "audio"))
    assert check(open_source(source), texts)[1].id == "row-1"


def test_a_folder_and_a_pattern_of_manifests(tmp_path):
    names = wavs(tmp_path)
    for part in (0, 1):
        rows = [{"audio": name, "text": text} for name, text in zip(names, TEXTS, strict=True)]
        write_jsonl(tmp_path / f"m-{part}.jsonl", rows[3 * part : 3 * part + 3])
    check(open_source(TableSource(kind="jsonl", path=str(tmp_path))))
    check(open_source(TableSource(kind="jsonl", path=str(tmp_path / "m-*.jsonl"))))


def hub_table(columns):
    """A data set as `datasets` keeps it: the audio as a struct of bytes and path, in its own bytes."""
    audio = [{"bytes": encoded(waveform), "path": f"u{number}.wav"} for number, waveform in enumerate(WAVEFORMS)]
    return datasets.Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", datasets.Audio(decode=False))


HUB_COLUMNS = {
    "minds14": {
        "path": [f"en-US~X/{n}.wav" for n in range(6)],
        "transcription": TEXTS,
        "english_transcription": ["other"] * 6,
        "intent_class": [1] * 6,
    },
    "librispeech": {"file": [f"/far/{n}.flac" for n in range(6)], "text": TEXTS, "id": [f"84-{n}" for n in range(6)]},
    "common_voice": {"client_id": ["c"] * 6, "path": [f"cv_{n}.mp3" for n in range(6)], "sentence": TEXTS},
}


@pytest.mark.parametrize("columns", HUB_COLUMNS)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow file"])
def test_parquet_and_arrow_with_the_columns_of_hub_data_sets(columns, kind, tmp_path):
    dataset = hub_table(HUB_COLUMNS[columns])
    suffix = kind.partition(" ")[0]
    path = tmp_path / f"data.{suffix}"
    if kind == "parquet":
        pq.write_table(dataset.data.table, path, row_group_size=2)
    elif kind == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        path = tmp_path / "saved"
    else:
        with pa.ipc.new_file(path, dataset.data.table.schema) as writer:
            writer.write_table(dataset.data.table, max_chunksize=2)
    rows = check(open_source(TableSource(kind=suffix, path=str(path))))
    assert rows[1].id == ("84-1" if columns == "librispeech" else "u1.wav")


def test_parquet_with_paths_stays_in_its_root(tmp_path):
    names = wavs(tmp_path / "inside")
    (tmp_path / "outside.wav").write_bytes(encoded(WAVEFORMS[0]))
    table = pa.table({"audio": ["../outside.wav", *names[1:]], "text": TEXTS})
    pq.write_table(table, tmp_path / "inside" / "t.parquet")
    path = str(tmp_path / "inside" / "t.parquet")
    rows = open_source(TableSource(kind="parquet", path=path)).rows(0, 6)
    with pytest.raises(AudioError) as caught:
        rows[0].audio.load()
    assert caught.value.reason == "path outside its root"
    assert np.array_equal(rows[1].audio.load(), WAVEFORMS[1])
    check(open_source(TableSource(kind="parquet", path=path, allow_paths_outside_root=True)))


def test_audio_folder_with_metadata(tmp_path):
    for name, kind in (("csv", "csv"), ("jsonl", "jsonl")):
        folder = tmp_path / name
        names = wavs(folder, [f"sub/u{number}.flac" for number in range(6)])
        rows = [{"file_name": audio, "transcription": text} for audio, text in zip(names, TEXTS, strict=True)]
        if kind == "jsonl":
            write_jsonl(folder / "metadata.jsonl", rows)
        else:
            with (folder / "metadata.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        check(open_source(FolderSource(kind="audio_folder", path=str(folder))))


def test_audio_folder_with_texts_beside(tmp_path):
    for name, text in zip(wavs(tmp_path / "a"), TEXTS, strict=True):
        (tmp_path / "a" / name).with_suffix(".txt").write_text(text + "\n")
    (tmp_path / "a" / "README.txt").write_text("not a transcript")
    source = FolderSource(kind="audio_folder", path=str(tmp_path))
    assert check(open_source(source))[0].id == "a/u0.wav"
    (tmp_path / "a" / "u3.txt").unlink()
    assert list(open_source(source).texts())[3] is None


def test_librispeech_tree(tmp_path):
    for number, (text, waveform) in enumerate(zip(TEXTS, WAVEFORMS, strict=True)):
        folder = tmp_path / "LibriSpeech" / "dev-clean" / "84" / str(number // 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"84-{number // 3}-{number:04d}.flac").write_bytes(encoded(waveform, form="FLAC"))
        with (folder / f"84-{number // 3}.trans.txt").open("a") as stream:
            stream.write(f"84-{number // 3}-{number:04d} {text}\n")
    for path in (tmp_path, tmp_path / "LibriSpeech"):
        rows = check(open_source(FolderSource(kind="librispeech", path=str(path), split="dev-clean")))
        assert rows[5].id == "84-1-0005"
    check(open_source(FolderSource(kind="librispeech", path=str(tmp_path / "LibriSpeech" / "dev-clean"))))
    with pytest.raises(SourceError, match="'dev-other' is not there; it has: dev-clean"):
        open_source(FolderSource(kind="librispeech", path=str(tmp_path), split="dev-other"))


def test_common_voice_tree(tmp_path):
    names = wavs(tmp_path / "clips")
    lines = [f"c{n}\t{name}\t{text}\t2\n" for n, (name, text) in enumerate(zip(names, TEXTS, strict=True))]
    (tmp_path / "train.tsv").write_text("client_id\tpath\tsentence\tup_votes\n" + "".join(lines))
    check(open_source(FolderSource(kind="common_voice", path=str(tmp_path), split="train")))
    with pytest.raises(SourceError, match="split 'dev' is not there; it has: train"):
        open_source(FolderSource(kind="common_voice", path=str(tmp_path), split="dev"))


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A folder laid out like a data set on the hub, which `datasets` loads by path."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(hub_table(HUB_COLUMNS["minds14"]).data.table, tmp_path / "hub" / "data" / "train-0.parquet")
    return str(tmp_path / "hub")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(hub_folder, streaming):
    check(open_source(HubSource(kind="hub", dataset=hub_folder, split="train", streaming=streaming)))


def test_a_resumed_stream_skips_what_is_done(hub_folder):
    listing = open_source(HubSource(kind="hub", dataset=hub_folder, streaming=True))
    assert [row.text for row in listing.rows(2, 4)] == TEXTS[2:4]
    assert np.array_equal(listing.rows(4, 6)[1].audio.load(), WAVEFORMS[5])


def test_hub_split_expressions(hub_folder):
    check(open_source(HubSource(kind="hub", dataset=hub_folder, split="train[2:]")), TEXTS[2:], WAVEFORMS[2:])
    check(open_source(HubSource(kind="hub", dataset=hub_folder, split="train[:50%]")), TEXTS[:3], WAVEFORMS[:3])


def test_hub_folder_of_audio_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = wavs(tmp_path / "set")
    lines = [f"{name},{text}\n" for name, text in zip(names, TEXTS, strict=True)]
    (tmp_path / "set" / "metadata.csv").write_text("file_name,transcription\n" + "".join(lines))
    for streaming in (False, True):
        check(open_source(HubSource(kind="hub", dataset=str(tmp_path / "set"), streaming=streaming)))


@pytest.mark.parametrize("changes", [{"dataset": "/no/such/folder"}, {"split": "dev"}, {"text_column": "words"}])
def test_a_hub_data_set_that_is_not_there_is_named(hub_folder, changes):
    source = HubSource(**{"kind": "hub", "dataset": hub_folder, **changes})
    with pytest.raises(SourceError, match=next(iter(changes.values()))):
        open_source(source)


@pytest.mark.parametrize("fraction", [0.2, 0.25, 1 / 3, 0.8])
def test_random_split_is_that_of_datasets(fraction):
    for num_rows in (7, 100, 563):
        for seed in (0, 42):
            numbered = datasets.Dataset.from_dict({"row": list(range(num_rows))})
            expected = numbered.train_test_split(test_size=fraction, seed=seed)
            for part in ("train", "test"):
                assert split_numbers(num_rows, fraction, seed, part).tolist() == sorted(expected[part]["row"])


def test_random_split_of_any_source(tmp_path, hub_folder):
    expected = {part: split_numbers(6, 0.4, 3, part) for part in ("train", "test")}
    assert len(expected["test"]) == 3
    names = wavs(tmp_path)
    rows = [{"audio": name, "text": text} for name, text in zip(names, TEXTS, strict=True)]
    manifest = str(write_jsonl(tmp_path / "m.jsonl", rows))
    for part, numbers in expected.items():
        split = {"test_fraction": 0.4, "split_seed": 3, "part": part}
        texts, waveforms = [TEXTS[n] for n in numbers], [WAVEFORMS[n] for n in numbers]
        check(open_source(TableSource(kind="jsonl", path=manifest, **split)), texts, waveforms)
        check(open_source(HubSource(kind="hub", dataset=hub_folder, **split)), texts, waveforms)
    with pytest.raises(SourceError, match="streaming=false"):
        open_source(HubSource(kind="hub", dataset=hub_folder, streaming=True, test_fraction=0.4))


@pytest.mark.parametrize("split", ["train", "heldout_sentences", "heldout_voices"])
def test_demo(split):
    pytest.importorskip("espeakng_loader", reason="needs the extra `demo`")
    listing = open_source(DemoSource(kind="demo", split=split))
    expected = demo_rows(split)
    assert list(listing.texts()) == [row.text for row in expected]
    for row, made in zip(pickle.loads(pickle.dumps(listing.rows(3, 5))), expected[3:5], strict=True):
        assert (row.id, row.text) == (made.id, made.text)
        assert np.array_equal(row.audio.load(), made.synthesise())


def test_several_sources_keep_their_ids_apart(tmp_path):
    names = wavs(tmp_path)
    path = write_jsonl(tmp_path / "m.jsonl", [{"audio": name, "text": "a"} for name in names])
    source = TableSource(kind="jsonl", path=str(path))
    first, second = open_sources([source, source])
    assert first.rows(0, 1)[0].id == "0:u0.wav"
    assert second.rows(5, 6)[0].id == "1:u5.wav"


def problems_of(tmp_path, text, kind="jsonl", **settings):
    path = tmp_path / f"bad.{kind}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError) as caught:
        open_source(TableSource(kind=kind, path=str(path), **settings))
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    assert str(path) in str(caught.value)
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


def test_every_bad_line_of_a_manifest_is_named_at_once(tmp_path):
    lines = [
        '{"audio": "a.wav", "text": "a"}',
        "not json",
        "[1]",
        '{"text": "no audio"}',
        '{"audio": "../b.wav", "text": "b"}',
        '{"audio": "/etc/c.wav", "text": "c"}',
        '{"audio": "d.wav", "text": 4}',
        '{"audio": "e.wav", "text": "e", "offset": "soon"}',
        '{"audio": "f.wav", "text": "f", "duration": -1}',
    ]
    found = problems_of(tmp_path, "\n".join(lines))
    expected = ["not JSON", "an object", "path", "leaves", "leaves", "expected text", "offset", "duration"]
    assert len(found) == len(expected)
    for line, (problem, words) in enumerate(zip(found, expected, strict=True), 2):
        assert problem.startswith(f":{line}:")
        assert words in problem


def test_duplicate_ids_are_named_with_both_rows(tmp_path):
    lines = [{"id": "x", "audio": "a.wav", "text": "a"}, {"id": "y", "audio": "b.wav", "text": "b"}]
    path = write_jsonl(tmp_path / "m.jsonl", [*lines, lines[0], lines[1]])
    with pytest.raises(SourceError) as caught:
        open_source(TableSource(kind="jsonl", path=str(path)))
    first, second = f"{path}:3: id 'x' again, first in {path}:1", f"{path}:4: id 'y' again, first in {path}:2"
    assert caught.value.problems == [first, second]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("jsonl", '{"audio": "a.wav", "words": "a"}\n', "no text column (set text_column); it has: audio, words"),
        ("jsonl", '{"sound": 1}\n', "no audio column"),
        ("jsonl", "", "no rows"),
        ("csv", "audio,text\na.wav,hello\nb.wav\nc.wav,d,e\n", "1 fields, the header has 2"),
        ("csv", b"audio,text\n\xff\xfe,b\n", "not a CSV table"),
        ("csv", 'audio,text\n"a.wav,b\n', "not a CSV table"),
        ("tsv", "audio\n", "no rows"),
        ("parquet", "PK not parquet", "not a parquet table"),
        ("arrow", "neither", "not a arrow table"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, kind, text, expected):
    assert any(expected in problem for problem in problems_of(tmp_path, text, kind))


def test_missing_files_of_all_sources_are_named_at_once(tmp_path):
    sources = [
        TableSource(kind="jsonl", path=str(tmp_path / "gone.jsonl")),
        TableSource(kind="csv", path=str(tmp_path / "*.csv")),
        FolderSource(kind="audio_folder", path=str(tmp_path / "nowhere")),
        FolderSource(kind="audio_folder", path=str(tmp_path)),
    ]
    with pytest.raises(SourceError) as caught:
        open_sources(sources)
    assert len(caught.value.problems) == 4
    assert "gone.jsonl: no such file" in str(caught.value)
    assert "nowhere: no such folder" in str(caught.value)
    assert "no audio files" in str(caught.value)


def test_paths_outside_their_root_are_taken_when_asked_for(tmp_path):
    names = wavs(tmp_path / "audio")
    rows = [{"audio": f"../audio/{name}", "text": text} for name, text in zip(names, TEXTS, strict=True)]
    path = write_jsonl(tmp_path / "lists" / "m.jsonl", rows)
    with pytest.raises(SourceError, match="allow_paths_outside_root"):
        open_source(TableSource(kind="jsonl", path=str(path)))
    check(open_source(TableSource(kind="jsonl", path=str(path), allow_paths_outside_root=True)))
    rows = [{"audio": str(tmp_path / "audio" / name), "text": text} for name, text in zip(names, TEXTS, strict=True)]
    path = write_jsonl(tmp_path / "lists" / "absolute.jsonl", rows)
    check(open_source(TableSource(kind="jsonl", path=str(path), audio_root=str(tmp_path))))


# --- links ------------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path):
    """A folder with a file of its own, a link to it, a link to a file outside, and a linked folder outside."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    wavs(outside)
    root.mkdir()
    (root / "own.wav").write_bytes(encoded(WAVEFORMS[0]))
    (root / "inner.wav").symlink_to(root / "own.wav")
    (root / "outer.wav").symlink_to(outside / "u1.wav")
    (root / "folder").symlink_to(outside)
    return root


LINKED = {"own.wav": True, "inner.wav": True, "outer.wav": False, "folder/u2.wav": False}


def readable(listing):
    found = {}
    for row in listing.rows(0, len(listing)):
        try:
            row.audio.load()
        except AudioError as error:
            assert error.reason == "path outside its root"
            assert "is a link to" in error.value
            found[row.text] = False
        else:
            found[row.text] = True
    return found


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_link_that_leads_out_of_the_tables_folder_is_followed_only_where_that_is_allowed(kind, linked):
    rows = [{"audio": name, "text": name} for name in LINKED]
    path = linked / f"table.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "csv":
        path.write_text("audio,text\n" + "".join(f"{row['audio']},{row['text']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = TableSource(kind=kind, path=str(path))
    assert readable(open_source(source)) == LINKED
    assert readable(open_source(replace(source, allow_paths_outside_root=True))) == dict.fromkeys(LINKED, True)


def test_a_root_may_itself_be_a_link(linked, tmp_path):
    (tmp_path / "alias").symlink_to(linked)
    write_jsonl(linked / "m.jsonl", [{"audio": "own.wav", "text": "own.wav"}])
    assert readable(open_source(TableSource(kind="jsonl", path=str(tmp_path / "alias" / "m.jsonl")))) == {
        "own.wav": True
    }
