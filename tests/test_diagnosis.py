"""What is found on a cluster, and what that means for runs."""

from dataclasses import replace

import pytest
from doctor_inputs import FOUND, SLURM, changed, load, profile  # noqa: F401  fixtures

from asr_train.files import append_jsonl, write_json
from launch import doctor
from launch.site.diagnosis import diagnose
from launch.site.findings import continuation
from launch.site.signal_lead import Times

# ruff: noqa: F811  their names as arguments


def test_a_healthy_cluster_has_no_problems(load):
    assert {remark.level for remark in diagnose(load(), FOUND)} == {"ok"}


@pytest.mark.parametrize(
    ("values", "level", "about", "text"),
    [
        ({"refused": "Invalid account"}, "cannot run", "a job", "refuses a job of this profile: Invalid account"),
        ({"unknown_partitions": ("x",)}, "cannot run", "partition", "knows no partition x"),
        (
            {"partition": {"time_min": 29}}, "cannot run", "partition",
            "time: 00:30:00, and gpu allows 00:29:00: a job would wait there for ever",
        ),
        ({"partition": {"max_nodes": 1}}, "cannot run", "partition", "nodes: 2, and gpu allows 1"),
        ({"partition": {"state": "DOWN"}}, "problem", "partition", "gpu is DOWN: no job starts there now"),
        ({"partition": {"preempt_mode": "CANCEL"}}, "problem", "preemption", "ends for good"),
        ({"partition": {"preempt_mode": "GANG,SUSPEND"}}, "problem", "preemption", "may be suspended"),
        (
            {"partition": {"preempt_mode": "REQUEUE"}}, "problem", "preemption",
            "told by USR2, and SIGTERM; GraceTime is 0, so it has KillWait, 30 s",
        ),
        (
            {"partition": {"preempt_mode": "REQUEUE", "grace_s": 900}, "sends_user_signal": False}, "ok", "preemption",
            "told by SIGTERM alone (no preempt_send_user_signal); GraceTime is 900 s; one that has saved in time is",
        ),
        ({"preempt_type": "qos"}, "ok", "preemption", "preempted by QOS"),
        ({"preempt_type": None, "partition": {"preempt_mode": "REQUEUE"}}, "ok", "preemption", "not preempted"),
        ({}, "ok", "signals", "the node agents alone (proctrack/cgroup)"),
        ({"proctrack": "magic"}, "ok", "signals", "proctrack/magic, which was never tried"),
        ({"accounting_problem": "sacct: no"}, "problem", "accounting", "sacct: no; how a job ended is known"),
        ({"max_array_size": 0}, "problem", "arrays", "MaxArraySize=0"),
        ({"job_requeue": False}, "ok", "going on", "JobRequeue=0 does not matter"),
        ({"node": None}, "ok", "going on", "no job has tried on a node"),
        ({"node_problem": "job 7 is PENDING"}, "problem", "a node", "job 7 is PENDING"),
        ({"node_problem": "broken", "cannot_run": True}, "cannot run", "a node", "broken"),
        ({"shared_problem": "not seen"}, "cannot run", "shared folder", "not seen; name another"),
        ({"seen_after_s": 31.0}, "problem", "shared folder", "seen here only 31 s later"),
        ({"address": None}, "cannot run", "address", "nodes cannot meet"),
        (
            {"address": "127.0.1.1", "addresses": (), "here": ()}, "problem", "address",
            "g1 resolves to nothing on itself, to nothing from here; nodes meet at 127.0.1.1, which no other machine",
        ),
        (
            {"requeue_problem": "scontrol: denied", "sbatch_problem": "sbatch: denied"}, "problem", "going on",
            "requeue, as the profile leaves it open, and on g1 that does not work: scontrol: denied; run `wavefleet "
            "reconcile --act` from cron",
        ),
        ({"requeue_problem": "scontrol: denied"}, "ok", "going on", "a job's own node submits the next"),
    ],
)  # fmt: skip
def test_every_finding_says_what_it_means(values, level, about, text, load):
    found = changed(**values)
    remarks = diagnose(load(), found)
    assert [remark.level for remark in remarks] == sorted(
        (remark.level for remark in remarks), key=["cannot run", "problem", "ok"].index
    )
    assert [remark for remark in remarks if (remark.level, remark.about) == (level, about) and text in remark.text]


def test_one_of_two_partitions_that_fits_is_enough(load):
    short = replace(SLURM.partitions[0], name="short", time_min=10)
    found = changed(partitions=(short, SLURM.partitions[0]))
    levels = {remark.level for remark in diagnose(load(partition="short,gpu"), found) if remark.about == "partition"}
    assert levels == {"problem", "ok"}


@pytest.mark.parametrize(
    ("said", "requeue_problem", "sbatch_problem", "expected"),
    [
        ("auto", None, None, "requeue"),
        ("auto", None, "no", "requeue"),
        ("auto", "no", None, "successor"),
        ("auto", "no", "no", "requeue"),
        ("requeue", "no", None, "requeue"),
        ("successor", None, "no", "successor"),
    ],
)
def test_a_run_goes_on_by_what_works_on_nodes(said, requeue_problem, sbatch_problem, expected, load):
    cluster = load(continuation=said)
    found = changed(requeue_problem=requeue_problem, sbatch_problem=sbatch_problem)
    assert continuation(cluster, found) == expected
    works = {"requeue": requeue_problem, "successor": sbatch_problem}[expected] is None
    (remark,) = (remark for remark in diagnose(cluster, found) if remark.about == "going on")
    assert remark.level == ("ok" if works else "problem")


def test_where_nothing_is_known_a_run_is_requeued(load):
    assert continuation(load(), None) == "requeue"
    assert continuation(load(), replace(FOUND, node=None)) == "requeue"


def test_a_signal_lead_that_is_too_short_for_a_run_is_a_problem(load):
    slow = ("minds14", Times(step_s=10.0, save_s=40.0))
    (lead,) = (remark for remark in diagnose(load(), FOUND, slow) if remark.about == "signal lead")
    assert lead.level == "problem"
    assert "signal_lead_s is 120, and up to 160 s are needed" in lead.text
    assert "cluster.signal_lead_s=180" in lead.text
    (lead,) = (remark for remark in diagnose(load(signal_lead_s=160), FOUND, slow) if remark.about == "signal lead")
    assert (lead.level, "Enough: run minds14 needs up to 160 s" in lead.text) == ("ok", True)


@pytest.mark.parametrize(("grace_s", "level"), [(0, "problem"), (99, "problem"), (100, "ok")])
def test_a_grace_time_is_compared_with_what_a_run_needs_to_save(grace_s, level, load):
    found = changed(partition={"preempt_mode": "REQUEUE", "grace_s": grace_s})
    remarks = diagnose(load(), found, ("minds14", Times(step_s=10.0, save_s=40.0)))
    (remark,) = (remark for remark in remarks if remark.about == "preemption")
    assert (remark.level, "run minds14 needs up to 100 s to save" in remark.text) == (level, level == "problem")


def test_the_run_that_needs_most_time_is_the_one_that_counts(tmp_path):
    for name, cluster, save_s in (("a", "site.yaml", 10), ("b", "/x/site.yaml", 30), ("c", "other", 90), ("d", "", 5)):
        run = tmp_path / name
        write_json(run / "run.json", {})
        append_jsonl(run / "metrics.jsonl", {"step": 1, "step_time_s": 1.0})
        append_jsonl(run / "metrics.jsonl", {"step": 1, "event": "saved", "seconds": save_s})
        if cluster:
            job = {"job_id": "1", "cluster": cluster, "num_nodes": 1, "submitted": 1.0, "code": ""}
            write_json(run / "jobs" / "1.json", job)
    name, times = doctor.slowest_run("/y/site.yaml", tmp_path)
    assert (name, times.save_s) == ("b", 30)
    assert doctor.slowest_run("unknown", tmp_path) is None
