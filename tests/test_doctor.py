"""`wavefleet doctor`: what it finds on a real Slurm, what it makes of others, and what is decided by it."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

from asr_train.errors import RecipeError
from asr_train.files import append_jsonl, write_json
from launch import doctor
from launch.site import probe, probe_job, slurm_facts
from launch.site import slurm as slurm_commands
from launch.site.cluster import load_cluster, site_folder
from launch.site.diagnosis import diagnose
from launch.site.findings import Findings, NodeFacts, Partition, SlurmFacts, continuation, findings, keep
from launch.site.signal_lead import Times
from launch.site.slurm import SlurmError

PROFILE = {"nodes": 2, "gpus_per_node": 1, "cpus_per_node": 1, "time": 30, "signal_lead_s": 120}


@pytest.fixture
def profile(tmp_path):
    def profile(**values):
        path = tmp_path / "small.yaml"
        path.write_text(json.dumps({**PROFILE, "shared": str(tmp_path / "shared"), **values}))
        return str(path)

    return profile


@pytest.fixture
def load(profile):
    return lambda **values: load_cluster(profile(**values))


def ask_doctor(cluster, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "doctor", *map(str, arguments)],
        env={**cluster.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def of_level(text, level):
    """What a printed report says at a level: about -> text."""
    lines = (line.removeprefix(level).split("  ", 1) for line in text.splitlines() if line.startswith(f"{level} "))
    return {about.strip(): rest.strip() for about, rest in ((" ".join(x).strip().split("  ", 1)) for x in lines)}


# --- on a real Slurm --------------------------------------------------------------------------------------------


def test_a_cluster_is_looked_at_by_a_job_and_what_was_found_stays(slurm, profile, tmp_path):
    path = profile()
    said = ask_doctor(slurm, "--cluster", path)
    assert "looks around on a node" in said.stderr
    fine, problems = of_level(said.stdout, "ok"), of_level(said.stdout, "problem")
    assert set(problems) == {"preemption", "accounting", "address"}
    assert said.stdout.startswith("problem")
    assert "Slurm accounting storage is disabled" in problems["accounting"]
    assert "SIGTERM alone" in problems["preemption"]
    assert "KillWait, 5 s" in problems["preemption"]
    assert fine["a job"].startswith("Slurm 22.05")
    assert "every process of a job" in fine["signals"]
    assert "scontrol works there" in fine["going on"]
    assert "up to 1000 tasks" in fine["arrays"]
    assert "written there and seen here" in fine["shared folder"]

    found = findings(load_cluster(path), path)
    assert found.slurm.partitions[0] == Partition(
        name="batch", state="UP", time_min=7 * 24 * 60, max_nodes=None, grace_s=0, preempt_mode="REQUEUE"
    )
    assert found.slurm.kill_wait_s == 5
    assert found.node.node in ("n1", "n2", "n3", "n4")
    assert (found.node.requeue_problem, found.node.sbatch_problem, found.node.shared_problem) == (None, None, None)
    assert [entry.name for entry in (tmp_path / "shared" / "small").iterdir()] == ["doctor.json"]

    again = json.loads(ask_doctor(slurm, "--cluster", path, "--no-job", "--json").stdout)
    assert again["findings"]["node"]["job_id"] == found.node.job_id
    assert (again["can_run"], again["continuation"]) == (True, "requeue")
    assert set(slurm.jobs()) >= {found.node.job_id}


@pytest.mark.slurm
def test_another_site_is_told_apart(profile):
    """Accounting, signals that reach agents alone, a grace time, no arrays, JobRequeue=0."""
    settings = {"KillWait": "30", "JobRequeue": "0", "MaxArraySize": "1", "AccountingStorageEnforce": "associations"}
    signals = {"proctrack": "pgid", "grace_s": 600, "SlurmctldParameters": "preempt_send_user_signal"}
    with SlurmCluster(accounting=True, **signals, **settings) as other:
        said = ask_doctor(other, "--cluster", profile(account="speech", partition="batch,urgent")).stdout
        refused = ask_doctor(other, "--cluster", profile(account="nobody"), code=4).stdout
    assert set(of_level(said, "problem")) == {"arrays", "address"}
    for part in (
        "sacct answers", "the node agents alone (proctrack/pgid)", "told by USR2, and SIGTERM; GraceTime is 600 s",
        "jobs of urgent are not preempted", "JobRequeue=0 does not matter", "MaxArraySize=1",
        "scontrol works there",  # the job asked for --requeue by name
    ):  # fmt: skip
        assert part in said
    assert "Invalid account" in of_level(refused, "cannot run")["a job"]
    assert "Invalid account" in of_level(refused, "cannot run")["a node"]


def test_a_job_that_does_not_start_in_time_is_cancelled_and_it_is_said_why(slurm, profile):
    path = profile(sbatch={"begin": "now+1hour"})
    said = ask_doctor(slurm, "--cluster", path, "--timeout", 2)
    problem = of_level(said.stdout, "problem")["a node"]
    assert "is PENDING (BeginTime), expected to start at" in problem
    assert "after 2 s, and was cancelled" in problem
    assert "is PENDING (BeginTime)" in said.stderr
    assert {fields["JobState"] for fields in slurm.jobs().values() if fields["JobName"] == "wavefleet-doctor"} <= {
        "CANCELLED", "COMPLETED",
    }  # fmt: skip


def test_ctrl_c_cancels_the_job(slurm, profile):
    command = [sys.executable, "-m", "launch.cli", "doctor", "--cluster", profile(sbatch={"begin": "now+1hour"})]
    environ = {**slurm.environ, "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        job = re.search(r"job (\d+) looks around", process.stderr.readline())[1]
        process.stderr.readline()  # it waits
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert slurm.job(job)["JobState"] == "CANCELLED"


def test_python_that_does_not_start_on_a_node_means_that_no_run_can(slurm, profile):
    said = ask_doctor(slurm, "--cluster", profile(environment={"PYTHONHOME": "/nowhere"}), code=4)
    refusal = of_level(said.stdout, "cannot run")["a node"]
    assert "before it looked around; its last lines:" in refusal
    assert "encodings" in said.stdout


def test_a_profile_that_slurm_refuses_cannot_run(slurm, profile):
    said = ask_doctor(slurm, "--cluster", profile(partition="nope"), "--no-job", code=4)
    refused = of_level(said.stdout, "cannot run")
    assert "knows no partition nope" in refused["partition"]
    assert "refuses a job of this profile" in refused["a job"]
    assert "Invalid partition name" in said.stdout


# --- what Slurm says, in other versions --------------------------------------------------------------------------

CONFIG = """Configuration data as of 2026-11-22T22:23:40
JobRequeue              = {requeue}
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptParameters       = {preempt}
PreemptType             = preempt/partition_prio
ProctrackType           = proctrack/cgroup
SlurmctldParameters     = {slurmctld}
SLURM_VERSION           = {version}

Slurmctld(primary) at head is UP
"""
PARTITIONS = (
    "PartitionName=long Default=NO GraceTime=0 MaxNodes=8 MaxTime=30-00:00:00 PreemptMode=OFF State=UP\n"
    "PartitionName=gpu Default=YES GraceTime=300 MaxNodes=UNLIMITED MaxTime=UNLIMITED PreemptMode=GANG,SUSPEND "
    "State=DRAIN\n"
)


@pytest.fixture
def facts(load, monkeypatch):
    """What `ask` makes of a configuration; `sacct` raises an error or answers."""

    def facts(partition=None, sacct=None, config=CONFIG, **values):
        values = {"requeue": 1, "preempt": "(null)", "slurmctld": "(null)", "version": "23.11.10", **values}

        def run(*command):
            if command[0] == "sacct":
                if sacct is not None:
                    raise SlurmError(sacct)
                return ""
            return PARTITIONS if "partition" in command else config.format(**values)

        monkeypatch.setattr(slurm_commands, "run", run)
        return slurm_facts.ask(load(partition=partition))

    return facts


@pytest.mark.parametrize("version", ["19.05.8", "22.05.8", "23.11.10-2.el9", "24.05.0-0rc1", "25.05.3+wmf1"])
def test_any_version_is_read(version, facts):
    assert facts(version=version).version == version


@pytest.mark.parametrize(
    ("slurmctld", "preempt", "expected"),
    [
        ("(null)", "(null)", False),
        ("cloud_dns,preempt_send_user_signal", "(null)", True),
        ("(null)", "reorder_count=2,send_user_signal", True),  # newer versions
    ],
)
def test_the_user_signal_is_found_where_either_version_has_it(slurmctld, preempt, expected, facts):
    assert facts(slurmctld=slurmctld, preempt=preempt).sends_user_signal is expected


def test_what_a_version_does_not_say_is_unknown(facts):
    found = facts(config="SLURM_VERSION = 99.01\n")
    assert (found.proctrack, found.kill_wait_s, found.job_requeue, found.max_array_size) == (None, None, None, None)
    assert found.preempt_type is None


def test_partitions_are_those_of_the_profile_or_the_default(facts):
    assert [partition.name for partition in facts().partitions] == ["gpu"]
    found = facts(partition="long,gpu,other")
    assert [(partition.name, partition.time_min, partition.max_nodes) for partition in found.partitions] == [
        ("long", 43200, 8),
        ("gpu", None, None),
    ]
    assert found.unknown_partitions == ("other",)
    assert [partition.state for partition in found.partitions] == ["UP", "DRAIN"]


def test_a_missing_sacct_is_a_finding_and_no_error(facts):
    assert facts(sacct="sacct is not on this machine").accounting_problem == "sacct is not on this machine"
    assert facts().accounting_problem is None


def test_requeue_0_is_read(facts):
    assert facts(requeue=0).job_requeue is False


# --- what it means ------------------------------------------------------------------------------------------------

SLURM = SlurmFacts(
    version="23.11.10", proctrack="cgroup", kill_wait_s=30, preempt_type="partition_prio", sends_user_signal=True,
    job_requeue=True, max_array_size=1001, accounting_problem=None,
    partitions=(
        Partition(name="gpu", state="UP", time_min=2880, max_nodes=None, grace_s=0, preempt_mode="OFF"),
    ),
)  # fmt: skip
NODE = NodeFacts(
    time=1.8e9, job_id="7", node="g1", addresses=("10.0.0.5",), address="g1", here=("10.0.0.5",), requeue_problem=None,
    sbatch_problem=None, shared_problem=None, seen_after_s=0.0, python="3.11.7",
)  # fmt: skip
FOUND = Findings(time=1.8e9, slurm=SLURM, refused=None, expected_start="Job 8 to start soon", node=NODE)


def changed(found=FOUND, **values):
    """Findings with fields of `slurm`, `node`, the partition, or their own replaced."""
    part = values.pop("partition", None)
    slurm = {key: values.pop(key) for key in list(values) if hasattr(SLURM, key)}
    node = {key: values.pop(key) for key in list(values) if hasattr(NODE, key) and key != "node"}
    if part is not None:
        slurm["partitions"] = (replace(SLURM.partitions[0], **part),)
    return replace(found, **{"slurm": replace(SLURM, **slurm), "node": replace(NODE, **node), **values})


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


# --- kept findings --------------------------------------------------------------------------------------------------


def test_findings_are_read_back_and_others_are_not(load):
    cluster = load()
    assert findings(cluster, "small") is None
    keep(cluster, "small.yaml", FOUND)
    assert findings(cluster, "/elsewhere/small.yaml") == FOUND
    path = site_folder(cluster, "small") / "doctor.json"
    content = json.loads(path.read_text())
    del content["slurm"]["kill_wait_s"]
    path.write_text(json.dumps(content))  # of another version
    assert findings(cluster, "small") is None
    path.write_text("{")
    assert findings(cluster, "small") is None


def test_a_site_folder_that_cannot_be_written_is_refused_by_name(load, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"shared: .*file/small cannot be written: .*; name another"):
        probe_job.look(load(shared=str(tmp_path / "file")), "small", 1.0)


# --- the job, with a faked Slurm --------------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Slurm commands that are shell lines; every call is written down, sbatch's script too."""
    folder = tmp_path / "bin"
    folder.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def commands(**lines):
        for name, line in lines.items():
            (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\n{line}\n')
            (folder / name).chmod(0o755)
        return calls

    return commands


def test_a_folder_that_nodes_do_not_share_is_told_from_a_job_that_failed(load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "SEEN_S", 0.5)
    commands(
        sbatch="cat >/dev/null; echo '7;cluster'",
        squeue="echo 'FAILED|JobLaunchFailure|N/A|g1'",
        scontrol="",
        scancel="",
    )
    found = probe_job.look(load(), "small", 5.0)
    assert found.cannot_run
    assert "job 7 ended (FAILED (JobLaunchFailure)), and nothing that it wrote in" in found.problem
    assert "nodes do not share that folder" in found.problem


@pytest.mark.parametrize("state", ["CANCELLED", "NODE_FAIL", "PREEMPTED", "TIMEOUT"])
def test_a_job_that_was_ended_from_outside_proves_nothing(state, load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "SEEN_S", 0.0)
    commands(sbatch="cat >/dev/null; echo 7", squeue=f"echo '{state}|None|N/A|g1'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 5.0)
    assert not found.cannot_run
    assert f"job 7 ended ({state}) before it looked around; try again" in found.problem


def test_a_job_that_printed_nothing_points_at_its_set_up(load, commands, monkeypatch):
    monkeypatch.setattr(probe_job, "LOG_S", 0.5)
    logs = (
        "sed -n 's/.*--output=\\(.*\\)%j.*/\\1/p' | head -n 1 | while read f; do : > \"${f}7_0_log.out\"; done; echo 7"
    )
    commands(sbatch=logs, squeue="echo 'FAILED|NonZeroExitCode|N/A|g1'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 5.0)
    assert found.cannot_run
    assert "it printed nothing: a line of `setup` failed, or a module" in found.problem


def test_a_partition_that_takes_no_job_without_a_gpu_is_asked_with_one(load, commands):
    refuse = "if grep -q gres; then echo 7; else echo 'ask for a GPU' >&2; exit 1; fi"
    calls = commands(sbatch=refuse, squeue="echo 'PENDING|QOSGrpGRES|N/A|'", scontrol="", scancel="")
    found = probe_job.look(load(), "small", 0.0)
    assert "job 7 is PENDING (QOSGrpGRES) after 0 s, and was cancelled" in found.problem
    assert not found.cannot_run
    assert [line.split()[0] for line in calls.read_text().splitlines()].count("sbatch") == 2
    assert "scancel 7" in calls.read_text()
    commands(sbatch="cat >/dev/null; echo 'account expired' >&2; exit 1")
    found = probe_job.look(load(), "small", 0.0)
    assert (found.cannot_run, "account expired" in found.problem) == (True, True)


def test_the_probe_job_is_small_and_keeps_what_a_site_needs(load, tmp_path):
    cluster = load(
        partition="gpu", account="lab", memory="0", cpus_per_node=64, gpus_per_node=8, gpu_type="a100", time="2-0",
        sbatch={"exclusive": True, "mail-user": "me"}, setup=["source site.sh"], modules=["cuda"],
    )  # fmt: skip
    text = probe_job.script(cluster, tmp_path, tmp_path / "code", "word", num_gpus=0)
    for line in ("--partition=gpu", "--account=lab", "--nodes=1", "--cpus-per-task=1", "--mem=1G", "--time=5"):
        assert f"#SBATCH {line}\n" in text
    assert "exclusive" not in text
    assert "gres" not in text
    assert "--hold" not in text
    assert "#SBATCH --requeue\n" in text
    assert "source site.sh\nmodule load cuda\n" in text
    one = probe_job.script(cluster, tmp_path, tmp_path / "code", "word", num_gpus=1)
    assert "#SBATCH --gres=gpu:a100:1\n" in one


def test_what_does_not_work_on_a_node_is_found_there(commands, tmp_path):
    (tmp_path / probe.HERE).write_text("another")
    (tmp_path / probe.SCRIPT).write_text("#!/bin/sh\n")
    environ = {"SLURMD_NODENAME": "no-such-node.invalid", "SLURM_JOB_ID": "7"}
    commands(
        scontrol='case "$*" in *"show job"*) echo "JobId=7 Requeue=0";; *) echo "NodeName=g1 NodeAddr=10.0.0.5";; esac',
        sbatch="echo 'submission from nodes is disabled' >&2; exit 1",
    )
    found = probe.look(tmp_path, "word", environ)
    assert "Requeue=0" in found["requeue_problem"]
    assert "submission from nodes is disabled" in found["sbatch_problem"]
    assert "another content" in found["shared_problem"]
    assert (found["addresses"], found["address"]) == ([], "10.0.0.5")
    commands(scontrol="echo 'access denied' >&2; exit 1", sbatch="echo 'Job 8 to start' >&2")
    (tmp_path / probe.HERE).unlink()
    found = probe.look(tmp_path, "word", environ)
    assert "access denied" in found["requeue_problem"]
    assert found["sbatch_problem"] is None
    assert "not seen on the node" in found["shared_problem"]
    assert found["address"] is None
