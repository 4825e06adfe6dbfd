"""On a real Slurm: a corpus prepared as a job array, a run scored as a job, a sweep, and what follows a run."""

import json
import stat
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import write_speech

from asr_train.data.corpus import Corpus
from asr_train.files import read_json, read_jsonl
from asr_train.prepare import prepare
from asr_train.recipe import dump_recipe
from asr_train.run_dir import RunDir
from launch.jobs.then import describe


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "small.yaml"
    path.write_text(
        "gpus_per_node: 0\ncpus_per_node: 1\ntime: 30\nsignal_lead_s: 30\n"
        "environment: {OMP_NUM_THREADS: 1, TOKENIZERS_PARALLELISM: 'false'}\n"
    )
    return str(path)


@pytest.fixture
def wavefleet(slurm, tmp_path):
    """The command, in a folder of its own."""
    return partial(slurm.wavefleet, cwd=tmp_path)


def wait_for(slurm, condition, folder, timeout_s=240):
    """Wait until a condition holds, or until no job is left that could make it hold."""
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        is_over = not slurm.run("squeue", "--noheader").strip()
        if (is_over and not condition()) or time.monotonic() > until:
            logs = sorted(path for path in folder.rglob("*") if path.suffix in (".err", ".out"))
            said = "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in logs)
            raise AssertionError(f"{slurm.jobs()}\n{said}")
        time.sleep(0.5)
    return found


def content(path):
    """Name -> bytes of everything that a corpus holds, but for its record of versions and times."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "corpus.json")
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_a_corpus_as_a_job_array_of_which_one_task_fails_is_that_of_one_machine(
    slurm, wavefleet, profile, tiny_recipe, tmp_path
):
    """Its second task lacks a file; when that is there, the same command does that task alone."""
    changes = {
        "data.train.path": str(write_speech(tmp_path / "speech", 12)),
        "eval.sets.dev.path": str(write_speech(tmp_path / "dev", 3, seed=3, name="dev")),
        "data.shard_rows": 2,
    }
    local = prepare(tiny_recipe(**changes, **{"data.corpus_root": str(tmp_path / "local")}), progress=False)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(dump_recipe(tiny_recipe(**changes, **{"data.corpus_root": str(tmp_path / "corpora")})))
    file = tmp_path / "speech" / "utterance-007.wav"
    away = file.rename(tmp_path / "away.wav")
    command = ["prepare", recipe_file, "--cluster", profile, "--tasks", "3"]

    busy = slurm.submit("--nodes=4", "--exclusive", "--wrap", "sleep 600")  # nothing starts yet
    first = wavefleet(*command).stdout
    assert "3 of 3 tasks as job " in first
    folder = next((tmp_path / "corpora").glob("*.jobs"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "slurm")] == [0o700, 0o700]
    assert ": 3 pending; job " in wavefleet(*command).stdout
    slurm.run("scancel", busy)

    def codes():
        names = [f"share-{number}-of-3" for number in (1, 2, 3)]
        files = [folder / f"{name}.json" for name in names]
        return all(path.exists() for path in files) and [read_json(path)["exit_code"] for path in files]

    assert wait_for(slurm, codes, folder) == [0, 4, 0]
    wait_for(slurm, lambda: not slurm.run("squeue", "--noheader").strip(), folder)
    corpus = folder.with_suffix("")
    assert not (corpus / "corpus.json").exists()  # what makes it whole was cancelled by Slurm
    assert "CANCELLED" in {fields["JobState"] for fields in slurm.jobs().values()}
    before = {path: path.stat().st_mtime_ns for path in corpus.glob("*/shard-*.arrow")}

    away.rename(file)
    again = wavefleet(*command)
    assert "1 of 3 tasks as job " in again.stdout
    assert "task 2 of 3 failed: " in again.stderr
    assert "have no file on" in again.stderr
    wait_for(slurm, (corpus / "corpus.json").exists, folder)
    wait_for(slurm, lambda: not slurm.run("squeue", "--noheader").strip(), folder)
    after = {path: path.stat().st_mtime_ns for path in corpus.glob("*/shard-*.arrow")}
    assert [path.name for path in sorted(after) if after[path] != before.get(path)] == ["shard-00003.arrow"]
    assert Corpus.open(corpus).hash == local.hash
    assert content(corpus) == content(local.path)
    assert "already prepared" in wavefleet(*command).stdout


@pytest.fixture
def recipe_file(tiny_corpus, tiny_recipe_file):
    return str(tiny_recipe_file(units_per_step=2, **{"log.every": 1, "num_workers": 0}))


def test_a_run_is_followed_and_scored_again_as_a_job(slurm, wavefleet, profile, recipe_file, tmp_path):
    run = tmp_path / "run"
    submit = ["submit", recipe_file, f"run_dir={run}", "max_steps=1", "--cluster", profile]
    wavefleet(*submit, "--then", "evaluate,export")

    wait_for(slurm, lambda: describe(RunDir(run))["state"] not in ("waiting", "running"), run)
    found = json.loads(wavefleet("status", run, "--json").stdout)
    assert (found["state"], found["then"]["state"]) == ("done", "done"), found
    assert (run / "export" / "config.json").exists()
    assert "rows scored" in (run / "then" / "evaluate.out").read_text()

    said = wavefleet("evaluate", "run", "--json", "--cluster", profile, "--wait")
    scores = json.loads(said.stdout)
    assert scores["dev"]["wer"] == found["wer"]["dev"]
    assert "submitted as job " in said.stderr
    said = wavefleet("transcribe", "run/export", "gone.wav", "--cluster", profile, "--wait", code=4)
    assert "gone.wav" in said.stderr  # as without --cluster


def test_a_sweep_of_two_runs_is_listed_with_their_best_wer(slurm, wavefleet, profile, recipe_file, tmp_path):
    command = ["sweep", recipe_file, "seed=1,2", "max_steps=1", "--json"]
    rows = json.loads(wavefleet(*command, "--cluster", profile).stdout)
    assert len({row["job_id"] for row in rows}) == 2

    runs = [RunDir(Path(row["run"])) for row in rows]
    wait_for(slurm, lambda: all(run.done.exists() for run in runs), tmp_path / "runs")
    found = json.loads(wavefleet(*command, "--list").stdout)
    assert [row["state"] for row in found] == ["done", "done"]
    for row in found:
        lines = read_jsonl(Path(row["run"]) / "metrics.jsonl")
        assert row["best_wer"] == min(line["wer"] for line in lines if line.get("set") == "dev")
        assert f"seed={row['values']['seed']}" in Path(row["run"]).name
    again = wavefleet(*command, "--cluster", profile)
    assert again.stderr.count("done already") == 2


def test_what_waits_for_a_job_waits_while_that_is_put_back_into_the_queue(slurm):
    """What `--then` builds on, as Slurm does it; and that a job which is not held may be released."""
    program = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then scontrol requeue $SLURM_JOB_ID; sleep 60; fi; echo again'
    first = slurm.submit("--hold", "--wrap", program)
    second = slurm.submit(f"--dependency=afterany:{first}", "--kill-on-invalid-dep=yes", "--wrap", "date +%s.%N")
    slurm.run("scontrol", "release", first)
    slurm.run("scontrol", "release", second)
    slurm.wait_for(first, "COMPLETED", restarts=1)
    slurm.wait_for(second, "COMPLETED")
    ended = slurm.folder / "jobs" / f"{first}.out"
    assert "again" in ended.read_text()
    assert float(slurm.output(second)) > ended.stat().st_mtime
