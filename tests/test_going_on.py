"""How a run goes on after its job, with a Slurm of our own making: in the same job, in another, or not by itself."""

import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from asr_train.files import write_json
from asr_train.run_dir import RunDir
from launch import cli, status
from launch.child import Signals
from launch.ending import starts
from launch.ending.starts import Start
from launch.jobs import continuation, last_word
from launch.jobs.submit import Submission
from launch.node_agent import _stop_reason, _Watch
from launch.site import slurm
from launch.site.cluster import load_cluster
from launch.site.findings import Findings, NodeFacts, SlurmFacts, keep
from launch.site.sbatch import last_word as last_word_lines
from launch.site.settings import ALLOCATION, JobSettings, settings_file
from launch.site.slurm import JobState, SlurmError
from launch.verdict import Verdict

GOES_ON = Verdict(kind="time_limit", action="continue", message="The time limit came.")
NEEDS_A_PERSON = Verdict(kind="recipe", message="model.pretrained: no such model.")


@pytest.fixture
def site(monkeypatch, tmp_path, tiny_recipe):
    """One run with job 7, which is RUNNING and has not been requeued."""

    class Site:
        run = RunDir(tmp_path / "run")
        job = JobState("RUNNING")
        settings = JobSettings(code=tmp_path, cluster_name="test", cluster=load_cluster("test"), continuation="requeue")
        refusal = None

        def __init__(self):
            self.asked = []

        def goes_on(self):
            self.asked.clear()
            return continuation.go_on(self.run, self.settings, "7", GOES_ON, Signals(), restarts=0)

        def start(self, verdict=None, restarts=0):
            start = Start(name=f"7.{restarts}", hosts=("n1", "n2"), processes_per_node=1, time=time.time(), job_id="7")
            start.write(self.run)
            if verdict:
                starts.write_verdict(self.run, start, verdict)

        def speaks(self):
            self.asked.clear()
            last_word.speak(self.run, "7", Signals())
            return self.asked

    site = Site()

    def requeue(job_id, **options):
        site.asked.append("requeue")
        if site.refusal is not None:
            site.job = site.refusal
            raise SlurmError("scontrol: error: no")

    def submit(run, settings, **options):
        site.asked.append(f"submit after {options['after']}")
        return Submission("8", "test", 2, 0.0, "")

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(slurm, "job_state", lambda job_id: site.job)
    monkeypatch.setattr(slurm, "requeue", requeue)
    monkeypatch.setattr(continuation, "submit", submit)
    monkeypatch.setattr(continuation, "_wait_for_the_end", lambda signals: None)
    monkeypatch.setattr(last_word, "notify", lambda run, verdict: site.asked.append(f"notify {verdict.kind}"))
    site.run.make()
    site.run.claim(tiny_recipe(run_dir=str(site.run.path)))
    site.settings.write(site.run)
    return site


def test_a_running_job_is_put_back(site):
    assert site.goes_on()
    assert site.asked == ["requeue"]


def test_a_job_that_slurm_has_put_back_is_left_alone(site):
    site.job = JobState("COMPLETING", restarts=1)
    assert site.goes_on()
    assert site.asked == []


def test_a_job_that_slurm_ended_for_good_is_followed_by_another(site):
    site.job = JobState("COMPLETING")  # its time is up
    assert site.goes_on()
    assert site.asked == ["submit after 7"]


def test_a_job_that_may_not_be_put_back_is_followed_by_another(site):
    site.refusal = JobState("RUNNING")
    assert site.goes_on()
    assert site.asked == ["requeue", "submit after 7"]


def test_a_job_that_is_in_the_queue_in_spite_of_an_error_is_not_followed_by_a_second(site):
    site.refusal = JobState("COMPLETING", restarts=1)
    assert site.goes_on()
    assert site.asked == ["requeue"]


def test_a_start_that_nobody_judged_is_judged_and_goes_on(site):
    site.start()
    assert site.speaks() == ["requeue"]
    assert [line["start"] for line in starts.verdicts(site.run)] == ["7.0"]


def test_an_agent_that_was_killed_between_its_verdict_and_going_on_has_it_done(site):
    site.start(GOES_ON)
    assert site.speaks() == ["requeue"]
    assert len(list(starts.verdicts(site.run))) == 1


def test_a_verdict_that_needs_a_person_stands(site):
    site.start(NEEDS_A_PERSON)
    assert site.speaks() == []


def test_another_job_that_follows_is_enough(site):
    site.start(GOES_ON)
    entry = {"job_id": "8", "cluster": "test", "num_nodes": 2, "submitted": 2.0, "code": "/code"}
    write_json(site.run.path / "jobs" / "8.json", entry)
    assert site.speaks() == []


def test_nothing_is_said_for_agents_that_never_began_or_a_job_that_slurm_is_ending(site):
    assert site.speaks() == []
    site.start()
    site.job = JobState("COMPLETING")
    assert site.speaks() == []
    site.job = JobState("RUNNING", restarts=1)


def test_nothing_is_said_for_the_start_before(site, monkeypatch):
    site.start()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert site.speaks() == []


def test_cancel_ends_a_job_that_is_on_its_way_back_into_the_queue_too(site, monkeypatch, capsys):
    """scancel says nothing there, and the job comes back."""
    site.start(GOES_ON)
    entry = {"job_id": "7", "cluster": "test", "num_nodes": 2, "submitted": 2.0, "code": "/code"}
    write_json(site.run.path / "jobs" / "7.json", entry)
    states = ["COMPLETING", "COMPLETING", "PENDING", "CANCELLED"]
    monkeypatch.setattr(slurm, "job_state", lambda job_id: JobState(states.pop(0), restarts=1))
    monkeypatch.setattr(slurm, "cancel", lambda job_id: site.asked.append(f"cancel {states[0]}"))
    monkeypatch.setattr(status, "_POLL_S", 0.0)
    assert cli.main(["cancel", str(site.run.path)]) == 0
    assert site.asked == ["cancel COMPLETING", "cancel PENDING", "cancel CANCELLED"]
    assert "job 7 cancelled" in capsys.readouterr().out


def test_cancel_does_not_wait_for_a_job_that_takes_its_time_to_end(site, monkeypatch):
    site.start()
    entry = {"job_id": "7", "cluster": "test", "num_nodes": 2, "submitted": 2.0, "code": "/code"}
    write_json(site.run.path / "jobs" / "7.json", entry)
    monkeypatch.setattr(slurm, "cancel", site.asked.append)
    assert cli.main(["cancel", str(site.run.path)]) == 0
    assert site.asked == ["7"]


def test_a_run_that_was_not_submitted_is_not_tried_again_as_a_job(site, capsys):
    """Nobody said which cluster; and there an allocation's settings are none."""
    replace(site.settings, cluster_name=ALLOCATION).write(site.run)
    assert cli.main(["retry", str(site.run.path)]) == 2
    assert "in an allocation. The same `wavefleet train` goes on" in capsys.readouterr().err
    settings_file(site.run).unlink()
    assert cli.main(["retry", str(site.run.path)]) == 2
    said = capsys.readouterr().err
    assert "on this machine. The same `wavefleet train` goes on" in said
    assert f"`wavefleet submit RECIPE run_dir={site.run.path} --cluster P`" in said


@pytest.mark.parametrize(("asked", "expected"), [("auto", "successor"), ("requeue", "requeue")])
def test_a_retry_goes_on_as_doctor_found_meanwhile(site, monkeypatch, tmp_path, asked, expected):
    shared = str(tmp_path / "shared")
    cluster = replace(site.settings.cluster, nodes=1, continuation=asked, shared=shared)
    replace(site.settings, cluster=cluster).write(site.run)
    facts = SlurmFacts(
        version="22.05", proctrack=None, kill_wait_s=None, preempt_type=None, sends_user_signal=False,
        job_requeue=None, max_array_size=None, accounting_problem=None, partitions=(),
    )  # fmt: skip
    node = NodeFacts(
        time=1.8e9, job_id="7", node="n1", addresses=(), address="n1", here=(), requeue_problem="scontrol: denied",
        sbatch_problem=None, shared_problem=None, seen_after_s=0.0, python="3.11",
    )  # fmt: skip
    keep(cluster, "test", Findings(time=1.8e9, slurm=facts, refused=None, expected_start=None, node=node))
    submitted = []
    monkeypatch.setattr(
        "launch.jobs.submit.submit",
        lambda run, settings: submitted.append(settings) or Submission("8", "test", 2, 0.0, ""),
    )
    monkeypatch.setattr(slurm, "jobs_with_comment", lambda comment: [])
    assert cli.main(["retry", str(site.run.path)]) == 0
    assert [settings.continuation for settings in submitted] == [expected]


@pytest.mark.parametrize(
    ("command", "code", "speaks"), [("true", 0, False), ("exit 3", 3, True), ("kill -TERM $$; exit 143", 143, False)]
)
def test_a_batch_script_speaks_when_srun_fails_unless_slurm_is_ending_it(tmp_path, monkeypatch, command, code, speaks):
    """The run's path has spaces and quotes, and a dollar."""
    run = tmp_path / "my 'run' $HOME"
    monkeypatch.setattr("launch.site.sbatch.python_command", lambda cluster: "echo")
    lines = ["set -e", *last_word_lines(load_cluster("test"), run), f"( {command} )" if code == 3 else command]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout == (f"-m launch.jobs.last_word {run}\n" if speaks else "")


@pytest.mark.parametrize(("lead_s", "waits_s"), [(90, 60), (600, 540)])
def test_ranks_that_do_not_end_after_the_warning_are_ended_in_time_for_going_on(
    site, monkeypatch, capsys, lead_s, waits_s
):
    signals = Signals()
    meeting = SimpleNamespace(beat=lambda: None)
    settings = replace(site.settings, cluster=replace(site.settings.cluster, signal_lead_s=lead_s))
    node = SimpleNamespace(run=site.run, settings=settings, signals=signals, meeting=meeting)
    watch = _Watch(node, SimpleNamespace(look=lambda: False))
    assert not watch(None)
    signals.first, signals.time = signal.SIGUSR2, time.time() - waits_s + 5
    assert not watch(None)
    assert (site.run.control / "stop").exists()
    signals.time = time.time() - waits_s - 5
    assert watch(None)
    assert "have not saved and ended in time" in capsys.readouterr().err
    signals.first = signal.SIGTERM  # of somebody who may wait
    assert not watch(None)


@pytest.mark.parametrize(("down", "expected"), [([], "preempted"), (["n2"], "SIGTERM")])
def test_a_job_that_slurm_put_back_was_preempted_unless_a_node_of_it_is_down(site, monkeypatch, down, expected):
    site.job = JobState("COMPLETING", restarts=1)
    monkeypatch.setattr(slurm, "unusable", lambda hosts: down)
    signals, start = Signals(), SimpleNamespace(hosts=("n1", "n2"))
    signals.first = signal.SIGTERM
    assert _stop_reason(SimpleNamespace(signals=signals, job_id="7", restarts=0, start=start)) == expected


@pytest.mark.parametrize(
    ("ran", "limit", "is_overdue"),
    [
        ("00:02:00", "00:02:00", True),
        ("1-00:00:17", "1-00:00:00", True),
        ("23:59:59", "1-00:00:00", False),
        ("9-00:00:00", "UNLIMITED", False),
        ("", "", False),
    ],
)
def test_whether_a_job_ran_for_its_whole_time(monkeypatch, ran, limit, is_overdue):
    said = {"squeue": "COMPLETING|None|N/A|n1", "scontrol": f"JobId=7 RunTime={ran} TimeLimit={limit} Restarts=0"}
    monkeypatch.setattr(slurm, "run", lambda *command: said[command[0]])
    assert slurm.job_state("7").is_overdue == is_overdue
