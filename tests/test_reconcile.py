"""`wavefleet reconcile`: what it finds to do about runs whose jobs are gone, with a Slurm of our own making."""

import json
import time

import pytest

from asr_train.files import write_json
from asr_train.run_dir import RunDir
from launch import cli
from launch.ending import starts
from launch.ending.starts import Start
from launch.jobs import reconcile, submit
from launch.site import slurm
from launch.site.cluster import load_cluster
from launch.site.settings import ALLOCATION, JobSettings
from launch.site.slurm import JobState, SlurmError
from launch.verdict import Exclusion, Verdict

GOES_ON = Verdict(kind="time_limit", action="continue", message="The time limit came.")
FAILED = Verdict(kind="data", action="stop", message="Rank 0 failed: shard 3 is gone.")


@pytest.fixture
def site(monkeypatch, tmp_path, tiny_recipe):
    """A folder of runs, and the jobs that Slurm knows: {job id: (state, reason)}; what was asked of Slurm."""

    class Site:
        def __init__(self):
            self.folder = tmp_path / "runs"
            self.jobs, self.unwritten, self.asked = {}, {}, []

        def run(self, name, *, job="7", continuation="requeue", started=True, verdict=None, cluster="test"):
            run = RunDir(self.folder / name)
            run.make()
            run.claim(tiny_recipe(run_dir=str(run.path)))
            settings = JobSettings(
                code=tmp_path, cluster_name=cluster, cluster=load_cluster("test"), continuation=continuation
            )
            settings.write(run)
            if job and cluster == "test":
                entry = {"job_id": job, "cluster": "test", "num_nodes": 2, "submitted": 1.0, "code": "/code"}
                write_json(run.path / "jobs" / f"{job}.json", entry)
            if started:
                start = Start(name=f"{job}.0", hosts=("n1", "n2"), processes_per_node=1, time=time.time(), job_id=job)
                start.write(run)
                if verdict:
                    starts.write_verdict(run, start, verdict)
            return run

        def reconcile(self, *options, code=0):
            self.asked.clear()
            assert cli.main(["reconcile", str(self.folder), *options, "--json"]) == code
            return [(entry["action"], entry["why"]) for entry in json.loads(self.out())]

    site = Site()

    def job_state(job_id):
        if site.jobs.get(job_id) == "silence":
            raise SlurmError("squeue: error: Unable to contact slurm controller")
        state, reason = site.jobs.get(job_id, ("UNKNOWN", ""))
        return JobState(state, reason)

    def fake_submit(run, settings, *, exclude=()):
        site.asked.append(("submit", run.path.name, list(exclude)))
        return submit.Submission("99", settings.cluster_name, 2, 0.0, "")

    monkeypatch.setattr(slurm, "job_state", job_state)
    monkeypatch.setattr(slurm, "jobs_with_comment", lambda comment: site.unwritten.get(comment, []))
    monkeypatch.setattr(slurm, "release", lambda job_id: site.asked.append(("release", job_id)))
    monkeypatch.setattr(reconcile, "submit", fake_submit)
    monkeypatch.setenv("HOME", str(tmp_path))  # where what is learned of a cluster is kept
    site.folder.mkdir()
    return site


@pytest.fixture(autouse=True)
def output(site, capsys):
    site.out = lambda: capsys.readouterr().out


def test_a_run_that_should_have_gone_on_is_submitted_again_without_its_bad_nodes(site):
    bad = Exclusion(host="n2", until=0.0, reason="Xid 79")
    verdict = Verdict(kind="hardware", action="continue", message="Hardware error on n2.", exclude_hosts=(bad,))
    site.run("a", verdict=verdict)
    site.jobs["7"] = ("FAILED", "")
    assert site.reconcile() == [("submit", "hardware: Hardware error on n2.")]
    assert site.asked == []  # only said
    site.reconcile("--act")
    assert site.asked == [("submit", "a", ["n2"])]


def test_a_job_that_died_with_its_agents_is_judged_by_what_is_known(site):
    run = site.run("a")
    site.jobs["7"] = ("NODE_FAIL", "")
    [(action, why)] = site.reconcile()
    assert (action, why.split(":")[0]) == ("submit", "node_failure")
    assert list(starts.verdicts(run)) == []
    site.reconcile("--act")
    assert [line["kind"] for line in starts.verdicts(run)] == ["node_failure"]


def test_what_needs_a_person_is_left_to_one(site):
    site.run("failed", verdict=FAILED)
    site.run("by hand", job="8", continuation="none", verdict=GOES_ON)
    site.run("cancelled in the queue", job="9", started=False)
    site.jobs = {"7": ("FAILED", ""), "8": ("TIMEOUT", ""), "9": ("CANCELLED", "")}
    found = site.reconcile("--act")
    assert [action for action, _ in found] == ["nothing"] * 3
    assert site.asked == []
    assert "job 9 ended as CANCELLED before it began" in found[1][1]


def test_a_job_cancelled_in_the_queue_is_not_brought_back_by_an_older_verdict(site):
    run = site.run("a", verdict=GOES_ON)
    entry = {"job_id": "8", "cluster": "test", "num_nodes": 2, "submitted": 2.0, "code": "/code"}
    write_json(run.path / "jobs" / "8.json", entry)
    site.jobs = {"7": ("COMPLETED", ""), "8": ("CANCELLED", "")}
    assert site.reconcile("--act")[0][0] == "nothing"
    assert site.asked == []


def test_a_run_of_somebodys_own_batch_job_is_not_submitted_beside_it(site):
    """It may be in the queue, to go on after its time limit, and nobody wrote its number down."""
    site.run("a", cluster=ALLOCATION, verdict=GOES_ON)
    assert site.reconcile("--act") == [("nothing", "it was trained in an allocation, and goes on there")]
    assert site.asked == []


def test_live_jobs_are_left_alone_and_held_ones_let_go(site):
    site.run("a")
    site.run("b", job="8")
    site.jobs = {"7": ("RUNNING", "None"), "8": ("PENDING", "JobHeldUser")}
    assert [action for action, _ in site.reconcile("--act")] == ["nothing", "release"]
    assert site.asked == [("release", "8")]


def test_a_job_that_nobody_wrote_down_is_adopted(site):
    run = site.run("a", job=None, started=False)
    site.unwritten = {f"wavefleet:{run.run_id}": ["5"]}
    assert site.reconcile() == [("adopt", "job 5 was submitted for it and never written down")]
    assert submit.submissions(run) == []
    site.reconcile("--act")
    assert [entry.job_id for entry in submit.submissions(run)] == ["5"]
    assert site.asked == [("release", "5")]


def test_one_run_that_cannot_be_looked_after_does_not_keep_the_others(site):
    site.run("a", verdict=GOES_ON)
    site.run("b", job="8", verdict=GOES_ON)
    site.jobs = {"7": "silence", "8": ("TIMEOUT", "")}
    found = site.reconcile("--act", code=4)
    assert [action for action, _ in found] == ["failed", "submit"]
    assert "Unable to contact" in found[0][1]


def test_two_at_once_do_not_submit_twice(site, capsys):
    site.run("a", verdict=GOES_ON)
    site.jobs["7"] = ("TIMEOUT", "")
    with reconcile._alone(site.folder) as is_alone:
        assert is_alone
        assert cli.main(["reconcile", str(site.folder), "--act"]) == 0
    assert site.asked == []
    assert "another reconcile" in capsys.readouterr().err
