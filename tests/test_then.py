"""What follows a run that is done: asked for once, waits over retries and successors, says why it does nothing."""

import pytest
import yaml
from fake_slurm import FakeSlurm

from asr_train.errors import RecipeError
from asr_train.files import read_json, write_json
from asr_train.run_dir import RunDir
from launch import cli
from launch.jobs import job, then
from launch.jobs.job import Command, CommandError
from launch.site.slurm import SlurmError
from launch.status import describe

PROFILE = {"nodes": 2, "gpus_per_node": 2, "cpus_per_node": 4, "time": 60, "signal_lead_s": 60}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "fake", monkeypatch)


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def submit(fake, run, tmp_path, tiny_recipe_file):
    """`wavefleet submit` of the tiny recipe, with further arguments."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    recipe = str(tiny_recipe_file(units_per_step=4))

    def submit(*arguments, code=0):
        assert cli.main(["submit", recipe, f"run_dir={run.path}", "--cluster", str(profile), *arguments]) == code

    return submit


@pytest.fixture
def ran(monkeypatch):
    """Commands that were run, in place of running them; name -> exit code in `codes`."""
    found = []

    def run_command(folder, command):
        found.append(command)
        return run_command.codes.get(command.name, 0)

    run_command.codes = {}
    monkeypatch.setattr(job, "run_command", run_command)
    monkeypatch.setattr(then, "check_running", lambda code: None)
    return found, run_command.codes


def state(run):
    found = then.describe(run)
    return found["state"], found["job_id"]


def start(fake, job_id, *ended):
    """The job of what follows starts, which Slurm lets it when those have ended."""
    for other in ended:
        fake.end(other)
    fake.end(job_id, state="RUNNING")


def test_it_waits_for_the_runs_job_on_one_node_and_is_shown(submit, fake, run):
    submit("--then", "evaluate,export")
    assert sorted(fake.jobs) == ["100", "101"]
    asked = fake.options("101")
    assert (asked["dependency"], asked["kill-on-invalid-dep"]) == ("afterany:100", "yes")
    assert (asked["nodes"], asked["gres"]) == ("1", "gpu:1")
    assert not any(entry["held"] for entry in fake.jobs.values())
    assert describe(run)["then"] == {
        "verbs": "evaluate,export", "state": "waiting", "job_id": "101", "message": "for job 100",
    }  # fmt: skip


def test_it_runs_every_verb_on_a_run_that_is_done(submit, fake, run, ran):
    commands, _ = ran
    submit("--then", "evaluate,export")
    write_json(run.done, {"step": 4})
    start(fake, "101", "100")
    then.run_task(run.path)
    assert commands == [Command(verb, f"asr_train.{verb}", (str(run.path),)) for verb in ("evaluate", "export")]
    assert state(run) == ("done", "101")


def test_one_that_fails_keeps_no_other_from_running_and_is_told(submit, fake, run, ran):
    commands, codes = ran
    codes["evaluate"] = 4
    submit("--then", "evaluate,export")
    write_json(run.done, {"step": 4})
    start(fake, "101", "100")
    with pytest.raises(CommandError, match="evaluate ended with 4"):
        then.run_task(run.path)
    assert [command.name for command in commands] == ["evaluate", "export"]
    assert state(run) == ("failed", "101")
    assert "evaluate ended with 4" in describe(run)["then"]["message"]


def test_a_run_that_goes_on_as_the_same_job_or_another_is_waited_for_again(submit, fake, run, ran):
    commands, _ = ran
    submit("--then", "evaluate")
    record = read_json(run.path / "jobs" / "100.json")
    start(fake, "101")  # the run's job is in the queue again
    then.run_task(run.path)
    assert fake.options("102")["dependency"] == "afterany:100"
    assert state(run) == ("waiting", "102")
    fake.write(jobs={**fake.jobs, "200": {**fake.jobs["100"], "state": "RUNNING"}})
    write_json(run.path / "jobs" / "200.json", {**record, "job_id": "200", "submitted": record["submitted"] + 9})
    start(fake, "102", "100", "101")
    then.run_task(run.path)
    (last,) = set(fake.jobs) - {"100", "101", "102", "200"}
    assert fake.options(last)["dependency"] == "afterany:200"
    assert not fake.jobs[last]["held"]
    assert commands == []


def test_a_run_that_failed_is_left_until_it_is_retried(submit, fake, run, ran, capsys):
    commands, _ = ran
    submit("--then", "export")
    write_json(run.path / "attempts" / "attempt-001.json", {"attempt": 1})
    run.write_outcome(1, 0, {"status": "failed", "exit_code": 4, "message": "the corpus is gone"})
    start(fake, "101", "100")
    then.run_task(run.path)
    assert commands == []
    assert state(run) == ("left", "101")
    assert "the run is not done: the corpus is gone" in describe(run)["then"]["message"]
    fake.end("101")
    assert cli.main(["retry", str(run.path)]) == 0
    assert fake.options("103")["dependency"] == "afterany:102"
    assert state(run) == ("waiting", "103")


def test_a_cluster_whose_nodes_cannot_submit_is_said(submit, fake, run, ran):
    submit("--then", "export")
    fake.write(refuse="dependency=")
    start(fake, "101")
    with pytest.raises(SlurmError):
        then.run_task(run.path)
    assert state(run) == ("lost", "101")
    assert "goes on as job 100, which could not be waited for" in describe(run)["then"]["message"]


def test_asking_again_is_one_job_and_asking_later_is_possible(submit, fake, run, capsys):
    submit()
    assert describe(run)["then"] is None
    submit("--then", "export")
    submit("--then", "export")
    submit()
    assert sorted(fake.jobs) == ["100", "101"]
    assert fake.options("101")["dependency"] == "afterany:100"
    assert state(run) == ("waiting", "101")


class KilledError(BaseException):
    """In place of SIGKILL: nothing catches it."""


@pytest.mark.parametrize("place", ["launch.jobs.submit._note", "launch.site.slurm.release"])
@pytest.mark.parametrize("who", ["submit", "retry", "reconcile"])
def test_a_job_whose_submitter_was_killed_is_let_go_and_followed(submit, fake, run, monkeypatch, place, who):
    """Before it wrote the job down, or before it let it go."""

    def die(*_):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(place, die)
        submit("--then", "export")
    assert fake.jobs["100"]["held"]
    again = {"retry": ["retry", str(run.path)], "reconcile": ["reconcile", str(run.path.parent), "--act"]}
    assert (submit() if who == "submit" else cli.main(again[who])) in (None, 0)
    assert sorted(fake.jobs) == ["100", "101"]
    assert not any(entry["held"] for entry in fake.jobs.values())
    assert fake.options("101")["dependency"] == "afterany:100"
    assert state(run) == ("waiting", "101")


def test_asking_for_something_else_replaces_what_waits(submit, fake, run):
    submit("--then", "export")
    submit("--then", "evaluate,export")
    assert fake.jobs["101"]["state"] == "CANCELLED"
    assert [command.name for command in job.commands(then.folder_of(run))] == ["evaluate", "export"]
    assert state(run) == ("waiting", "102")


def test_a_controller_that_is_down_when_it_starts_is_said(submit, fake, run, ran):
    submit("--then", "export")
    start(fake, "101")
    fake.write(is_down=True)
    with pytest.raises(SlurmError):
        then.run_task(run.path)
    assert state(run) == ("lost", "101")
    assert "is not done, and a job of it could not be waited for: " in then.describe(run)["message"]


def test_where_slurm_refuses_it_the_run_is_submitted_all_the_same(submit, fake, run, capsys):
    fake.write(refuse="dependency=")
    submit("--then", "export")
    said = capsys.readouterr()
    assert "submitted as job 100" in said.out
    assert "what should follow the run was not submitted" in said.err
    fake.write(refuse=None)
    submit("--then", "export")
    assert state(run) == ("waiting", "101")


def test_a_job_that_was_cancelled_is_shown_as_gone(submit, fake, run):
    submit("--then", "export")
    fake.end("101", state="CANCELLED")
    assert describe(run)["then"]["state"] == "gone"
    fake.write(is_down=True)
    assert describe(run)["then"]["state"] == "waiting"  # what was written down last


def test_only_what_can_follow_is_taken(submit, fake, capsys):
    assert then.read_verbs("export, evaluate,export") == ("export", "evaluate")
    with pytest.raises(RecipeError, match="'fly', '' cannot; these can: evaluate, export"):
        then.read_verbs("export,fly,")
    submit("--then", "transcribe", code=2)
    assert fake.jobs == {}
