"""`wavefleet new`: looks at data of every kind, and writes a recipe that loads and prepares."""

import csv
from dataclasses import replace
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import encoded, speech, write_jsonl

from asr_train import new
from asr_train.config import FolderSource, HubSource, TableSource
from asr_train.data import hub
from asr_train.data.find_source import find_source
from asr_train.data.look import Look, look_at, look_at_texts
from asr_train.data.rows import SourceError
from asr_train.errors import EXIT_FAILED, EXIT_USAGE, run_main
from asr_train.prepare import prepare
from asr_train.recipe import load_recipe
from launch import cli

TEXTS = ["One two.", "Three!", "four, five", "six", "Seven eight nine", "ten", "eleven", "twelve", "thirteen", "twenty"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working directory of one's own, from which no model can be had."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(new, "unreachable", lambda model: "no network in this test")
    return folder


def waveform(number, rate=16_000):
    return speech(TEXTS[number].lower(), 1.5 + 0.1 * number, seed=number, rate=rate)


def recordings(folder, numbers=range(10), rate=16_000, suffix=".wav"):
    """Files u0.wav, u1.wav, ...; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        form = {".wav": "WAV", ".flac": "FLAC"}[suffix]
        (folder / f"u{number}{suffix}").write_bytes(encoded(waveform(number, rate), rate, form))
    return [f"u{number}{suffix}" for number in numbers]


def delimited(path, rows, kind="csv"):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
        writer.writerows(rows)


def audio_folder(root):
    for number, name in enumerate(recordings(root)):
        (root / name).with_suffix(".txt").write_text(TEXTS[number])


def audio_folder_with_metadata(root):
    delimited_rows = [["file_name", "transcription"], *zip(recordings(root), TEXTS, strict=True)]
    delimited(root / "metadata.csv", delimited_rows)


def folders_for_splits(root):
    for split, numbers in (("train", range(8)), ("test", range(8, 10))):
        names = recordings(root / split, numbers)
        for name, number in zip(names, numbers, strict=True):
            (root / split / name).with_suffix(".txt").write_text(TEXTS[number])


def csv_table(root):
    delimited(root / "speech.csv", [["path", "sentence"], *zip(recordings(root), TEXTS, strict=True)])


def tsv_tables_for_splits(root):
    names = recordings(root / "clips")
    for split, part in (("train", slice(0, 8)), ("dev", slice(8, 10))):
        rows = [
            ["path", "sentence"],
            *([f"clips/{name}", text] for name, text in zip(names[part], TEXTS[part], strict=True)),
        ]
        delimited(root / f"{split}.tsv", rows, "tsv")


def jsonl_table(root):
    rows = [{"audio_filepath": name, "text": text} for name, text in zip(recordings(root), TEXTS, strict=True)]
    write_jsonl(root / "manifest.jsonl", rows)


def jsonl_with_audio_elsewhere(root):
    """Names that start in a folder beside the table."""
    rows = [{"audio_filepath": name, "text": text} for name, text in zip(recordings(root / "wavs"), TEXTS, strict=True)]
    write_jsonl(root / "manifest.jsonl", rows)


def table(numbers):
    cells = [{"bytes": encoded(waveform(number)), "path": f"u{number}.wav"} for number in numbers]
    return pa.table({"audio": cells, "text": [TEXTS[number] for number in numbers]})


def parquet_tables_for_splits(root):
    (root / "data").mkdir(parents=True)
    pq.write_table(table(range(8)), root / "data" / "train-00000-of-00001.parquet")
    pq.write_table(table(range(8, 10)), root / "data" / "validation-00000-of-00001.parquet")


def arrow_folder(root):
    made = datasets.Dataset.from_dict(table(range(10)).to_pydict()).cast_column("audio", datasets.Audio(decode=False))
    made.save_to_disk(root)


def librispeech(root):
    for split, numbers in (("train-clean-100", range(8)), ("dev-clean", range(8, 10))):
        folder = root / "LibriSpeech" / split / "84" / "1"
        recordings(folder, numbers, suffix=".flac")
        lines = []
        for number in numbers:
            (folder / f"u{number}.flac").rename(folder / f"84-1-{number:04d}.flac")
            lines.append(f"84-1-{number:04d} {''.join(c for c in TEXTS[number].upper() if c.isalpha() or c == ' ')}\n")
        (folder / "84-1.trans.txt").write_text("".join(lines))


def common_voice(root):
    tree = root / "cv-corpus" / "en"
    names = recordings(tree / "clips")
    for split, part in (("train", slice(0, 8)), ("dev", slice(8, 9)), ("test", slice(9, 10))):
        rows = [["client_id", "path", "sentence"]]
        rows += [["c", name, text] for name, text in zip(names[part], TEXTS[part], strict=True)]
        delimited(tree / f"{split}.tsv", rows, "tsv")


KINDS = {
    "audio folder": (audio_folder, "", "audio_folder", ["held_out"]),
    "audio folder with metadata": (audio_folder_with_metadata, "", "audio_folder", ["held_out"]),
    "folders for splits": (folders_for_splits, "", "audio_folder", ["test"]),
    "csv": (csv_table, "speech.csv", "csv", ["held_out"]),
    "folder with one csv": (csv_table, "", "csv", ["held_out"]),
    "tsv for splits": (tsv_tables_for_splits, "", "tsv", ["dev"]),
    "jsonl": (jsonl_table, "manifest.jsonl", "jsonl", ["held_out"]),
    "pattern": (jsonl_table, "*.jsonl", "jsonl", ["held_out"]),
    "jsonl, audio in a folder beside": (jsonl_with_audio_elsewhere, "manifest.jsonl", "jsonl", ["held_out"]),
    "parquet for splits": (parquet_tables_for_splits, "", "parquet", ["dev"]),
    "arrow": (arrow_folder, "", "arrow", ["held_out"]),
    "librispeech": (librispeech, "", "librispeech", ["dev_clean"]),
    "common voice": (common_voice, "", "common_voice", ["dev", "test"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_recipe_of_every_kind_of_data_loads_and_prepares(name, tmp_path, here, capsys):
    make, inside, kind, sets = KINDS[name]
    root = tmp_path / "data"
    root.mkdir(exist_ok=True)
    make(root)
    assert run_main(new.main, ["mine", str(root / inside) if inside else str(root)]) == 0
    recipe = load_recipe("mine.yaml", ["data.num_proc=1"])
    assert {source.kind for source in recipe.data.train} == {kind}
    assert list(recipe.eval.sets) == sets
    corpus = prepare(recipe, progress=False)
    assert sum(entry["rows"] for entry in corpus.info["sets"].values()) == 10
    assert all(entry["rejected"] == {} for entry in corpus.info["sets"].values())
    assert corpus.train.text(0) == corpus.train.text(0).replace(".", "").replace("!", "")


def test_without_data_it_is_the_demo(here):
    assert run_main(new.main, ["mine"]) == 0
    assert load_recipe("mine.yaml") == replace(load_recipe("demo"), name="mine")
    assert Path("mine.yaml").read_text().startswith("# wavefleet train mine.yaml\n")
    assert "# wavefleet train demo" not in Path("mine.yaml").read_text()


def test_through_the_command(tmp_path, here, capfd):
    csv_table(tmp_path)
    assert cli.main(["new", "mine", str(tmp_path / "speech.csv"), "--model", "scratch"]) == 0
    out, err = capfd.readouterr()
    assert "written: mine.yaml" in out
    assert "10 utterances" in out
    assert "next: wavefleet prepare mine.yaml" in err


# --- what it sees -----------------------------------------------------------------------------------------------


def written(argv, capsys):
    assert run_main(new.main, argv) == 0
    return Path("mine.yaml").read_text(encoding="utf-8"), *capsys.readouterr()


def test_the_comments_say_what_was_seen(tmp_path, here, capsys):
    root = tmp_path / "data"
    recordings(root, range(5), rate=8_000)
    recordings(root, range(5, 10), rate=44_100)
    for number in range(10):
        (root / f"u{number}.txt").write_text(f"{TEXTS[number]} {number}")
    text, out, notes = written(["mine", str(root)], capsys)
    seconds = sum(1.5 + 0.1 * number for number in range(10))
    assert f"10 utterances, about {seconds / 3600:.2g} hours" in out
    assert "1.5 to 2.4 s" in out
    assert "44100 Hz 50%" in out and "8000 Hz 50%" in out
    assert "Latin 100%; letter case: both" in out
    assert "8000 Hz hold nothing over 4000 Hz" in notes
    assert "texts hold digits" in notes
    for line in [*out.splitlines()[:-1], *(line.removeprefix("note: ") for line in notes.splitlines())]:
        assert line in text


def test_headers_alone_are_read_of_a_sample(tmp_path, here, monkeypatch):
    jsonl_table(tmp_path)
    monkeypatch.setattr("asr_train.data.audio.decode", lambda *_: pytest.fail("decoded"))
    read = []
    monkeypatch.setattr("asr_train.data.look.NUM_SAMPLED", 4)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("read"))
    found = look_at([TableSource(kind="jsonl", path=str(tmp_path / "manifest.jsonl"))])
    assert (found.num_rows, found.num_sampled) == (10, 4)
    assert found.hours == pytest.approx(found.durations_s.mean() * 10 / 3600)
    assert not read


def test_segments_count_with_their_own_length(tmp_path, here):
    (tmp_path / "long.wav").write_bytes(encoded(np.concatenate([waveform(number) for number in range(10)])))
    rows = [
        {"audio_filepath": "long.wav", "text": "a b", "offset": float(start), "duration": 1.0} for start in range(10)
    ]
    found = look_at([TableSource(kind="jsonl", path=str(write_jsonl(tmp_path / "m.jsonl", rows)))])
    assert set(found.durations_s) == {1.0}


def test_a_letter_is_rare_where_it_is_so_in_the_case_that_is_learnt(tmp_path, here):
    jsonl_table(tmp_path)
    look = look_at([TableSource(kind="jsonl", path=str(tmp_path / "manifest.jsonl"))])

    def rare(texts):
        remarks = new._remarks(replace(look, texts=look_at_texts(texts)))
        said = [remark for remark in remarks if "once or twice" in remark]
        return said and said[0].partition(": ")[2].partition(";")[0].split()

    sentence = "the quick brown fox jumps over the lazy dog"
    assert rare([sentence.capitalize()] + 3 * [sentence]) == []
    assert rare([sentence + " Ñ"] + 3 * [sentence]) == ["ñ"]
    assert rare(3 * [sentence.upper()] + ["Ñ"]) == ["Ñ"]


@pytest.mark.parametrize(
    ("texts", "case", "scripts", "removed", "chosen"),
    [
        (["It's HERE -- now?"], "both", {"LATIN"}, "-?", "lower"),
        (["ALL UPPER"], "upper", {"LATIN"}, "", "upper"),
        (["all lower"], "lower", {"LATIN"}, "", "lower"),
        (["مرحبا، بكم"], "none", {"ARABIC"}, "،", "keep"),
        (["می\u200cروم"], "none", {"ARABIC"}, "", "keep"),
        (["你好。"], "none", {"CJK"}, "。", "keep"),
        (["Привет | мир"], "both", {"CYRILLIC"}, "|", "lower"),
    ],
)
def test_scripts_case_and_signs_of_texts(texts, case, scripts, removed, chosen):
    found = look_at_texts(texts)
    assert (found.case, set(found.scripts), set(found.signs)) == (case, scripts, set(removed))
    assert new._CASES[found.case] == chosen


def test_a_letter_that_is_rare_in_one_case_only_is_not_rare():
    texts = ["Abcdefghijk lmnop qrstu", "abcdefghijk lmnop qrstuv"] * 2
    seen = {"sources": (), "headers": (), "unreadable": (), "num_sampled": 0, "texts": look_at_texts(texts)}
    look = Look(num_rows=len(texts), is_whole=True, num_without_text=0, **seen)
    assert [remark for remark in new._remarks(look) if "letters that occur" in remark] == [
        "letters that occur once or twice: v; misspellings, perhaps"
    ]


@pytest.mark.parametrize(
    ("texts", "model"),
    [(["plain letters"], "facebook/wav2vec2-base"), (["größer", "naïve"], "facebook/wav2vec2-xls-r-300m"),
     (["привет"], "facebook/wav2vec2-xls-r-300m")],
)  # fmt: skip
def test_the_model_follows_the_letters_where_it_can_be_had(texts, model, tmp_path, here, monkeypatch):
    monkeypatch.setattr(new, "unreachable", lambda name: None)
    recordings(tmp_path / "data")
    for number in range(10):
        (tmp_path / "data" / f"u{number}.txt").write_text(texts[number % len(texts)])
    assert run_main(new.main, ["mine", str(tmp_path / "data")]) == 0
    recipe = load_recipe("mine.yaml")
    assert recipe.model.pretrained == model


def test_a_model_that_cannot_be_had_is_stood_in_for_and_that_is_said(tmp_path, here, capsys):
    audio_folder(tmp_path / "data")
    text, _, notes = written(["mine", str(tmp_path / "data")], capsys)
    assert "facebook/wav2vec2-base should be the model, but cannot be had here: no network in this test" in notes
    assert "stands in for facebook/wav2vec2-base" in text
    assert load_recipe("mine.yaml").model.pretrained is None


def test_long_utterances_are_kept_where_they_are_many(tmp_path, here):
    rows = []
    for number in range(4):
        soundfile.write(tmp_path / f"{number}.wav", np.full(16_000 * 40, 0.1, np.float32), 16_000)
        rows.append({"audio_filepath": f"{number}.wav", "text": "a long one"})
    write_jsonl(tmp_path / "m.jsonl", rows)
    assert run_main(new.main, ["mine", str(tmp_path / "m.jsonl")]) == 0
    recipe = load_recipe("mine.yaml")
    assert recipe.data.max_duration_s == 40
    assert recipe.unit_audio_s >= 40


# --- what it refuses --------------------------------------------------------------------------------------------


def refused(argv, capsys):
    code = run_main(new.main, argv)
    assert code == EXIT_FAILED
    return capsys.readouterr().err


def test_nothing_is_overwritten_and_all_problems_come_at_once(tmp_path, here, capsys):
    Path("my recipe.yaml").write_text("mine")
    rows = [{"audio_filepath": "a.wav", "text": 7}, {"audio_filepath": None, "text": "x"}]
    manifest = write_jsonl(tmp_path / "m.jsonl", rows)
    message = refused(["my recipe", str(manifest)], capsys)
    assert "'my recipe': letters, digits" in message
    assert "my recipe.yaml exists already" in message
    assert "m.jsonl:1: text: expected text, found 7" in message
    assert "m.jsonl:2: audio_filepath: expected a path" in message
    assert Path("my recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("make", "data", "words"),
    [
        (lambda root: None, "nowhere.csv", ["no such file or folder", "OWNER/NAME:CONFIG"]),
        (lambda root: (root / "empty").mkdir(), "empty", ["neither audio files nor a table"]),
        (lambda root: recordings(root / "silent"), "silent", ["10 of 10 rows have no text", "NAME.txt beside it"]),
        (recordings, "u0.wav", ["one recording is no data set"]),
        (lambda root: (root / "notes.docx").touch(), "notes.docx", ["no table that is known here"]),
        (lambda root: delimited(root / "t.csv", [["a", "b"], ["x", "y"]]), "t.csv",
         ["it has: a, b", "--audio-column COLUMN"]),
        (lambda root: write_jsonl(root / "m.jsonl", [{"audio": "no.wav", "text": "x"}]), "m.jsonl",
         ["1 of 1 files cannot be read", "missing file"]),
    ],
    ids=["nowhere", "empty", "without texts", "one file", "no table", "unknown columns", "missing audio"],
)  # fmt: skip
def test_data_that_cannot_be_used_is_told_why(make, data, words, tmp_path, here, capsys):
    make(tmp_path)
    message = refused(["mine", str(tmp_path / data)], capsys)
    assert all(word in message for word in words), message
    assert not Path("mine.yaml").exists()


def test_columns_of_other_names_can_be_given(tmp_path, here):
    delimited(tmp_path / "t.csv", [["clip", "words"], *zip(recordings(tmp_path), TEXTS, strict=True)])
    argv = ["mine", str(tmp_path / "t.csv"), "--audio-column", "clip", "--text-column", "words"]
    assert run_main(new.main, argv) == 0
    (source,) = load_recipe("mine.yaml").data.train
    assert (source.audio_column, source.text_column) == ("clip", "words")


def test_paths_that_leave_the_tables_folder_are_said_in_the_recipe(tmp_path, here, capsys):
    names = recordings(tmp_path / "elsewhere")
    rows = [
        {"audio_filepath": str(tmp_path / "elsewhere" / name), "text": text}
        for name, text in zip(names, TEXTS, strict=True)
    ]
    manifest = write_jsonl(tmp_path / "lists" / "m.jsonl", rows)
    text, _, _ = written(["mine", str(manifest)], capsys)
    assert load_recipe("mine.yaml").data.train[0].allow_paths_outside_root is True
    assert "paths of audio lead out of the table's folder" in text


def test_a_usage_error_is_one():
    assert run_main(lambda rest: cli.main(list(rest)), ["new", "mine", "--modle", "x"]) == EXIT_USAGE


# --- the hub ----------------------------------------------------------------------------------------------------


def on_hub(monkeypatch, configs, splits):
    monkeypatch.setattr(hub, "HfApi", mock.Mock())
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: configs)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: splits)


def test_a_name_on_the_hub_gives_its_splits(monkeypatch):
    on_hub(monkeypatch, ["en-US", "de-DE"], ["train", "validation", "test"])
    found = find_source("PolyAI/minds14:en-US")
    assert found.train == (HubSource(kind="hub", dataset="PolyAI/minds14", config="en-US", split="train"),)
    assert {name: source.split for name, source in found.sets.items()} == {"dev": "validation", "test": "test"}


def test_several_configurations_are_listed(monkeypatch):
    on_hub(monkeypatch, ["en-US", "de-DE"], ["train"])
    with pytest.raises(SourceError, match="name one as PolyAI/minds14:CONFIG of: en-US, de-DE"):
        find_source("PolyAI/minds14")


def test_without_network_a_name_on_the_hub_is_a_clear_message(monkeypatch, here, capsys):
    class Hub:
        def dataset_info(self, name, timeout):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "HfApi", Hub)
    message = refused(["mine", "PolyAI/minds14"], capsys)
    assert "hub data set PolyAI/minds14: the hub cannot be reached from here" in message
    assert "nor is there a folder PolyAI/minds14 here" in message


def test_the_first_rows_of_a_hub_data_set_are_looked_at(tmp_path, monkeypatch):
    """A folder stands for the hub: `datasets` reads both alike."""
    parquet_tables_for_splits(tmp_path / "set")
    source = HubSource(kind="hub", dataset=str(tmp_path / "set"), split="train")
    monkeypatch.setattr("asr_train.data.look.NUM_SAMPLED", 5)
    found = look_at([source])
    assert (found.num_rows, found.num_sampled, found.is_whole) == (5, 5, False)
    assert found.counts("rate_hz") == {"16000": 5}
    assert len(hub.open_hub(source)) == 8


def test_what_kind_a_source_is_does_not_depend_on_the_working_directory(tmp_path, here, monkeypatch):
    audio_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    found = find_source("data")
    assert found.train == (FolderSource(kind="audio_folder", path=str(tmp_path / "data")),)
