"""Reading recipes: YAML and key=value, every error at once, identity."""

import json
import subprocess
import sys

import pytest
import yaml

from asr_train.config import Recipe
from asr_train.errors import RecipeError
from asr_train.recipe import (
    decode_recipe,
    dump_recipe,
    identity,
    load_recipe,
    override,
    parse_cadence,
    read_values,
    recipe_hash,
    run_directory,
    to_values,
    walk,
)

MINIMAL = {"name": "tiny", "max_steps": 10, "data": {"train": {"kind": "demo", "split": "train"}}}


@pytest.fixture
def write(tmp_path):
    def write(values, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


def errors_of(values, *overrides, write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(values), overrides)
    return str(caught.value)


def test_overrides_reach_groups_dicts_and_lists(write):
    values = {
        **MINIMAL,
        "data": {"train": [{"kind": "librispeech", "path": "a"}, {"kind": "librispeech", "path": "b"}]},
    }
    recipe = load_recipe(
        write(values),
        ["optim.lr=1e-5", "data.train.1.path=/c", "model.config.hidden_dropout=0.0", "eval.every=1 epoch",
         "eval.sets.dev.kind=demo", "eval.sets.dev.split=heldout_voices", "optim.betas=[0.8, 0.9]"],
    )  # fmt: skip
    assert recipe.optim.lr == 1e-5
    assert recipe.data.train[1].path == "/c"
    assert recipe.model.config == {"hidden_dropout": 0.0}
    assert recipe.eval.every == "1 epoch"
    assert recipe.eval.sets["dev"][0].split == "heldout_voices"
    assert recipe.optim.betas == (0.8, 0.9)


def test_a_yaml_number_in_exponent_form_without_a_dot_is_a_number(write):
    """YAML 1.1 reads 1e-5 as a string; people write it all the same."""
    assert load_recipe(write({**MINIMAL, "optim": {"lr": "1e-5"}})).optim.lr == 1e-5


def test_clock_times_and_leading_zeros_are_text(write):
    """YAML 1.1 reads 12:00:00 as 43200, to base 60, and 007 as octal."""
    fields = "time: 12:00:00\nrate: 1:30.5\ncode: 010\ncount: 10\nshare: 0.5\nnone: 0\nhex: 0x10\n"
    expected = {"time": "12:00:00", "rate": "1:30.5", "code": "010", "count": 10, "share": 0.5, "none": 0, "hex": 16}
    assert read_values(write(fields)) == expected
    values = {}
    assert override(values, "time=12:00:00") is None
    assert override(values, "code=010") is None
    assert values == {"time": "12:00:00", "code": "010"}


def test_all_errors_appear_together_with_key_value_and_remedy(write):
    values = {
        **MINIMAL,
        "seed": -1,
        "precison": "fp16",
        "optim": {"lr": 0, "shedule": "linear"},
        "data": {"train": {"kind": "hubb", "dataset": "x"}, "encoding": "mp3"},
        "checkpoint": {"every": "often"},
    }
    text = errors_of(values, "nonsense", write=write)
    for expected in (
        ": 8 errors",
        "'nonsense': expected key=value, as in optim.lr=1e-5",
        "seed: -1: should be greater than or equal to 0",
        "precison: no such field; did you mean precision?",
        "optim.lr: 0: should be greater than 0",
        "optim.shedule: no such field; did you mean optim.schedule?",
        "data.train.0.kind: 'hubb': expected one of",
        "did you mean hub?",
        "data.encoding: 'mp3'",
        "checkpoint.every: 'often': should be a number of steps, or `1 epoch`",
    ):
        assert expected in text


def test_an_unknown_field_of_a_source_names_that_sources_fields(write):
    values = {**MINIMAL, "data": {"train": {"kind": "librispeech", "path": "x", "splt": "dev-clean"}}}
    assert "data.train.0.splt: no such field; did you mean data.train.0.split?" in errors_of(values, write=write)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_epochs=3"], "max_steps, max_epochs: give exactly one"),
        (["max_steps=null"], "max_steps, max_epochs: give exactly one"),
        (["order=grouped"], "order: 'grouped' takes a fixed count of utterances a unit; set unit_utterances"),
        (["unit_utterances=8"], "unit_utterances: order 'cost' sizes units by unit_audio_s"),
        (["data.min_duration_s=40"], "data.min_duration_s: 40.0: should be under"),
        (["optim.tri_stage=[0.1,0.1,0.1]"], "optim.tri_stage: [0.1, 0.1, 0.1]: the three shares should add up to 1"),
        (["text.remove='--'"], "text.remove: '--': a character stands twice"),
        (["eval.metrics=[mine]"], "eval.metrics: mine: metrics are programs; set trust_remote_code: true"),
        (["eval.best=dev/wer"], "eval.best: 'dev/wer': expected SET/METRIC"),
        (["eval.early_stopping=3"], "eval.early_stopping: needs at least one set"),
        (["data.train=[]"], "data.train: needs at least one source"),
        (["seed.deep=1"], "seed: {'deep': 1}: should be a valid integer"),
        (["max_steps.deep=1"], "max_steps.deep: max_steps is a value, it has no keys"),
        (["data.train.0.split=x"], "data.train.0"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(write, overrides, message):
    assert message in errors_of(MINIMAL, *overrides, write=write)


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "expected `key: value` lines"), ("a: [", "is not YAML")])
def test_a_file_that_is_no_recipe_is_refused(write, text, message):
    assert message in errors_of(text, write=write)


def test_yaml_is_read_safely(write):
    text = "name: !!python/object/apply:os.system ['true']\n"
    assert "is not YAML" in errors_of(text, write=write)


def test_relative_paths_become_absolute_and_hub_names_do_not(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local_model").mkdir()
    values = {**MINIMAL, "run_dir": "mine", "data": {"train": {"kind": "csv", "path": "a.csv", "audio_root": "clips"}}}
    recipe = load_recipe(write(values), ["model.pretrained=local_model", "text.processor=facebook/wav2vec2-base"])
    assert recipe.run_dir == str(tmp_path / "mine")
    assert recipe.data.train[0].path == str(tmp_path / "a.csv")
    assert recipe.data.train[0].audio_root == str(tmp_path / "clips")
    assert recipe.data.corpus_root == str(tmp_path / "corpora")
    assert recipe.model.pretrained == str(tmp_path / "local_model")
    assert recipe.text.processor == "facebook/wav2vec2-base"


def test_what_defines_the_run_is_in_its_hash_and_nothing_else_is():
    recipe = decode_recipe(MINIMAL)

    def hash_with(**values):
        return recipe_hash(decode_recipe({**MINIMAL, **values}))

    assert hash_with(seed=1) != recipe_hash(recipe)
    assert hash_with(optim={"lr": 2e-4}) != recipe_hash(recipe)
    assert hash_with(model={"config": {"hidden_dropout": 0.5}}) != recipe_hash(recipe)
    assert hash_with(log={"every": 3}, eval={"sets": {}}, run_dir="elsewhere", num_workers=4) == recipe_hash(recipe)
    assert {"seed", "max_steps", "optim.lr", "data.train"} <= set(identity(recipe))
    assert not {"run_dir", "log.every", "checkpoint.every", "eval.every"} & set(identity(recipe))


def test_the_hash_is_the_same_in_every_process():
    """String hashes differ from process to process; a run must not."""
    program = (
        "import sys, json; from asr_train.recipe import decode_recipe, recipe_hash; "
        "print(recipe_hash(decode_recipe(json.loads(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(MINIMAL)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == recipe_hash(decode_recipe(MINIMAL))


def test_the_run_directory_is_name_and_hash_unless_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = decode_recipe(MINIMAL)
    assert run_directory(recipe) == tmp_path / "runs" / f"tiny-{recipe_hash(recipe)[:8]}"
    assert run_directory(decode_recipe({**MINIMAL, "run_dir": "/data/mine"})).as_posix() == "/data/mine"


def test_a_dumped_recipe_reads_back_equal_and_names_every_field(write):
    recipe = load_recipe(write(MINIMAL), ["eval.sets.dev={kind: demo, split: heldout_voices}"])
    dumped = dump_recipe(recipe)
    assert load_recipe(write(dumped, "dumped.yaml")) == recipe
    assert set(yaml.safe_load(dumped)) == set(to_values(recipe)) == set(Recipe.__dataclass_fields__)


def test_every_field_has_a_meaning():
    rows = list(walk(decode_recipe(MINIMAL)))
    assert len(rows) > 60
    assert [key for key, _, meta in rows if not meta.get("meaning")] == []


def test_defaults_are_not_shared_between_recipes():
    first, second = decode_recipe(MINIMAL), decode_recipe(MINIMAL)
    assert first.model.config is not second.model.config
    assert first.eval.sets is not second.eval.sets


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [("500", (500, "steps")), ("1 epoch", (1, "epochs")), ("2 epochs", (2, "epochs")), (None, None)],
)
def test_cadences(cadence, expected):
    assert parse_cadence(cadence) == expected
