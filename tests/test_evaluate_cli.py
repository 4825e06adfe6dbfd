"""`python -m asr_train.evaluate RUN|MODEL`: what a user types, and reads."""

import contextlib
import io
import json

import pytest
import soundfile
from conftest import RATE, speech, write_jsonl
from ranks import run_ranks

from asr_train.config import FolderSource, TableSource
from asr_train.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, RecipeError, run_main
from asr_train.eval_data import pick_sets, read_data_name
from asr_train.evaluate import main
from asr_train.export import export
from asr_train.files import read_jsonl
from asr_train.run_dir import RunDir
from asr_train.train import train


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A finished run of 3 steps, with two sets."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    dev = tiny_recipe().eval.sets["dev"][0]
    sets = {"dev": {"kind": "jsonl", "path": dev.path}, "again": {"kind": "jsonl", "path": dev.path}}
    recipe = tiny_recipe(run_dir=str(folder), max_steps=3, num_workers=0, **{"eval.sets": sets, "text.case": "upper"})
    assert run_ranks(1, train, recipe) == [0]
    return RunDir(folder)


@pytest.fixture(scope="module")
def model(run):
    return export(run.path).folder


def score(*arguments, world_size=1):
    """Exit code, stdout and stderr of the command's first process."""

    def child():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_main(main, [str(argument) for argument in arguments])
        return code, out.getvalue(), err.getvalue()

    return run_ranks(world_size, child)[0]


def test_a_run_scores_as_it_did_in_training(run):
    code, out, err = score(run.path, "--json")
    assert code == EXIT_DONE, err
    found = json.loads(out)
    lines = {line["set"]: line for line in read_jsonl(run.metrics) if "set" in line}
    assert found.keys() == lines.keys() == {"dev", "again"}
    for name, scored in found.items():
        assert scored.pop("confusions")  # in a training's lines they would only be long
        assert scored == {key: lines[name][key] for key in scored}
    assert len(list(read_jsonl(run.evaluation(3, "dev")))) == 12


def test_what_a_person_reads(run, tmp_path):
    code, out, _ = score(run.path, "--set", "dev", "--out", tmp_path)
    assert code == EXIT_DONE
    header = next(line for line in out.splitlines() if "WER" in line)
    for column in ("set", "WER", "CER", "raw WER", "raw CER", "S", "D", "I", "words", "rows scored", "refused"):
        assert column in header
    worst = next(read_jsonl(tmp_path / "dev.jsonl"))
    assert out.count("\nref ") >= 5
    assert f"{worst['id']}  WER {worst['wer']:.0%}" in out
    assert " ".join(worst["reference"].split()[:2]) in " ".join(out.split())
    assert "most frequent confusions" in out
    assert [path.name for path in tmp_path.iterdir()] == ["dev.jsonl"]


def test_a_model_folder_on_a_manifest_of_its_own(model, tmp_path):
    """Rows outside the vocabulary are scored, refused ones counted; references in the model's letter case."""
    rows = []
    for number, text in enumerate(("One two", "Zürich 12", "sell a bill")):
        soundfile.write(tmp_path / f"{number}.wav", speech(text, 1.0, seed=number), RATE)
        rows.append({"audio_filepath": f"{number}.wav", "text": text, "id": f"r{number}"})
    rows.append({"audio_filepath": "gone.wav", "text": "gone", "id": "gone"})
    manifest = write_jsonl(tmp_path / "calls.jsonl", rows)
    code, out, err = score(model, "--data", manifest, "--json", "--out", tmp_path / "out")
    assert code == EXIT_DONE, err
    found = json.loads(out)
    assert (found["calls"]["num_rows"], found["calls"]["num_refused"]) == (3, 1)
    assert found["calls"]["words"]["hits"] + found["calls"]["words"]["substitutions"] + found["calls"]["words"][
        "deletions"
    ] == 7  # fmt: skip
    assert json.loads(score(model, "--data", manifest, "--json", world_size=2)[1]) == found
    written = {row["id"]: row for row in read_jsonl(tmp_path / "out" / "calls.jsonl")}
    assert written["r1"]["reference"] == "ZÜRICH 12"
    assert written["r1"]["raw_reference"] == "Zürich 12"


def test_a_model_folder_of_others_takes_the_case_of_its_vocabulary(model, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in model.iterdir():
        if path.name not in ("recipe.yaml", "export.json", "README.md"):
            (foreign / path.name).write_bytes(path.read_bytes())
    soundfile.write(tmp_path / "a.wav", speech("tell", 1.0), RATE)
    manifest = write_jsonl(tmp_path / "m.jsonl", [{"audio_filepath": "a.wav", "text": "tell"}])
    code, _, err = score(foreign, "--data", manifest, "--out", tmp_path / "out")
    assert code == EXIT_DONE, err
    assert next(read_jsonl(tmp_path / "out" / "m.jsonl"))["reference"] == "TELL"


def test_a_model_folder_on_the_sets_of_a_recipe(run, model):
    code, out, err = score(model, "--data", run.path / "recipe.yaml", "--set", "dev", "--json")
    assert code == EXIT_DONE, err
    assert json.loads(out)["dev"] == json.loads(score(run.path, "--set", "dev", "--json", world_size=2)[1])["dev"]


def test_a_folder_of_audio_and_texts(model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    soundfile.write(clips / "a.wav", speech("tell", 1.0), RATE)
    (clips / "a.txt").write_text("tell")
    code, out, err = score(model, "--data", clips)
    assert code == EXIT_DONE, err
    assert "clips" in out
    assert "every row" not in out  # nobody asked for a file


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], EXIT_USAGE, "neither a run directory"),
        (["RUN", "--set", "test"], EXIT_USAGE, "the recipe has: dev, again"),
        (["RUN", "--data", "no-such-recipe"], EXIT_USAGE, "no-such-recipe"),
        (["RUN", "--data", "EMPTY.jsonl"], EXIT_FAILED, "no row can be scored: missing file 1"),
        (["MODEL"], EXIT_USAGE, "--data"),
    ],
)
def test_what_cannot_be_scored(run, model, tmp_path, arguments, code, message):
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"audio_filepath": "gone.wav", "text": "gone"}])
    names = {"RUN": run.path, "MODEL": model, "EMPTY.jsonl": empty, "nowhere": tmp_path}
    found, out, err = score(*(names.get(argument, argument) for argument in arguments))
    assert (found, out) == (code, ""), err
    assert message in err


def test_names_of_data(tmp_path):
    assert read_data_name(str(tmp_path)).source == FolderSource(kind="audio_folder", path=str(tmp_path))
    named = read_data_name("calls/dev.csv")
    assert isinstance(named.source, TableSource)
    assert (named.source.kind, named.set_name) == ("csv", "dev")
    assert read_data_name("demo").recipe.name == "demo"
    assert pick_sets(["a", "b"], []) == ["a", "b"]
    assert pick_sets(["a", "b"], ["b"]) == ["b"]
    with pytest.raises(RecipeError, match=r"no eval\.sets"):
        pick_sets([], [])
