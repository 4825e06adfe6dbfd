"""A run for every combination: named by its values, submitted once, listed by its best WER; with a faked Slurm."""

import json

import pytest
import yaml
from fake_slurm import FakeSlurm

from asr_train.errors import RecipeError
from asr_train.files import append_jsonl, read_json, write_json
from asr_train.recipe import recipe_hash
from asr_train.run_dir import RunDir
from launch import cli
from launch.jobs.sweep import combinations, split_values

PROFILE = {"gpus_per_node": 0, "cpus_per_node": 2, "time": 60, "signal_lead_s": 60}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def recipe(tiny_recipe_file):
    return str(tiny_recipe_file())


@pytest.fixture
def sweep(fake, recipe, tmp_path, capsys):
    """`wavefleet sweep` of the tiny recipe: what it printed."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))

    def sweep(*arguments, code=0, cluster=str(profile)):
        assert cli.main(["sweep", recipe, *arguments, *(["--cluster", cluster] if cluster else [])]) == code
        return capsys.readouterr()

    return sweep


def names(members):
    return [member.path.name for member in members]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("one", ["one"]),
        ("", [""]),
        ("[0.1,0.4,0.5],[0.2,0.3,0.5]", ["[0.1,0.4,0.5]", "[0.2,0.3,0.5]"]),
        ("{a: 1, b: [2, 3]},null", ["{a: 1, b: [2, 3]}", "null"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        ("don't,won't", ["don't", "won't"]),
        ("['it,s', \"x]\"],y", ["['it,s', \"x]\"]", "y"]),
        ("'',x", ["''", "x"]),
    ],
)
def test_commas_part_values_but_not_inside_of_quotes_and_brackets(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["a,,b", ",a", "a,", "[1,2", "'a,b", "{a: [1}"])
def test_what_is_left_open_or_empty_is_refused(text):
    with pytest.raises(RecipeError, match=r"not closed|between two commas"):
        split_values(text)


def test_every_value_with_every_other_in_a_run_that_shows_them(fake, recipe, tmp_path):
    found = combinations(recipe, ["optim.lr=1e-4,0.001", "seed=1,2", "max_steps=7"])
    assert [member.values for member in found] == [
        {"optim.lr": lr, "seed": seed} for lr in (0.0001, 0.001) for seed in (1, 2)
    ]
    first = found[0]
    assert first.path == tmp_path / "runs" / f"tiny-lr=0.0001-seed=1-{recipe_hash(first.recipe)[:8]}"
    assert (first.recipe.max_steps, first.recipe.optim.lr) == (7, 0.0001)
    assert first.recipe.run_dir == str(first.path)


def test_values_that_are_the_same_are_one_run(fake, recipe):
    assert len(combinations(recipe, ["optim.lr=1e-4,0.0001,1.0e-4", "seed=1,1"])) == 1


def test_fields_that_do_not_define_a_run_make_runs_of_their_own(fake, recipe):
    found = combinations(recipe, ["checkpoint.keep_last=2,3"])
    assert len({recipe_hash(member.recipe) for member in found}) == 1
    assert len(set(names(found))) == 2


def test_names_are_safe_and_keys_that_end_alike_are_told_apart(fake, recipe):
    found = combinations(recipe, ["text.remove='$(touch x)','a/b%j\\'", "text.case=upper"])
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._=+-_") for name in names(found))
    found = combinations(recipe, ["optim.tri_stage=[0.1,0.4,0.5],[0.2,0.3,0.5]"])
    assert "tri_stage=_0.1_0.4_0.5_" in names(found)[0]
    found = combinations(recipe, ["checkpoint.every=5,6", "log.every=5,6"])
    assert "checkpoint.every=5-log.every=5" in names(found)[0]


def test_every_mistake_is_said_before_anything_is_submitted(sweep, fake, tmp_path):
    said = sweep("optim.lrr=1,2", "seed=-1,3", "max_steps=[1", "text.case=upper,,lower", code=2)
    for part in ("max_steps: '[1': a bracket is not closed", "text.case: 'upper,,lower'"):
        assert part in said.err
    said = sweep("optim.lrr=1,2", "seed=-1,3", "cluster.cpus_per_node=0", code=2)
    for part in ("did you mean optim.lr?", "seed: -1", "cpus_per_node: 0"):
        assert part in said.err
    said = sweep("units_per_step=1,2", "cluster.processes_per_node=2", code=2)
    assert "units_per_step=1" in said.err
    said = sweep("run_dir=here", "seed=1,2", code=2)
    assert "every run of a sweep has its own" in said.err
    assert "--cluster: missing" in sweep("seed=1,2", code=2, cluster=None).err
    assert fake.calls("sbatch") == []
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_shows_every_script(sweep, fake, tmp_path):
    text = sweep("seed=1,2", "--dry-run").out
    assert text.count("#!/bin/bash") == 2
    assert "-seed=1-" in text and "-seed=2-" in text
    assert fake.calls("sbatch") == []
    assert not (tmp_path / "runs").exists()


def test_a_combination_is_submitted_once(sweep, fake, tmp_path):
    first = json.loads(sweep("seed=1,2", "--json").out)
    assert [(row["values"], row["job_id"], row["state"]) for row in first] == [
        ({"seed": 1}, "100", "pending"),
        ({"seed": 2}, "101", "pending"),
    ]
    assert all(read_json(path / "run.json")["name"] == "tiny" for path in (tmp_path / "runs").iterdir())
    said = sweep("seed=1,2,3")
    assert "job 100 is PENDING already" in said.err
    assert sorted(fake.jobs) == ["100", "101", "102"]
    sweep("seed=2", "optim.lr=3e-4,2e-4")
    sweep("optim.lr=3e-4,2e-4", "seed=2")
    assert len(fake.jobs) == 5  # in whatever order the keys stand


def test_a_run_that_was_submitted_alone_is_that_combination(sweep, fake, recipe, tmp_path, capsys):
    assert cli.main(["submit", recipe, "seed=2", "--cluster", str(tmp_path / "profile.yaml")]) == 0
    capsys.readouterr()
    rows = json.loads(sweep("seed=1,2", "--json").out)
    assert len(fake.jobs) == 2
    assert {row["job_id"] for row in rows} == {"100", "101"}


def test_one_that_is_done_is_shown_and_one_that_failed_keeps_no_other_from_it(sweep, fake, recipe):
    done, failed, _ = combinations(recipe, ["seed=1,2,3"])
    sweep("seed=1,2")
    fake.end()
    write_json(done.path / "done.json", {"step": 4})
    write_json(failed.path / "attempts" / "attempt-001.json", {"attempt": 1})
    RunDir(failed.path).write_outcome(1, 0, {"status": "failed", "exit_code": 4, "message": "no space left"})
    said = sweep("seed=1,2,3", code=2)
    assert f"{done.path}: done already" in said.err
    assert "the last attempt failed: rank 0: no space left" in said.err
    assert sorted(fake.jobs) == ["100", "101", "102"]
    sweep("seed=1,2,3", "--retry")
    assert sorted(fake.jobs) == ["100", "101", "102", "103"]


def test_the_list_has_the_best_wer_of_every_run_best_first(sweep, fake, recipe):
    members = combinations(recipe, ["seed=1,2,3"])
    for member, wers in zip(members, ([0.9, 0.4, 0.5], [0.8, 0.3], []), strict=True):
        for step, wer in enumerate(wers, 1):
            line = {"attempt": 1, "step": step, "set": "dev", "wer": wer, "cer": 0.1}
            append_jsonl(member.path / "metrics.jsonl", line)
            append_jsonl(member.path / "metrics.jsonl", {**line, "set": "other", "wer": 0.01})
    rows = json.loads(sweep("seed=1,2,3", "--list", "--json", cluster=None).out)
    assert [(row["values"]["seed"], row["best_wer"], row["best_step"], row["set"]) for row in rows] == [
        (2, 0.3, 2, "dev"),
        (1, 0.4, 2, "dev"),
        (3, None, None, None),
    ]
    table = sweep("seed=1,2,3", "--list", cluster=None).out.splitlines()
    assert table[0].split()[:3] == ["seed", "best", "WER"]
    assert table[1].split()[:3] == ["2", "30.00%", "dev"]
    assert fake.calls("sbatch") == []
