"""Nodes that jobs are kept off: who adds them, how long, who sees them, and what Slurm does about it."""

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from asr_train.errors import RecipeError
from asr_train.files import write_json
from launch.jobs import job
from launch.jobs.job import Command
from launch.site import exclusions, nodes, slurm
from launch.site.cluster import load_cluster
from launch.site.exclusions import ExcludedNode
from launch.site.slurm import SlurmError
from launch.verdict import Exclusion, Line, Policy, Verdict

HOUR = 3600.0


def node(host="n2", until=None, **more):
    return ExcludedNode(host=host, since=time.time(), until=time.time() + HOUR if until is None else until, **more)


def bad(host="n2", reason="3 of 4 GPUs answer"):
    return node(host, reason=reason)


# The store


def test_a_node_is_excluded_until_its_time_is_up(tmp_path):
    exclusions.add(tmp_path, [bad("n2"), bad("n1")])
    assert [entry.host for entry in exclusions.live(tmp_path)] == ["n1", "n2"]
    assert exclusions.live(tmp_path, now=time.time() + HOUR + 1) == []


def test_a_node_that_is_excluded_for_longer_stays_so(tmp_path):
    exclusions.add(tmp_path, [node(until=time.time() + 9 * HOUR, reason="being repaired")])
    exclusions.add(tmp_path, [bad("n2")])
    assert [entry.reason for entry in exclusions.live(tmp_path)] == ["being repaired"]


def test_a_node_whose_time_was_up_is_excluded_again(tmp_path):
    exclusions.add(tmp_path, [node(until=time.time() - 1, reason="before")])
    exclusions.add(tmp_path, [bad("n2", "again")])
    assert [entry.reason for entry in exclusions.live(tmp_path)] == ["again"]


def test_removing_says_whether_it_was_excluded(tmp_path):
    exclusions.add(tmp_path, [bad("n2"), node("n3", until=time.time() - 1, reason="long ago")])
    assert [exclusions.remove(tmp_path, host) for host in ("n2", "n2", "n3", "n9", "../n2")] == [True, *[False] * 4]
    assert exclusions.live(tmp_path) == []


def test_names_cannot_leave_the_folder(tmp_path):
    for host in ("../n1", "a/b", "", ".n", "n1 n2"):
        with pytest.raises(RecipeError, match="no name of a node"):
            exclusions.add(tmp_path / "site", [bad(host)])
    assert list(tmp_path.rglob("*.json")) == []


def test_a_damaged_file_costs_no_other_node(tmp_path):
    exclusions.add(tmp_path, [bad("n1"), bad("n2"), bad("n3")])
    folder = tmp_path / exclusions.FOLDER
    (folder / "n1.json").write_text('{"host": "n1", "unti')
    write_json(folder / "n2.json", ["n2"])
    write_json(folder / "n4.json", {"host": "n4", "until": "soon"})
    write_json(folder / "n5.json", {"host": "n5 --nodelist=n1", "since": 0, "until": 5e9, "reason": ""})
    write_json(folder / "n6.json", {"reason": "no host"})
    assert [entry.host for entry in exclusions.live(tmp_path)] == ["n3"]
    exclusions.add(tmp_path, [bad("n1")])
    assert [entry.host for entry in exclusions.live(tmp_path)] == ["n1", "n3"]


def test_what_a_later_version_adds_is_passed_over(tmp_path):
    exclusions.add(tmp_path, [bad("n1")])
    path = tmp_path / exclusions.FOLDER / "n1.json"
    write_json(path, {**json.loads(path.read_text()), "severity": 3})
    assert [entry.host for entry in exclusions.live(tmp_path)] == ["n1"]


def test_agents_that_add_at_the_same_time_lose_nothing(tmp_path):
    hosts = [f"n{number}" for number in range(20)]
    threads = [threading.Thread(target=exclusions.add, args=(tmp_path, [bad(host)])) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.host for entry in exclusions.live(tmp_path)} == set(hosts)


def test_a_verdict_brings_the_evidence_against_each_node(tmp_path):
    verdict = Verdict(
        kind="preflight",
        evidence=(Line(text="the disk is full", host="n2"), Line(text="no GPU", host="n3"), Line(text="rank 0 waited")),
        exclude_hosts=(Exclusion(host="n2", until=5e9, reason="the disk is full"),),
    )
    exclusions.add(tmp_path, exclusions.of_verdict(verdict, tmp_path / "run"))
    (found,) = exclusions.live(tmp_path)
    assert (found.host, found.until, found.evidence) == ("n2", 5e9, ("the disk is full",))
    assert found.run == str(tmp_path / "run")


@pytest.mark.parametrize(("text", "expected"), [("30m", 1800), ("24h", 86_400), ("7d", 604_800), (" 2 h", 7200)])
def test_times(text, expected):
    assert exclusions.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "5", "0h", "1w", "-1h", "1.5h"])
def test_times_that_are_none(text):
    with pytest.raises(RecipeError, match="24h"):
        exclusions.seconds(text)


# Room


@pytest.mark.parametrize(
    ("partition", "num_nodes", "excluded", "expected"),
    [
        (8, 2, [], 4),  # the policy's own
        (4, 2, [], 2),
        (4, 2, ["n1"], 2),
        (4, 4, [], 0),
        (4, 2, ["n1", "n2", "n3"], 3),  # too many already: no more
        (4, 2, ["x1"], 3),  # of another partition
    ],
)
def test_no_more_nodes_may_be_excluded_than_leave_enough_for_the_job(partition, num_nodes, excluded, expected):
    names = [f"n{number + 1}" for number in range(partition)]
    found = exclusions.policy(Policy(), [bad(host) for host in excluded], names, num_nodes)
    assert found.max_excluded_hosts == expected


SITE = "n1|idle|a100,ib\nn2|mixed|a100\nn3|down*|a100,ib\nn4|drained|a100,ib\nn5|allocated|v100,ib\nn6|idle|(null)\n"


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (None, "n1 n2 n5 n6"),
        ("a100", "n1 n2"),
        ("a100&ib", "n1"),
        ("a100,ib", "n1"),
        ("a100&ib|v100", "n1 n5"),
        ("h100", ""),
        ("[a100|v100]", "n1 n2 n5"),  # any of them, though a job takes nodes of one kind
        ("(v100|h100)&ib", "n1 n5"),  # as above
        ("a100*2&ib*1", "n1 n2 n5"),
    ],
)
def test_room_is_nodes_that_are_up_and_have_what_the_job_wants(monkeypatch, constraint, expected):
    monkeypatch.setattr(slurm, "run", lambda *command: SITE)
    assert slurm.usable_nodes("batch", constraint) == set(expected.split())


def test_a_job_that_waits_for_nodes_that_are_down_is_not_refused_for_those_excluded(monkeypatch):
    """It would wait all the same, and begins when they are back."""
    monkeypatch.setattr(slurm, "run", lambda *command: SITE)
    slurm.check_room("batch", 3, ["n1"])
    slurm.check_room("batch", 5, ["n1"])
    with pytest.raises(SlurmError, match="needs 2 of the 2 nodes of batch with a100 that are up, and n2 of them is"):
        slurm.check_room("batch", 2, ["n2", "n3"], constraint="a100")


# The verb


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(f"gpus_per_node: 0\ncpus_per_node: 1\ntime: 30\nnodes: 2\nshared: {tmp_path / 'shared'}\n")
    return str(path)


@pytest.fixture
def known(monkeypatch):
    """Slurm knows three nodes."""
    states = {"n1": "idle", "n2": "down: fan", "n3": "idle"}
    monkeypatch.setattr(slurm, "node_states", lambda partition=None: states)


def test_nodes_lists_adds_and_removes(profile, known, capsys):
    assert nodes.main(["--cluster", profile]) == 0
    assert "no node is excluded" in capsys.readouterr().out
    nodes.main(["--cluster", profile, "--add", "n2", "--reason", "loses [its] GPUs", "--for", "2h"])
    said = capsys.readouterr().out
    assert "loses [its] GPUs" in said
    assert "down: fan" in said
    assert "by hand" in said
    nodes.main(["--cluster", profile, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["host"], row["reason"], row["slurm"]) == ("n2", "loses [its] GPUs", "down: fan")
    assert 7100 < row["until"] - time.time() <= 7200
    nodes.main(["--cluster", profile, "--remove", "n2"])
    assert "no node is excluded" in capsys.readouterr().out


def test_a_person_may_shorten_an_exclusion(profile, known, capsys):
    nodes.main(["--cluster", profile, "--add", "n2", "--reason", "a", "--for", "7d"])
    capsys.readouterr()
    nodes.main(["--cluster", profile, "--add", "n2", "--reason", "b", "--for", "1h", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["reason"] == "b"
    assert row["until"] - time.time() <= HOUR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "n2"], "--reason"),
        (["--add", "n2", "--reason", " "], "--reason"),
        (["--reason", "because"], "--add HOST"),
        (["--add", "n22", "--reason", "x"], "no node n22; did you mean n2"),
        (["--add", "n2", "--reason", "x", "--for", "long"], "24h"),
        (["--remove", "n3"], "n3 is not excluded"),
    ],
)
def test_what_nodes_refuses(profile, known, arguments, message):
    with pytest.raises(RecipeError, match=message):
        nodes.main(["--cluster", profile, *arguments])


def test_nodes_works_while_slurm_does_not_answer(profile, monkeypatch, capsys):
    def dead(partition=None):
        raise SlurmError("sinfo did not answer")

    monkeypatch.setattr(slurm, "node_states", dead)
    assert nodes.main(["--cluster", profile, "--add", "n2", "--reason", "x", "--json"]) == 0
    said = capsys.readouterr()
    assert "sinfo did not answer" in said.err
    assert json.loads(said.out)[0]["slurm"] is None


# The real Slurm


@pytest.fixture
def inside(slurm_session, monkeypatch):
    """Slurm's commands, here, are those of the test cluster."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm_session.environ[name])


def test_slurm_is_not_told_of_nodes_that_it_does_not_know(slurm, inside, tmp_path):
    """sbatch refuses a job for the name of a node that was taken out of the cluster."""
    exclusions.add(tmp_path, [bad("n1"), bad("gone7")])
    hosts = exclusions.to_avoid(tmp_path, None, 3)
    assert hosts == ["n1"]
    job = slurm.submit(f"--exclude={','.join(hosts)}", "--nodes=3", "--wrap", "hostname")
    assert slurm.wait_for(job, "COMPLETED")["NodeList"] == "n[2-4]"


def test_a_job_for_which_too_few_nodes_are_left_is_refused(slurm, inside, tmp_path):
    exclusions.add(tmp_path, [bad("n1"), bad("n2")])
    assert exclusions.to_avoid(tmp_path, "urgent", 2) == ["n1", "n2"]
    with pytest.raises(SlurmError, match="needs 3 of the 4 nodes of batch that are up, and n1, n2 of them are"):
        exclusions.to_avoid(tmp_path, None, 3)


def test_room_is_what_this_slurm_says_of_its_nodes(slurm, inside, tmp_path):
    slurm.run("scontrol", "update", "NodeName=n[1-3]", "AvailableFeatures=a100,ib")
    try:
        slurm.run("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
        exclusions.add(tmp_path, [bad("n1")])
        assert exclusions.to_avoid(tmp_path, None, 2) == ["n1"]
        with pytest.raises(SlurmError, match="needs 2 of the 2 nodes of batch with a100&ib that are up, and n1 of"):
            exclusions.to_avoid(tmp_path, None, 2, "a100&ib")
        assert exclusions.to_avoid(tmp_path, None, 1, "a100&ib") == ["n1"]
        assert exclusions.to_show(tmp_path, None, 2, "a100&ib") == ["n1"]
        cluster = replace(load_cluster("test"), nodes=1)
        text = job.batch_text(cluster, tmp_path, tmp_path / "job", "it")
        assert "#SBATCH --exclude=n1\n" in text
    finally:
        slurm.reconfigure()  # as slurm.conf has it


def test_jobs_that_are_no_trainings_are_kept_off_them_too(slurm, inside, profile, tmp_path):
    exclusions.add(tmp_path / "site", [bad("n1")])
    folder, cluster = tmp_path / "job", load_cluster(profile)
    job.make_folder(folder, cluster)
    job.write_job(folder, cluster, tmp_path / "site", Path.cwd(), "it", [Command("it", "json.tool", ())])
    (job_id,) = job.hold(folder, [job.task(folder, "it")])
    assert slurm.job(job_id)["ExcNodeList"] == "n1"
    job.drop([job_id])


def task(tmp_path, call):
    """A job's script: a task a node; the first, on the job's first start, calls a function about its own job."""
    path = tmp_path / "task.py"
    path.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(Path.cwd())!r})\n"
        "from launch.site import slurm\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)  # as the node agent, which ends its training first\n"
        "job, again = os.environ['SLURM_JOB_ID'], os.environ.get('SLURM_RESTART_COUNT', '0')\n"
        "try:\n"
        "    if os.environ['SLURM_NODEID'] == '0':\n"
        f"        {call}\n"
        "        print(f'begun {again}', flush=True)\n"
        "except slurm.SlurmError as error:\n"
        "    print(f'refused: {error}', flush=True)\n"
        "while True:\n"
        "    time.sleep(0.1)\n"
    )
    return ("--wrap", f"exec srun {sys.executable} {path}")


def test_a_job_that_is_requeued_comes_back_without_the_node_that_failed(slurm, tmp_path):
    """From inside the job, as the node agent does it, while Slurm ends it."""
    job = slurm.submit("--requeue", "--nodes=3", *task(tmp_path, "again == '0' and slurm.requeue(job, exclude=['n2'])"))
    back = slurm.wait_for(job, "RUNNING", restarts=1)
    assert (back["NodeList"], back["ExcNodeList"]) == ("n[1,3-4]", "n2")
    slurm.run("scontrol", "requeue", job)  # as after a preemption: the list stays
    assert slurm.wait_for(job, "RUNNING", restarts=2)["NodeList"] == "n[1,3-4]"


def test_a_node_whose_exclusion_has_ended_is_taken_again(slurm, tmp_path):
    call = "slurm.requeue(job, exclude=['n1']) if again == '0' else again == '1' and slurm.requeue(job, exclude=['n3'])"
    job = slurm.submit("--requeue", "--nodes=3", *task(tmp_path, call))
    assert slurm.wait_for(job, "RUNNING", restarts=1)["NodeList"] == "n[2-4]"
    assert slurm.wait_for(job, "RUNNING", restarts=2)["NodeList"] == "n[1-2,4]"


def test_a_job_that_is_requeued_for_later_waits(slurm, tmp_path):
    """Longer than Slurm makes it wait anyway, seconds here."""
    asked = tmp_path / "asked"
    write = f"open({str(asked)!r}, 'w').write(str(time.time()))"
    call = f"again == '0' and ({write}, slurm.requeue(job, begin_in_s=20))"
    job = slurm.submit("--requeue", *task(tmp_path, call))
    back = slurm.wait_for(job, "RUNNING", restarts=1)
    assert back["ExcNodeList"] == "(null)"
    begun = time.mktime(time.strptime(back["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert begun - float(asked.read_text()) > 18  # Slurm's times are whole seconds


def test_a_job_is_not_requeued_into_a_wait_without_end(slurm, tmp_path):
    job = slurm.submit("--requeue", "--nodes=2", *task(tmp_path, "slurm.requeue(job, exclude=['n1', 'n2', 'n3'])"))
    said = slurm.wait_for_output(job, "refused")
    assert "needs 2 of the 4 nodes of batch that are up, and n1, n2, n3 of them are excluded" in said
    assert slurm.job(job)["JobState"] == "RUNNING"
