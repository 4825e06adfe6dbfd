"""Commands as jobs: what Slurm is asked for, what a killed submitter leaves, what a job does; with a faked Slurm."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_slurm import FakeSlurm

from asr_train.errors import RecipeError
from asr_train.files import read_json, write_json
from asr_train.lock import HeartbeatLock
from asr_train.recipe import dump_recipe
from launch import cli
from launch.jobs import job, prepare_array, remote
from launch.jobs.job import Command
from launch.site import exclusions, slurm
from launch.site.cluster import load_cluster
from launch.site.slurm import SlurmError

ROOT = Path(__file__).resolve().parent.parent
PROFILE = {"gpus_per_node": 4, "gpu_type": "a100", "cpus_per_node": 8, "time": 60, "partition": "gpu"}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    return str(path)


# --- prepare as an array ----------------------------------------------------------------------------------------


@pytest.fixture
def pending(monkeypatch, tmp_path):
    """What is to be done, as the program that lists the sources would say."""
    found = {"corpus": str(tmp_path / "corpora" / "tiny-12345678"), "state": "begun", "pending": list(range(1, 8))}
    monkeypatch.setattr(prepare_array, "_begin", lambda *_: (0, found))
    return found


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "corpora" / "tiny-12345678.jobs"


@pytest.fixture
def prepare(fake, profile, tiny_recipe_file):
    """`wavefleet prepare` of the tiny recipe in seven tasks."""

    def run(*arguments, code=0):
        command = ["prepare", str(tiny_recipe_file()), "--cluster", profile, "--tasks", "7", *arguments]
        assert cli.main(command) == code

    return run


def test_tasks_are_arrays_of_the_clusters_size_held_written_down_and_released(prepare, pending, fake, folder, capsys):
    fake.write(max_array_size=3)
    prepare()
    asked = {job_id: fake.options(job_id) for job_id in fake.jobs}
    assert [options.get("array") for options in asked.values()] == ["0-2%3", "0-2%3", None, None]
    assert [options.get("dependency") for options in asked.values()] == [None, None, None, "afterok:100:101:102"]
    assert asked["103"]["kill-on-invalid-dep"] == "yes"
    assert all("hold" in options for options in asked.values())
    assert fake.calls("scontrol")[-4:] == [["release", job_id] for job_id in ("100", "101", "102", "103")]
    assert job.submitted(folder).job_ids == ("100", "101", "102", "103")
    assert [command.arguments[1:] for command in job.commands(folder)] == [
        *((f"--share={number}/7",) for number in range(1, 8)),
        (),
    ]
    assert "7 of 7 tasks as job 100, 101, 102, then made whole by job 103" in capsys.readouterr().out


def test_everything_in_the_folder_is_its_owners_and_pickles_hold_a_path_and_a_number(prepare, pending, folder):
    prepare()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "slurm")] == [0o700, 0o700]
    pickles = list((folder / "slurm").glob("*.pkl"))
    assert len(pickles) == 8
    for path in pickles:
        program = (
            "import pickletools, sys, json\n"
            "found = [str(a) for o, a, _ in pickletools.genops(open(sys.argv[1], 'rb').read()) "
            "if o.name in ('SHORT_BINUNICODE', 'BINUNICODE')]\nprint(json.dumps(found))"
        )
        done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
        named = set(json.loads(done.stdout))
        assert {"launch.jobs.task", "Task", "launch.jobs.job"} <= named
        assert any(name.startswith(f"{folder}/") for name in named)
        assert not {"environ", "recipe"} & named


def test_a_task_asks_for_no_gpu_unless_told_and_uses_its_cpus(prepare, pending, fake, folder):
    prepare()
    assert "gres" not in fake.options("100")
    assert fake.options("100")["cpus-per-task"] == "8"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["num_proc"] == 8
    fake.end()
    prepare("cluster.gpus_per_node=2", "data.num_proc=3")
    assert fake.options("102")["gres"] == "gpu:a100:2"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["num_proc"] == 3


def test_the_same_command_while_jobs_live_submits_nothing(prepare, pending, fake, folder, capsys):
    prepare()
    fake.end("100", state="RUNNING")
    prepare()
    assert len(fake.jobs) == 2
    assert "is being prepared: job 100: 1 running; job 101: 1 pending\n" in capsys.readouterr().out
    write_json(folder / "share-2-of-7.json", {"exit_code": 4})
    prepare()
    assert "1 pending; failed so far: share-2-of-7\n" in capsys.readouterr().out


def test_only_what_is_pending_is_submitted_again_and_what_failed_is_said(prepare, pending, fake, folder, capsys):
    prepare()
    fake.end()
    write_json(folder / "share-3-of-7.json", {"exit_code": 4})
    (folder / "share-3-of-7.err").write_text("prepare: 1 of 9\nerror: the disk is full\n")
    pending["pending"] = [3]
    prepare()
    assert [command.name for command in job.commands(folder)] == ["share-3-of-7", "merge"]
    assert fake.options("103")["dependency"] == "afterok:102"
    said = capsys.readouterr()
    assert "task 3 of 7 failed: the disk is full" in said.err
    assert "1 of 7 tasks as job 102" in said.out
    assert job.ended(folder, "share-3-of-7") is None


def test_where_all_shards_are_there_one_job_makes_them_whole(prepare, pending, fake, profile, folder, capsys):
    pending["pending"] = []
    job.make_folder(folder, load_cluster(profile))
    write_json(folder / "share-2-of-7.json", {"exit_code": 4})
    (folder / "share-2-of-7.err").write_text("error: 1 of 9 rows has no file\n")
    prepare()
    assert [command.name for command in job.commands(folder)] == ["merge"]
    assert "dependency" not in fake.options("100")
    assert "task 2 of 7 failed: 1 of 9 rows has no file" in capsys.readouterr().err


def test_a_refused_array_leaves_nothing_behind(prepare, pending, fake, folder, capsys):
    fake.write(max_array_size=4, refuse="array=0-2%3")  # the second
    prepare(code=4)
    assert {entry["state"] for entry in fake.jobs.values()} == {"CANCELLED"}
    assert "Job violates accounting/QOS policy" in capsys.readouterr().err
    assert job.submitted(folder) is None


def test_a_refused_last_job_takes_the_arrays_along(prepare, pending, fake):
    fake.write(refuse="dependency=")
    prepare(code=4)
    assert [entry["state"] for entry in fake.jobs.values()] == ["CANCELLED"]


def test_jobs_of_a_submitter_that_was_killed_are_cancelled_or_released(prepare, pending, fake, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "release", killed)  # before it wrote them down
        prepare(code=130)
    prepare()
    assert [entry["state"] for entry in fake.jobs.values()] == ["CANCELLED"] * 2 + ["PENDING"] * 2
    assert "never written down; it is cancelled" in capsys.readouterr().err
    fake.end()
    with monkeypatch.context() as patch:
        patch.setattr(slurm, "release", killed)  # after
        prepare(code=130)
    assert [fake.jobs[job_id]["held"] for job_id in ("104", "105")] == [True, True]
    prepare()
    assert len(fake.jobs) == 6
    assert [fake.jobs[job_id]["held"] for job_id in ("104", "105")] == [False, False]


def test_two_submitters_at_once_do_not_cancel_each_others_jobs(prepare, pending, fake, folder, capsys):
    with HeartbeatLock(folder / "lock.json"):
        prepare(code=2)
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert fake.jobs == {}
    prepare()
    assert len(fake.jobs) == 2


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"state": "complete"}, "already prepared: "),
        ({"state": "busy", "who": "process 7 on n1"}, "by process 7 on n1"),
    ],
)
def test_a_corpus_that_is_there_or_being_made_elsewhere(prepare, pending, fake, capsys, state, said):
    pending.update(state)
    prepare()
    assert said in capsys.readouterr().out
    assert fake.jobs == {}


def test_a_dry_run_of_prepare_touches_nothing(prepare, fake, folder, capsys):
    prepare("--dry-run")
    text = capsys.readouterr().out
    assert "#SBATCH --array=0-6%7" in text
    assert text.count("#!/bin/bash") == 2
    assert fake.calls("sbatch") == []
    assert not folder.parent.exists()


def test_mistakes_are_said_before_anything_starts(fake, profile, capsys):
    assert cli.main(["prepare", "demo", "--cluster", profile, "--tasks", "0"]) == 2
    assert "--tasks 0" in capsys.readouterr().err
    assert cli.main(["prepare", "demo", "data.shard_row=3", "--cluster", profile, "--tasks", "2"]) == 2
    assert "did you mean data.shard_rows?" in capsys.readouterr().err
    assert cli.main(["prepare", "demo", "--cluster", "nowhere", "--tasks", "2"]) == 2
    assert fake.calls("sbatch") == []


def test_bad_input_is_said_by_the_program_that_lists_it(fake, profile, tiny_recipe_file, tmp_path, capfd):
    recipe = str(tiny_recipe_file(**{"data.train.path": str(tmp_path / "gone.jsonl")}))
    assert cli.main(["prepare", recipe, "--cluster", profile, "--tasks", "2"]) == 4
    assert "gone.jsonl" in capfd.readouterr().err
    assert fake.calls("sbatch") == []


# --- evaluate and transcribe ------------------------------------------------------------------------------------


def submit(*arguments, code=0):
    assert cli.main([*arguments]) == code


def test_a_command_goes_to_a_job_with_its_arguments_as_they_are(fake, profile, tmp_path, capsys):
    model = tmp_path / "my model's $(touch injected)"
    model.mkdir()
    odd = ["--set", "a b", "--data=x;y", "--out", "--json", "-5", "`id`", "é\n$HOME"]
    submit("evaluate", str(model), *odd, "--cluster", profile, "cluster.time=6")
    (folder,) = (tmp_path / "jobs").iterdir()
    assert job.commands(folder) == [Command("evaluate", "asr_train.evaluate", (str(model), *odd))]
    assert read_json(folder / "job.json")["cwd"] == str(tmp_path)
    asked = fake.options("100")
    assert (asked["nodes"], asked["gres"], asked["time"]) == ("1", "gpu:a100:1", "6")
    assert capsys.readouterr().out == "100\n"
    assert "%" not in str(folder) and "$" not in str(folder)
    assert not list(tmp_path.rglob("injected"))


def test_the_same_command_is_one_job_and_another_is_another(fake, profile, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    submit("transcribe", "model", "a.wav", "--cluster", profile)
    submit("transcribe", "model", "a.wav", "--cluster", profile)
    assert capsys.readouterr().out == "100\n100\n"
    submit("transcribe", "model", "b.wav", "--cluster", profile)
    assert len(fake.jobs) == 2
    fake.end("100")
    submit("transcribe", "model", "a.wav", f"--cluster={profile}")
    assert len(fake.jobs) == 3


def test_names_of_nothing_are_refused(fake, profile, capsys):
    submit("evaluate", "runs/none", "--cluster", profile, code=2)
    assert "runs/none: none of these is a file or folder here" in capsys.readouterr().err
    assert fake.calls("sbatch") == []


def test_a_dry_run_of_evaluate_touches_nothing(fake, profile, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    submit("evaluate", "model", "--cluster", profile, "--dry-run")
    assert "#SBATCH --job-name='evaluate model'" in capsys.readouterr().out
    assert not (tmp_path / "jobs").exists()


def test_help_of_a_verb_says_that_it_can_be_a_job(capfd):
    submit("prepare", "--help")
    assert "wavefleet prepare --cluster P --help" in capfd.readouterr().out


@pytest.fixture
def job_folder(tmp_path, profile):
    """A job folder whose commands are of Python itself, run by the code that is tested."""

    def make(*arguments, module="json.tool"):
        folder = tmp_path / "jobs" / "it"
        job.make_folder(folder, load_cluster(profile))
        job.write_job(folder, load_cluster(profile), tmp_path / "site", ROOT, "it", [Command("it", module, arguments)])
        return folder

    return make


def run_task(folder, code=0, modules=()):
    program = "import sys; from pathlib import Path; from launch.jobs import job; job.task(Path(sys.argv[1]), 'it')()"
    environ = {**os.environ, "PYTHONPATH": ":".join(map(str, (ROOT, *modules))), "SLURM_JOB_ID": "7"}
    done = subprocess.run([sys.executable, "-c", program, folder], env=environ, cwd=ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode != 0) == (code != 0), done.stderr
    return done


def test_a_task_runs_its_command_where_it_was_submitted_with_the_folders_code(job_folder, fake, tmp_path):
    (tmp_path / "json").mkdir()  # must not be taken for Python's own
    (tmp_path / "json" / "__init__.py").write_text("raise RuntimeError('of the working directory')")
    (tmp_path / "it's; here.json").write_text('{"a":1}')
    folder = job_folder("it's; here.json")
    assert run_task(folder).stdout == ""
    assert (folder / "it.out").read_text() == '{\n    "a": 1\n}\n'
    assert (folder / "it.err").read_text() == ""
    assert job.ended(folder, "it") == 0
    assert read_json(folder / "it.json")["job_id"] == "7"


def test_a_command_that_fails_fails_its_job_and_its_words_are_kept(job_folder, fake):
    folder = job_folder("gone.json")
    done = run_task(folder, code=1)
    assert "it ended with " in done.stderr
    assert "gone.json" in job.last_words(folder, "it")
    assert job.ended(folder, "it") not in (0, None)


def test_a_command_outlives_the_warning_and_ends_without_a_word_when_it_is_stopped(job_folder, fake, tmp_path):
    program = (
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGUSR2)\nos.kill(os.getpid(), signal.SIGUSR2)\n"
        "print('alive', flush=True)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(30)\n"
    )
    (tmp_path / "slow.py").write_text(program)
    folder = job_folder(module="slow")
    run_task(folder, code=1, modules=[tmp_path])
    assert (folder / "it.out").read_text() == "alive\n"
    assert job.ended(folder, "it") is None  # Slurm may put the job back, which runs it again


def test_a_task_that_would_run_other_code_refuses(job_folder, fake, tmp_path):
    folder = job_folder("x")
    content = read_json(folder / "job.json")
    write_json(folder / "job.json", {**content, "code": str(tmp_path)})
    assert "should come from the run's own copy" in run_task(folder, code=1).stderr


def test_waiting_shows_what_the_job_writes_and_ends_as_it_does(job_folder, fake, monkeypatch, capsys):
    folder = job_folder("x")
    (job_id,) = job.hold(folder, [job.task(folder, "it")])
    job.release(folder, [job_id])
    turns = iter(range(10))

    def time_passes(_):
        match next(turns):
            case 0:
                (folder / "it.err").write_text("loading\n")
                fake.end(job_id, state="RUNNING")
            case 1:
                (folder / "it.out").write_text("WER 5 %\n")
            case 2:
                (folder / "it.out").write_text("WER 5 %\nall\n")
                fake.write(is_down=True)
            case 3:
                (folder / "it.out").write_text("again\n")  # the job was put back into the queue
            case _:
                fake.write(is_down=False)
                write_json(folder / "it.json", {"exit_code": 3})

    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=time_passes, monotonic=time.monotonic))
    assert remote.follow(folder, "it", job_id) == 3
    said = capsys.readouterr()
    assert said.out == "WER 5 %\nall\nagain\n"
    lines = said.err.splitlines()
    assert lines[:3] == ["job 100: pending, None", "loading", "job 100: running"]
    assert lines[3] == "job 100: unreachable"


def test_waiting_for_a_job_that_is_ended_from_outside_says_so(job_folder, fake, monkeypatch, capsys):
    folder = job_folder("x")
    (job_id,) = job.hold(folder, [job.task(folder, "it")])
    fake.end(job_id, state="TIMEOUT")
    monkeypatch.setattr(remote, "_WORD_S", 0.0)
    monkeypatch.setattr(remote, "_POLL_S", 0.01)
    assert remote.follow(folder, "it", job_id) == 4
    assert "ended from outside (TIMEOUT)" in capsys.readouterr().err


def test_no_array_but_a_cluster_that_has_none(fake, job_folder):
    fake.write(max_array_size=0)
    folder = job_folder("x")
    assert job.hold(folder, [job.task(folder, "it")] * 2) == ["100", "101"]


def test_what_sbatch_would_misread_is_refused_before_it_is_asked(fake, profile, tmp_path):
    cluster = load_cluster(profile)
    with pytest.raises(RecipeError, match="no %"):
        job.parameters_of(cluster, tmp_path / "50%", ROOT, "it")
    with pytest.raises(RecipeError, match="backslash"):
        job.parameters_of(cluster, tmp_path, ROOT, "a\\b")


def test_jobs_are_kept_off_excluded_nodes_also_those_that_were_excluded_since(fake, job_folder, tmp_path):
    folder = job_folder("x")
    job.hold(folder, [job.task(folder, "it")])
    lost = {"since": time.time(), "until": time.time() + 60, "reason": "lost a GPU"}
    exclusions.add(tmp_path / "site", [exclusions.ExcludedNode(host=host, **lost) for host in ("n2", "forgotten")])
    job.hold(folder, [job.task(folder, "it")])
    assert [fake.options(job_id).get("exclude") for job_id in ("100", "101")] == [None, "n2"]


def test_slurm_that_does_not_answer_is_an_error_with_its_words(fake, job_folder):
    folder = job_folder("x")
    fake.write(is_down=True)
    with pytest.raises(SlurmError, match="connect failure"):
        job.hold(folder, [job.task(folder, "it")])


def test_the_recipe_of_the_job_is_the_resolved_one(prepare, pending, folder, tiny_recipe):
    prepare("data.num_proc=1")
    assert (folder / "recipe.yaml").read_text() == dump_recipe(tiny_recipe())
